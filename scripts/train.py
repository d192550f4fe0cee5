"""Trains a student, and its teacher where there is none yet.

python scripts/train.py                              a digits student with its teacher, in a minute
python scripts/train.py experiment=mnist             a file of conf/experiment
python scripts/train.py -m seed=0,1,2 method=supervised,kd     a sweep
python scripts/train.py --help                       all keys;  --cfg job  prints the composed config
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("train")
