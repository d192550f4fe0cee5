"""Writes a small research project that imports litdistill: configs, a method and a network of its own, and tests.

python scripts/new.py kd_study
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("new")
