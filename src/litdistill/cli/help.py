"""`litdistill <verb> --help`: what the verb does, examples, its own keys with their comments and values, and the groups last.

The texts are those of the files of `conf/` and of the schema, and the values those of the composed config: a command's other
arguments count, so that `litdistill train data=folder --help` shows the keys of folders. Imports no torch.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from litdistill.benchmarks import published_tables
from litdistill.cli.suggestions import options_of_groups
from litdistill.config.schema.check import OBJECTS, SCHEMAS, schema_of
from litdistill.config.schema.reference import rows
from litdistill.utils.command_line import config_dir_of, literal, split_flags
from litdistill.utils.paths import CONF

WIDTH, LEFT = 80, 30  # columns of the text, and of its keys
ABSENT = object()
# Groups in the order of the help; those of `data`, … choose the node of that name.
GROUPS = (
    *("experiment", "data", "net", "task", "method", "balance", "adversarial", "compress", "optimizer", "scheduler"),
    *("trainer", "callbacks", "logger", "sweep"),
)


def help_text(config_name: str, arguments: Sequence[str]) -> str:
    """Returns the help of a verb for the arguments beside `--help`. Raises Hydra's errors for arguments that do not compose."""
    flags, overrides = split_flags(arguments)
    own = config_dir_of(flags)
    path = [f"hydra.searchpath=[{literal(f'file://{own.resolve()}')}]"] if own is not None else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(config_name, [*path, *overrides], return_hydra_config=True)
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    choices = {str(key): value for key, value in plain.pop("hydra")["runtime"]["choices"].items()}
    groups = options_of_groups(own)
    lines = [*_head(CONF / f"{config_name}.yaml"), "", *_keys(plain, config_name)]
    if config_name == "sweep":
        lines += ["", "Every key of a run may be set too: litdistill train --help"]
    else:
        lines += _nodes(plain, config_name, choices)
    lines += _groups({key: groups[key] for key in GROUPS if key in groups and _chosen(key, choices)}, choices)
    lines += ["", *_wrap("Hydra's own flags: --hydra-help. The composed config: --cfg job", 0)]
    return "\n".join(lines) + "\n"


def _chosen(group: str, choices: dict[str, Any]) -> bool:
    return any(key.split("@")[0] == group for key in choices)


def _head(file: Path) -> Iterator[str]:
    """Yields what a command does, and its examples, from the comment that its file of conf/ begins with."""
    said: list[str] = []
    examples: list[str] = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        (examples if text.startswith("python scripts/") else said).append(text)
    yield from _wrap(" ".join(filter(None, said)), 0)
    yield ""
    yield "Examples:"
    for example in examples:
        command, _, comment = re.sub(r"python scripts/(\w+)\.py", r"litdistill \1", example).partition("  ")
        if comment.strip():
            yield from _wrap(f"# {comment.strip()}", 2, "  # ")
        yield from _wrap(command, 2, "      ")


def _keys(plain: dict[str, Any], config_name: str) -> Iterator[str]:
    """Yields the keys that stand in the command's own file, with their values and explanations."""
    schema = SCHEMAS[config_name]
    own = set(SCHEMAS["train"].model_fields) if config_name == "sweep" else set()
    yield "Keys:"
    for row in rows(schema):
        top, value = row.key.split(".")[0], _at(plain, row.key)
        if top not in own and value is not ABSENT and not (isinstance(value, dict) and "_target_" in value):
            yield from _row(row.key, value, row.description)


def _nodes(plain: dict[str, Any], config_name: str, choices: dict[str, Any]) -> Iterator[str]:
    """Yields the keys of each chosen option of a group: those of data, method, …"""
    for key in SCHEMAS[config_name].model_fields:
        node = plain.get(key)
        if not isinstance(node, dict) or "_target_" not in node:
            continue
        group = "net" if key in ("student", "teacher") else key
        option = choices.get(f"net@{key}" if group == "net" else key)
        comments = comments_of(CONF / group / f"{option}.yaml")
        schema = schema_of(key, node) if key in OBJECTS else None
        if schema is not None:
            comments |= {row.key: row.description for row in rows(schema) if row.key not in comments}
        known = SCHEMAS[config_name].model_fields[key].annotation
        meta = {name for kind in (known, *getattr(known, "__args__", ())) for name in getattr(kind, "model_fields", ())}
        shown = [str(name) for name in node if name not in meta and not str(name).startswith("_")]
        if shown:
            yield ""
            yield f"{key}: those of {'net@' + key if group == 'net' else key}={option}"
        for name in shown:
            yield from _row(f"{key}.{name}", node[name], comments.get(name, ""))


def _groups(groups: dict[str, list[str]], choices: dict[str, Any]) -> Iterator[str]:
    if groups:
        yield ""
        yield "Groups, of which one option each is chosen:"
    for group, options in groups.items():
        name = "net@student, net@teacher" if group == "net" else group
        chosen = " and ".join(str(v) for k, v in sorted(choices.items()) if k.split("@")[0] == group and v is not None)
        published = set(published_tables.experiments()) if group == "experiment" else set()
        shown = [o for o in options if o not in published and not re.search(r"(^|/)(_\w*|base)$", o)]
        yield from _wrap(f"  {name}" + (f" (here {chosen})" if chosen else ""), 2)
        yield from _wrap(", ".join(shown), 6)
        if published:
            yield from _wrap(f"{len(published)} more of published tables: litdistill reproductions list", 6)


def comments_of(file: Path) -> dict[str, str]:
    """Returns the comments beside the keys of a yaml file, by key."""
    found: dict[str, str] = {}
    last = None  # the key whose comment may go on
    for line in file.read_text().splitlines() if file.is_file() else ():
        if match := re.match(r"(\w+):.*?\s#\s(.*)", line):
            last = match[1]
            found[last] = match[2]
        elif last is not None and (match := re.match(r" {12,}# (.*)", line)):
            found[last] += f" {match[1]}"
        else:
            last = None
    return found


def _at(plain: Any, key: str) -> Any:
    """Returns the value of a dotted key; `ABSENT` where there is none."""
    for part in key.split("."):
        if not isinstance(plain, dict) or part not in plain:
            return ABSENT
        plain = plain[part]
    return plain


def _shown(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "{…}"
    return value if isinstance(value, str) and ("$" in value or value == "???") else literal(value)


def _row(key: str, value: Any, description: str) -> Iterator[str]:
    left = f"  {key}={_shown(value)}"
    text = textwrap.wrap(description, WIDTH - LEFT, break_long_words=False, break_on_hyphens=False)
    if len(left) >= LEFT - 1:
        yield from _wrap(left, 2)
        left = ""
    for line in text or [""]:
        if left or line:
            yield f"{left:<{LEFT}}{line}".rstrip()
        left = ""


def _wrap(text: str, indent: int, following: str | None = None) -> list[str]:
    space = " " * indent
    return textwrap.wrap(
        text.strip(),
        WIDTH,
        initial_indent=space,
        subsequent_indent=space if following is None else following,
        break_long_words=False,
        break_on_hyphens=False,
    )
