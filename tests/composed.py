"""The config of a command as Hydra composes it, but sooner: what it makes of groups is kept, and values are set in a copy.

A test of tests/test_configs.py holds it against Hydra.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache, lru_cache

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from litdistill.benchmarks import published_tables
from litdistill.utils.paths import CONF


def by_hydra(root: str, overrides: Sequence[str]) -> DictConfig:
    """The config `root` of a command under overrides, within another command, too."""
    published_tables.register(overrides)
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(root, [*overrides])
    finally:
        GlobalHydra.instance().hydra = outer


def composed(root: str, overrides: Sequence[str]) -> DictConfig:
    """The same as `by_hydra`, and its errors."""
    parsed = [_parsed(one) for one in overrides]
    values = [one for one in parsed if _is_value(one)]
    found = copy.deepcopy(_of_groups(root, tuple(str(one.input_line) for one in parsed if not _is_value(one))))
    try:
        for one in values:
            if one.is_add() and OmegaConf.select(found, one.key_or_group, throw_on_missing=False) is not None:
                return by_hydra(root, overrides)
            OmegaConf.update(
                found, one.key_or_group, one.value(), merge=True, force_add=one.is_add() or one.is_force_add()
            )
    except OmegaConfBaseException:
        return by_hydra(root, overrides)
    return found


@lru_cache(32)
def _of_groups(root: str, overrides: tuple[str, ...]) -> DictConfig:
    return by_hydra(root, overrides)


@cache
def _parsed(line: str) -> Override:
    return OverridesParser.create().parse_override(line)


def _is_value(one: Override) -> bool:
    """Whether an override sets one value, and chooses, adds or deletes no file of a group."""
    plain = one.package is None and not one.is_delete() and not one.is_sweep_override()
    return plain and not one.is_hydra_override() and not (CONF / one.key_or_group).is_dir()
