"""Searches for the best hyperparameters by distilling again and again; killed, it goes on with resume=<folder> or auto.

python scripts/sweep.py experiment=digits/distilled sweep.trials=20          Optuna's TPE
python scripts/sweep.py sweep=grid experiment=digits/distilled               every combination of a grid
python scripts/sweep.py sweep.objectives=[val,latency_ms]                    accuracy against latency
python scripts/sweep.py --help                                               all keys
"""

from omegaconf import DictConfig

from litdistill.cli import command


@command("sweep")
def main(cfg: DictConfig) -> None:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from litdistill.sweep.study import sweep

    about = HydraConfig.get()
    sweep(cfg, list(about.overrides.task), Path(about.runtime.output_dir))


if __name__ == "__main__":
    main()
