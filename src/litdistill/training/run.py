"""A run from Python, with the options of `litdistill train`: `data, distiller = run("method=dkd", "seed=1")`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from litdistill.config.instantiate import import_classes_from
from litdistill.distillation.distiller import Distiller
from litdistill.evaluation.evaluate import rebuild
from litdistill.training.train import train
from litdistill.utils.command_line import literal, without_null
from litdistill.utils.distributed import run_stamp
from litdistill.utils.files import write_text
from litdistill.utils.logging import filter_warnings
from litdistill.utils.paths import CONF


def run(
    *overrides: str, config_dir: str | Path | None = None, folder: str | Path | None = None
) -> tuple[Any, Distiller]:
    """Trains as `litdistill train <overrides>` does, in this process; returns the data and the distiller with the best weights.

    Args:
        overrides: as on the command line, for example "experiment=mnist" and "seed=1".
        config_dir: a folder of configs of your own, searched beside litdistill's, as with `--config-dir`.
        folder: the run's folder; None: `runs/<name>/<time>`. A finished run in it is not trained again.

    `distiller.deployed_student` is the trained network, `distiller.teacher.net` its teacher. Raises `UserError` for invalid
    options, and Hydra's errors for options that do not exist.
    """
    filter_warnings()
    import_classes_from(os.getcwd())
    path = [f"hydra.searchpath=[{literal(f'file://{Path(config_dir).resolve()}')}]"] if config_dir is not None else []
    typed = list(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*path, *without_null(typed), "folder=null"], return_hydra_config=True)
    choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
    cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    place = Path(cfg.runs) / cfg.name / run_stamp() if folder is None else Path(folder)
    cfg.folder = str(place)
    if not (place / "summary.json").is_file():
        write_text(place / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
        if config_dir is None:  # else a resume by the command would not find these configs
            record = {"job": {"config_name": "train"}, "overrides": {"task": typed}, "runtime": {"choices": choices}}
            write_text(place / ".hydra" / "hydra.yaml", OmegaConf.to_yaml({"hydra": record}))
    train(cfg)
    data, distiller = rebuild(place)
    return data, distiller.eval()
