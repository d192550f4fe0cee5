"""Trains a small detector by every method for detectors, and writes the table of them all into docs/methods.md.

    python scripts/detection_table.py out=docs/methods.md seeds=5

Runs are those of conf/experiment/detection/methods.yaml, in runs/detection_methods/<method>/; what is finished there is not
repeated. `only=true` writes the table of what is there and trains nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from litdistill.config.recipes import recipe_hash
from litdistill.training.train import train
from litdistill.utils.checkpoint import write_text
from litdistill.utils.errors import UserError
from litdistill.utils.logging import filter_warnings
from litdistill.utils.paths import CONF
from litdistill.utils.units import spread
from litdistill.utils.versions import versions

DEFAULTS = {"out": "docs/methods.md", "seeds": 5, "runs": "runs", "only": False}
TITLE = "## Detectors"
CONTROL = "supervised"
TAPS = ["method.student_taps=pyramid", "method.teacher_taps=pyramid"]
# By method: what stands beside its name on the command line, and what it reads of the teacher.
METHODS: dict[str, tuple[list[str], str]] = {
    CONTROL: (["data.only_labelled=true"], "no teacher"),
    "pkd": (TAPS, "pyramid"),
    "mgd": (["method.hint=2e-5", "method.masked=0.65", "method.mask=places", *TAPS], "pyramid"),
    "fgd": ([], "pyramid; detections where there are no boxes"),
    "dense_kd": ([], "classes, boxes and centerness at every anchor"),
    "crosskd": ([], "the teacher's head on the student's maps"),
    "pseudo_boxes": ([], "detections"),
    "pkd_dense_kd": ([], "pyramid; classes, boxes and centerness"),
    "cwd": (["balance=auto", *TAPS], "pyramid"),
    "at": (["balance=auto", *TAPS], "pyramid"),
    "fitnet": (["balance=auto", *TAPS], "pyramid, the middle level"),
}
COLUMNS = ("method", "reads of the teacher", "options", "seeds", "test mAP %", "over the control")


def config(name: str, seed: int, runs: str) -> DictConfig:
    """Returns the config of one cell. What decides its weights is in its folder's name: a changed default is another run."""
    overrides = ["experiment=detection/methods", f"method={name}", f"seed={seed}", f"runs={runs}", "folder=''"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides + METHODS[name][0])
    cfg.folder = str(Path(runs) / "detection_methods" / name / f"{seed}-{recipe_hash(cfg)}")
    return cfg


def summary(cfg: DictConfig, only: bool) -> dict[str, Any] | None:
    """Returns what a cell has left, trained now unless it is there; None where it is not and `only` what is there counts."""
    file = Path(cfg.folder) / "summary.json"
    if not file.is_file():
        if only:
            return None
        write_text(Path(cfg.folder) / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
        train(cfg)
    return json.loads(file.read_text())


def score(found: Mapping[str, Any]) -> float:
    """Returns the mAP on the test set in per cent, of the weights that training ended with."""
    return 100 * found["student"]["test"]["map"]["last"]


def gain(values: Mapping[int, float], control: Mapping[int, float]) -> str:
    """Returns mean ± spread of the differences seed by seed, over the seeds that both have, with its sign."""
    text = spread([values[seed] - control[seed] for seed in values if seed in control])
    return text if text.startswith("-") else f"+{text}"


def rows(scores: Mapping[str, Mapping[int, float]]) -> list[list[str]]:
    """Returns the cells of the table, of the methods that have a run."""
    found = []
    for name, values in scores.items():
        if not values:
            continue
        over = "control" if name == CONTROL else gain(values, scores[CONTROL]) if scores[CONTROL] else "–"
        options = " ".join(METHODS[name][0]) or "as in its file"
        found.append([f"`{name}`", METHODS[name][1], options, str(len(values)), spread(list(values.values())), over])
    return found


def section(found: Sequence[Sequence[str]], example: Mapping[str, Any]) -> str:
    """Returns the section of the document, with what the table is, from the runs themselves."""
    student, large, data = example["student"], example["teacher"], example["data"]
    used = ", ".join(f"{k} {v}" for k, v in versions().items())
    line = lambda cells: "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"  # noqa: E731
    table = "\n".join([line(COLUMNS), "|---|---|---|---:|---:|---:|", *map(line, found)])
    return f"""{TITLE}

Written by `python scripts/detection_table.py`; not to be edited by hand.

Every method trains the same small detector ({student["params"]:,} parameters) for {example["steps"]} steps on
{data["train"]:,} scenes of `data=digit_scenes`, of which 250 have boxes, beside the same teacher ({large["params"]:,}
parameters, trained on all boxes: {100 * large["test"]["map"]:.2f} % mAP on the {data["test"]} scenes of the test set). The
control is `{CONTROL}`: those 250 scenes alone, for as many steps. Weights are the published ones for detectors where there
are any, else `balance=auto` sets them. The test set was used to choose nothing: the mAP is that of the last epoch. Mean ±
standard deviation over seeds, which draw first weights and order; the difference is taken seed by seed. As above it is a
sanity check and no ranking.

Each run is `python scripts/train.py experiment=detection/methods method=<method> <options> seed=<seed>`.
Made with {used}.

{table}
"""


def main() -> None:
    filter_warnings()
    choices = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    if set(choices) != set(DEFAULTS) or choices.seeds < 1:
        raise UserError(
            f"Give {', '.join(f'{k}={v}' for k, v in DEFAULTS.items())} or other values, one seed at least."
        )
    torch.set_num_threads(1)
    there = [name for name in METHODS if (CONF / "method" / f"{name}.yaml").is_file()]
    scores: dict[str, dict[int, float]] = {name: {} for name in there}
    example = None
    for seed in range(choices.seeds):  # all methods of one seed first: what is stopped has a table
        for name in there:
            if (found := summary(config(name, seed, choices.runs), choices.only)) is not None:
                scores[name][seed], example = score(found), example or found
                print(f"{name} {seed}: {scores[name][seed]:.2f} %", flush=True)
    if example is None:
        raise UserError(f"There is no finished run in {choices.runs}/detection_methods. Leave only=true out.")
    path = Path(choices.out)
    before = path.read_text().split(f"\n{TITLE}\n")[0].rstrip("\n") if path.is_file() else "# Methods"
    write_text(path, f"{before}\n\n{section(rows(scores), example)}")
    print(f"Written to {choices.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
