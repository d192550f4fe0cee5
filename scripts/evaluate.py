"""Measures a finished run anew from its own folder, and tells whether its summary is reproduced to the digit.

python scripts/evaluate.py run=runs/digits/<stamp>
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("evaluate")
