"""Suggestions of the nearest names for overrides with an unknown key or option."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from litdistill.benchmarks import published_tables
from litdistill.config.schema.check import options_of_objects
from litdistill.utils.command_line import config_dir_of, split_flags
from litdistill.utils.paths import CONF

NEAR = 0.1  # names this much less alike than the nearest are not suggested beside it


def suggestions(arguments: Sequence[str], config_name: str) -> str:
    """Returns one line with the nearest names for each override whose key or option is unknown; empty if all exist."""
    flags, overrides = split_flags(arguments)
    keys, unwritten, groups = _known_names(config_name, config_dir_of(flags), overrides)
    lines = [line for text in overrides if (line := _check_override(text, keys, unwritten, groups)) is not None]
    return "".join(f"\n  {line}" for line in lines)


def _check_override(argument: str, keys: set[str], unwritten: set[str], groups: dict[str, list[str]]) -> str | None:
    """Returns what is wrong with one override and the nearest names; None for a valid one."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        name, sign, text = argument.partition("=")
        if sign and text == text.strip() and name == name.strip():
            return f"Quote the value, which contains characters of Hydra's grammar: '{name}=\"{text}\"'"
        return f"{argument!r} is no override. Write key=value, without spaces around the equals sign."
    key, group = override.key_or_group, override.key_or_group.split("@")[0]
    adds = override.is_add() or override.is_force_add()
    if group in groups and not override.is_delete():
        value = override.value()
        for option in value if isinstance(value, list) else [value]:
            if isinstance(option, str) and option not in groups[group]:
                return _suggest(f"{override.get_key_element()}={option}", option, groups[group], f"Options of {group}")
        return None
    if key in keys or adds or key.startswith("hydra"):
        return None
    if key.startswith(("teacher.recipe.", "student.recipe.")):
        return f"{key}: a key that a recipe may lack is set with two plus signs: ++{argument}"
    if key in unwritten:
        return f"{key}: an option that is not written out there is set with a plus sign: +{argument}"
    return _suggest(key, key, sorted(keys | groups.keys()), "Keys")


def _suggest(shown: str, name: str, known: Iterable[str], label: str) -> str:
    known = list(known)
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if label == "Keys" and "." not in name:
        known = [k for k in known if "." not in k and "/" not in k]
    ratio = lambda k: difflib.SequenceMatcher(None, k, name).ratio()  # noqa: E731  get_close_matches has this order
    close = difflib.get_close_matches(name, [k for k in known if not k.rsplit(".", 1)[-1].startswith("_")], 4, 0.5)
    close = [k for k in close if ratio(k) > ratio(close[0]) - NEAR]
    near = list(dict.fromkeys(same_leaf + close))[:4]
    return (
        f"{shown}: did you mean {' or '.join(near)}?" if near else f"{shown}: unknown. {label}: {', '.join(known[:40])}"
    )


def _known_names(
    config_name: str, config_dir: Path | None, overrides: Sequence[str]
) -> tuple[set[str], set[str], dict[str, list[str]]]:
    """Returns all keys of the config with the groups that the overrides choose, the options of its objects that it does not
    write out, such as `trainer.max_steps`, and the options of each group, including the user's own."""
    ours = options_of_groups()
    pairs = [override.partition("=")[::2] for override in overrides]
    chosen = [f"{key}={option}" for key, option in pairs if option in ours.get(key.split("@")[0], ())]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            cfg = compose(config_name, chosen)
        except HydraException:  # they do not go together, which is said of them elsewhere
            cfg = compose(config_name)
    plain: Any = OmegaConf.to_container(cfg)
    keys = set(_keys(plain, ""))
    return keys, {key for key in options_of_objects(plain) if key not in keys}, options_of_groups(config_dir)


def options_of_groups(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Returns the options of each group of `conf/`, including those of the user's own folder."""
    files = {Path("experiment", name) for name in published_tables.experiments()}
    for folder in [CONF, *([config_dir] if config_dir is not None else [])]:
        files |= {p.relative_to(folder).with_suffix("") for p in folder.rglob("*.yaml") if p.parent != folder}
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        for depth in range(1, len(file.parts)):
            groups.setdefault("/".join(file.parts[:depth]), []).append("/".join(file.parts[depth:]))
    return groups


def _keys(node: Any, prefix: str) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")
