"""Trains a student, and its teacher where there is none yet.

python scripts/train.py                              a digits student with its teacher, in a minute
python scripts/train.py experiment=mnist             a file of conf/experiment
python scripts/train.py -m seed=0,1,2 method=supervised,kd     a sweep
python scripts/train.py --help                       all keys;  --cfg job  prints the composed config
"""

from omegaconf import DictConfig

from litdistill.cli import command


@command("train")
def main(cfg: DictConfig) -> float:
    from litdistill.training.train import train  # torch is imported only after the config is known to be right

    return train(cfg)


if __name__ == "__main__":
    main()
