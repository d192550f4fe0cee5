"""The report of a sweep: `sweep.md`, tables of its trials, and `best.yaml`, an experiment that reruns the best."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from litdistill.utils.command_line import command_argv, command_text
from litdistill.utils.files import write_text
from litdistill.utils.text import markdown_table

log = logging.getLogger(__name__)
SHOWN = 20  # trials on the console


def write_report(
    study: optuna.Study, folder: Path, overrides: Sequence[str], names: Sequence[str], seeds: Sequence[int]
) -> None:
    """Writes both files. `overrides`: common to all trials. `names`: of the objectives. `seeds`: those of each trial."""
    write_text(folder / "sweep.md", markdown(study, overrides, names, seeds))
    if (best := best_trial(study)) is not None:
        write_text(folder / "best.yaml", experiment(best, names, seeds))
        show(study, best, folder, names, seeds)


def show(study: optuna.Study, best: FrozenTrial, folder: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Prints the end of a sweep: the table of its best trials, the best value, and the command that reruns it."""
    params, console = list(dict.fromkeys(key for t in study.get_trials(deepcopy=False) for key in t.params)), Console()
    console = console if console.is_terminal else Console(width=160)
    trials = ranked(study)
    head = ["trial", *names, *params, "state"]
    records = [dict(zip(head, row(t, names, params), strict=False)) for t in trials[:SHOWN]]
    narrow = terminal_table(records)
    for column in reversed(params):  # of a narrow terminal, as sweep.md has all
        if console.measure(narrow, options=console.options.update(width=10_000)).maximum <= console.width:
            break
        records = [{k: v for k, v in record.items() if k != column} for record in records]
        narrow = terminal_table(records)
    console.print(narrow)
    values = ", ".join(f"{name} {value:.6g}" for name, value in zip(names, best.values, strict=True))
    said = "The best is trial %d: %s. All trials and parameters are in %s; best.yaml beside it is an experiment of the best."
    log.info(said, best.number, values, folder / "sweep.md")
    log.info("To rerun the best: %s", rerun(best, seeds))


def terminal_table(records: Sequence[dict[str, str]]) -> Table:
    """Returns the rows as a table for the terminal; its cells are no markup."""
    found = Table()
    for name in records[0]:
        found.add_column(Text(name), justify="left" if name == "state" else "right", overflow="fold")
    for record in records:
        found.add_row(*map(Text, record.values()))
    return found


def rerun(trial: FrozenTrial, seeds: Sequence[int]) -> str:
    """Returns the command that trains a trial's run again, or its runs."""
    many = ["-m", f"seed={','.join(map(str, seeds))}"] if seeds else []
    return command_text([*command_argv("train"), *trial.user_attrs["overrides"], *many])


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Returns the best finished trial; with several objectives, the trial of the Pareto front that is best by the first."""
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return None
    sign = 1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else -1
    return max(study.best_trials, key=lambda t: (sign * t.values[0], -t.number))


def markdown(study: optuna.Study, overrides: Sequence[str], names: Sequence[str], seeds: Sequence[int]) -> str:
    """Returns Markdown with all trials, parameter importances and, for several objectives, the Pareto front."""
    trials = study.get_trials(deepcopy=False)
    params = list(dict.fromkeys(key for t in trials for key in t.params))
    counts = {s: sum(t.state == s for t in trials) for s in TrialState}
    goals = [f"{name} ({d.name.lower()})" for name, d in zip(names, study.directions, strict=True)]
    lines = [
        "# Sweep",
        "",
        f"Objective: {', '.join(goals)}{f', the mean over seeds {list(seeds)}' if seeds else ''}.",
        f"Common to all trials: `{' '.join(overrides) or 'the defaults'}`.",
        f"Trials: {', '.join(f'{n} {s.name.lower()}' for s, n in counts.items() if n)}.",
    ]
    head = ["trial", *names, *params, "state", "reason"]
    best = best_trial(study)
    if best is not None:
        lines += ["", f"Best: trial {best.number}. `best.yaml` reruns it."]
    lines += ["", "## Trials", "", markdown_table(head, [row(t, names, params) for t in ranked(study)], len(head))]
    if len(names) > 1 and best is not None:
        front = sorted(study.best_trials, key=lambda t: t.values)
        head = ["trial", *names, *params]
        lines += [
            "",
            "## Pareto front",
            "",
            markdown_table(head, [row(t, names, params)[: len(head)] for t in front], len(head)),
        ]
    found = {name: importances(study, i) for i, name in enumerate(names)}
    if any(found.values()):
        weight = lambda key: found[names[0]].get(key, 0)  # noqa: E731
        rows = [[key, *(number(found[n].get(key)) for n in names)] for key in sorted(params, key=weight, reverse=True)]
        lines += [
            "",
            "## Importance",
            "",
            "The share of the objective's variance that each parameter explains (fANOVA).",
            "",
        ]
        lines.append(markdown_table(["parameter", *names], rows, 1 + len(names)))
    return "\n".join(lines) + "\n"


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the finished trials, sorted from the best by the first objective, then the others in their order."""
    sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    done = lambda t: t.state == TrialState.COMPLETE  # noqa: E731
    key = lambda t: (not done(t), sign * t.values[0] if done(t) else 0, t.number)  # noqa: E731
    return sorted(study.get_trials(deepcopy=False), key=key)


def row(trial: FrozenTrial, names: Sequence[str], params: Sequence[str]) -> list[str]:
    values = list(trial.values) if trial.state == TrialState.COMPLETE else [None] * len(names)
    reason = str(trial.user_attrs.get("reason", ""))
    cells = [number(v) for v in values] + [number(trial.params.get(p)) for p in params]
    return [str(trial.number), *cells, trial.state.name.lower(), reason]


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 10 else f"{value:.4g}"
    return "" if value is None else str(value)


def importances(study: optuna.Study, i: int) -> dict[str, float]:
    """Returns the importance of each parameter for objective `i`, sum 1 (Hutter et al. 2014, fANOVA); empty if undefined."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len({t.values[i] for t in done}) < 2 or all(t.params == done[0].params for t in done):
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator, target=lambda t: t.values[i])


def experiment(trial: FrozenTrial, names: Sequence[str], seeds: Sequence[int]) -> str:
    """Returns the yaml of an experiment (for conf/experiment) that composes to the trial's config."""
    parsed = OverridesParser.create().parse_overrides(trial.user_attrs["overrides"])
    groups = [o for o in parsed if is_group(o) and not o.is_delete()]
    deletes = [str(o.input_line) for o in parsed if o.is_delete()]
    defaults: list[Any] = []
    for o in groups:
        key, value = o.get_key_element().lstrip("+"), o.value()
        if key == "experiment":
            defaults[:0] = [{"/experiment@_global_": value}] if value is not None else []
        else:
            defaults.append({f"/{key}" if o.is_add() else f"override /{key}": value})
    body = OmegaConf.create({})
    for o in parsed:
        if o not in groups and not o.is_delete():
            OmegaConf.update(body, o.key_or_group, o.value(), merge=True, force_add=True)
    values = ", ".join(f"{n} {number(v)}" for n, v in zip(names, trial.values, strict=True))
    several = [f"seed={','.join(map(str, seeds))}"] if seeds else []
    rerun = " ".join(["litdistill train", *(["-m"] if seeds else []), "experiment=best", *deletes, *several])
    head = [
        "# @package _global_",
        f"# The best of a sweep, trial {trial.number}: {values}. Copied to conf/experiment/best.yaml:",
        f"#\n#   {rerun}\n",
    ]
    config = OmegaConf.create({"defaults": [*defaults, "_self_"], **body})
    return "\n".join(head) + OmegaConf.to_yaml(config)


def is_group(override: Override) -> bool:
    """Returns whether an override selects an option of a config group rather than a value."""
    loader = GlobalHydra.instance().config_loader()
    return bool(loader.get_group_options(override.key_or_group.split("@")[0]))
