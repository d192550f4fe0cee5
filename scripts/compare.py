"""Trains every technique of conf/experiment/compare on the same data and seeds, and writes the page that compares them.

python scripts/compare.py                               on bundled digits, three seeds
python scripts/compare.py dataset=mnist seeds=2            on MNIST
python scripts/compare.py 'techniques=[distilled,int8]' picture=docs/compare.png

A call that was interrupted goes on where it was: what is finished is not repeated.
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("compare")
