"""Says what is wrong with a finished run, in order of weight, each with the one change to try.

python scripts/doctor.py run=runs/digits/<stamp>
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("doctor")
