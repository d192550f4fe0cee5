"""The search space of a sweep: keys of the training config, each with a list of choices or a range.

A space is shaped like the config, `{method: {temperature: {low: 1.0, high: 16.0, log: true}}, student: {widths: [[8], [16]]}}`,
or has full override keys, `{"method.temperature": …}`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from litdistill.config.recipes import teacher_config
from litdistill.utils.command_line import literal
from litdistill.utils.errors import UserError

# Keys that the teacher's recipe inherits from the student's config: where they are searched, the teacher's are fixed.
SHARED = ("optimizer", "scheduler", "trainer", "data.batch_size", "data.epoch_size", "data.augment")


def read_space(node: Any, prefix: str = "") -> dict[str, BaseDistribution]:
    """Returns the distribution of each override key. Choices are strings, as they follow the `=` of an override."""
    space: dict[str, BaseDistribution] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value:
            space[name] = CategoricalDistribution([literal(v) for v in value])
        elif isinstance(value, dict) and {"low", "high"} & value.keys():
            try:
                whole = all(isinstance(value[k], int) for k in ("low", "high", "step") if value.get(k) is not None)
                options = {k: v for k, v in value.items() if v is not None}
                space[name] = IntDistribution(**options) if whole else FloatDistribution(**options)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"sweep.space.{name}={value} is no range: {error} Write {{low: 1, high: 10}}."
                ) from error
        elif isinstance(value, dict):
            space |= read_space(value, f"{name}.")
        elif value is not None:
            raise UserError(f"sweep.space.{name}={value} is neither a list nor a range. To fix a value: {name}={value}")
    return space


def first(distribution: BaseDistribution) -> Any:
    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low  # type: ignore[attr-defined]


def grid(space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Returns all combinations; the last key varies fastest. Raises `UserError` for a range without a step."""
    axes: list[Sequence[Any]] = []
    for key, d in space.items():
        if isinstance(d, CategoricalDistribution):
            axes.append(d.choices)
        elif isinstance(d, (IntDistribution, FloatDistribution)) and d.step and not d.log:
            axes.append([d.low + i * d.step for i in range(round((d.high - d.low) / d.step) + 1)])
        else:
            raise UserError(
                f"sweep.space.{key} is a range; a grid needs a list, or a step: {{low: 1, high: 9, step: 2}}."
            )
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*axes)]


def suggest(trial: Trial, name: str, d: BaseDistribution) -> Any:
    if isinstance(d, CategoricalDistribution):
        return trial.suggest_categorical(name, d.choices)
    if isinstance(d, IntDistribution):
        return trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
    assert isinstance(d, FloatDistribution)
    return trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)


def pinned(base: DictConfig, space: Mapping[str, BaseDistribution]) -> list[str]:
    """Returns overrides that fix the automatic teacher's recipe, so that it is trained once and not for every trial."""
    if base.teacher is None or base.teacher.checkpoint != "auto":
        return []
    teacher = teacher_config(base)
    keys = [k for k in space if any(k == shared or k.startswith(f"{shared}.") for shared in SHARED)]
    return [f"++teacher.recipe.{k}={literal(plain(OmegaConf.select(teacher, k)))}" for k in keys]


def plain(node: Any) -> Any:
    """Returns a config as dicts and lists."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
