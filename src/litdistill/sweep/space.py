"""The search space of a sweep: keys of the training config, each with a list of choices or a range.

A space is shaped like the config, `{method: {temperature: {low: 1.0, high: 16.0, log: true}}, student: {widths: [[8], [16]]}}`,
or has full override keys, `{"method.temperature": …}`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from litdistill.config.instantiate import locate
from litdistill.config.recipes import teacher_config
from litdistill.methods.base import WEIGHTS, Method
from litdistill.utils.command_line import literal
from litdistill.utils.errors import UserError

# Keys that the teacher's recipe inherits from the student's config: where they are searched, the teacher's are fixed.
SHARED = ("optimizer", "scheduler", "trainer", "data.batch_size", "data.epoch_size", "data.augment")


def read_space(node: Any, prefix: str = "") -> dict[str, BaseDistribution]:
    """Returns the distribution of each override key. Choices are strings, as they follow the `=` of an override."""
    space: dict[str, BaseDistribution] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if multiples(value):
            continue  # of a key that is left out: see `fitting`
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


def fitting(node: Any, base: DictConfig, typed: Collection[str] = (), prefix: str = "") -> tuple[Any, list[str]]:
    """Returns a space (plain values) for the config `base`, and the full keys that are left out, as `base` lacks them.

    So a space of conf/sweep fits any network and method: one without widths keeps the one it has. `[x0.5, x1, x2]`
    becomes a list of the multiples of the config's own value, a number or a list of numbers. Keys in `typed`, which the user
    has typed, and keys of groups stay: a misspelt one is an error.
    """
    kept, left = {}, []
    for key, value in node.items():
        name, inner = f"{prefix}{key}", isinstance(value, dict) and not {"low", "high"} & value.keys()
        if inner:
            kept[key], more = fitting(value, base, typed, f"{name}.")
            left += more
            continue
        known = name.startswith(("+", "~")) or "@" in name or _holds(base, name) or name in typed
        if value is not None and not known:
            left.append(name)
            continue
        if factors := multiples(value):
            value = _multiples(name, OmegaConf.select(base, name), factors)
        kept[key] = value
    return kept, left


def unbalanced(names: Iterable[str], cfg: DictConfig) -> list[str]:
    """Returns the overrides by which `balance` keeps the weights that are searched of methods which read features, so also one
    at its default."""
    found = []
    for name in names if cfg.get("balance") else ():
        method, _, option = name.rpartition(".")
        weight = name.startswith("method.") and option in WEIGHTS and OmegaConf.select(cfg, name)  # 0: no term
        kind = locate(str(OmegaConf.select(cfg, method)["_target_"])) if weight else None
        if getattr(kind, "taps", Method.taps) is Method.taps:
            continue
        term = "_".join(key for key in name.split(".") if key not in ("method", "methods"))  # of a sum by its own key
        if term not in (cfg.balance.terms or {}):
            found.append(f"+balance.terms.{term}=null")
    return found


def multiples(value: Any) -> list[float]:
    """Returns the factors of a list such as `[x0.5, x1, x2]`; empty for any other value."""
    items = value if isinstance(value, list) else []
    found = [re.fullmatch(r"x(\d+(?:\.\d+)?)", item) if isinstance(item, str) else None for item in items]
    return [float(match[1]) for match in found if match] if found and all(found) else []


def _holds(base: DictConfig, name: str) -> bool:
    """Returns whether a config has a key, also where its value is null."""
    node: Any = base
    for part in name.split("."):
        if not OmegaConf.is_dict(node) or part not in node:
            return False
        node = node[part]
    return True


def _multiples(name: str, value: Any, factors: Any) -> list[Any]:
    """Returns the multiples of a number or of a list of numbers; whole numbers stay whole, and at least 1."""
    value = plain(value)
    by = lambda v, f: max(1, round(v * f)) if isinstance(v, int) else v * f  # noqa: E731
    try:
        found = [[by(v, f) for v in value] if isinstance(value, list) else by(value, f) for f in factors]
    except TypeError as error:
        raise UserError(
            f"sweep.space.{name}: {value} has no multiples by {factors}. Write a list of values."
        ) from error
    return [v for i, v in enumerate(found) if v not in found[:i]]


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
