"""Searches for the best hyperparameters by distilling again and again; killed, it goes on with resume=<folder> or auto.

python scripts/sweep.py experiment=digits/distilled sweep.trials=20          Optuna's TPE
python scripts/sweep.py sweep=grid experiment=digits/distilled               every combination of a grid
python scripts/sweep.py sweep.objectives=[val,latency_ms]                    accuracy against latency
python scripts/sweep.py --help                                               all keys
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("sweep")
