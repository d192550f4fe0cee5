"""The comments of `conf/` and docs/reference.md, made of the schema: `python scripts/reference.py` writes them."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from litdistill.config.schema import data, library, train
from litdistill.config.schema.check import SCHEMAS
from litdistill.config.schema.fields import Node
from litdistill.config.schema.reference import rows
from litdistill.utils.paths import CONF

# Files whose every key has the schema's text beside it. What stands in another file is a value of its own, or a remark on it.
FILES: dict[str, type[Node]] = {
    **{f"{command}.yaml": schema for command, schema in SCHEMAS.items() if command != "sweep"},
    "data/base.yaml": data.ImageData,
    "data/diabetes.yaml": data.Standardized,
    "data/multilabel.yaml": data.Standardized,
    "data/movie_reviews.yaml": data.Tokenized,
    "data/texts.yaml": data.Tokenized,
    "data/sounds.yaml": data.Sounds,
    "data/spoken_digits.yaml": data.SpokenDigits,
    "data/docstrings.yaml": data.Sequences,
    "data/token_sequences.yaml": data.Sequences,
    "data/digit_scenes.yaml": data.Scenes,
    "data/digit_scenes_masks.yaml": data.Scenes,
    "data/masks.yaml": data.Masks,
    "data/bccd.yaml": data.BloodCells,
    "data/coco.yaml": data.Coco,
    "data/voc.yaml": data.Voc,
    "data/breast_cancer.yaml": data.Standardized,
    "data/wine.yaml": data.Standardized,
    "data/table.yaml": data.Table,
    "sweep/base.yaml": train.SweepOptions,
    "trainer/auto.yaml": library.Trainer,
    "balance/auto.yaml": library.Balance,
    "balance/uncertainty.yaml": library.Uncertainty,
}
SECTIONS: tuple[tuple[str, str, type[Node]], ...] = (  # prefix of the keys, title, schema
    ("", "`litdistill train`: conf/train.yaml", train.Train),
    ("data.", "`data` of images: conf/data", data.ImageData),
    ("data.", "`data` of features: conf/data/diabetes.yaml", data.Standardized),
    ("data.", "`data` of texts: conf/data/movie_reviews.yaml, texts.yaml", data.Tokenized),
    ("data.", "`data` of sounds: conf/data/sounds.yaml", data.Sounds),
    ("data.", "`data=spoken_digits`", data.SpokenDigits),
    ("data.", "`data` of token sequences: conf/data/docstrings.yaml, token_sequences.yaml", data.Sequences),
    ("data.", "`data=table`: a table of your own", data.Table),
    ("data.", "`data=digit_scenes`, `digit_scenes_masks`", data.Scenes),
    ("data.", "`data=masks`: pictures and masks of your own", data.Masks),
    ("data.", "`data=bccd`", data.BloodCells),
    ("data.", "`data=coco`: pictures with boxes of your own", data.Coco),
    ("data.", "`data=voc`", data.Voc),
    ("task.", "`task=classification`", library.Classification),
    ("task.", "`task=multilabel`", library.MultiLabel),
    ("task.", "`task=regression`", library.Regression),
    ("task.", "`task=segmentation`", library.Segmentation),
    ("balance.", "`balance=auto`", library.Balance),
    ("balance.", "`balance=uncertainty`", library.Uncertainty),
    ("compress.", "`compress`: low_rank, prune", library.Compression),
    ("optimizer.", "`optimizer`: any of torch.optim", library.Optimizer),
    ("scheduler.", "`scheduler`: any of torch.optim.lr_scheduler", library.Scheduler),
    ("trainer.", "`trainer`: Lightning's Trainer", library.Trainer),
    ("sweep.", "`litdistill sweep`: conf/sweep", train.SweepOptions),
    *(("", f"`litdistill {command}`", SCHEMAS[command]) for command in SCHEMAS if command not in ("train", "sweep")),
)
WIDTH = 128  # columns of a line of conf/
HEAD = """# Options

Every option of the commands: what it takes, its value where you set none, and what it is. `litdistill <verb> --help` shows them
too, and so do the files of `conf/`. An option that has no sense is refused in a line before anything is built. Objects
(`data`, a network, `method`, …) may be your own: `_target_` names the class, and its signature says what it takes. Those of the
methods are on [their own page](methods.md).
"""


def page() -> str:
    """Returns docs/reference.md."""
    return "\n".join([HEAD, *(line for section in SECTIONS for line in _section(*section))])


def _section(prefix: str, title: str, schema: type[Node]) -> Iterator[str]:
    values = _values(schema)
    yield from (f"## {title}", "", "| option | takes | default | |", "|---|---|---|---|")
    for row in rows(schema, prefix):
        value = values.get(row.key.removeprefix(prefix))
        cells = (f"`{row.key}`", row.takes, f"`{value}`" if value is not None else "", row.description)
        yield (
            "| "
            + " | ".join(
                cell.replace("|", "\\|").replace("<", "&lt;").replace("{_target_", "{\\_target\\_") for cell in cells
            )
            + " |"
        )
    yield ""


def _values(schema: type[Node]) -> dict[str, str]:
    """Returns the values of a schema's keys in its file of `conf/`, by dotted key."""
    file = next((name for name, known in FILES.items() if known is schema), None)
    return dict(_flat(yaml.safe_load((CONF / file).read_text()), "")) if file is not None else {}


def _flat(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            words = {None: "null", True: "true", False: "false"}
            yield f"{prefix}{key}", words[value] if value is None or isinstance(value, bool) else str(value)


def commented(file: str) -> str:
    """Returns a file of `conf/` with the schema's text beside each key."""
    texts = {row.key: row.description for row in rows(FILES[file])}
    kept: list[str] = []
    path: list[tuple[int, str]] = []  # indents and names of the keys around
    lines = (CONF / file).read_text().splitlines()
    column = _column(lines)
    continues = False
    for line in lines:
        match = re.match(r"( *)([\w]+):", line)
        if match is None:
            if not (continues and re.match(r" {12,}#", line)):  # the rest of a comment
                kept.append(line)
                continues = False
            continue
        indent = len(match[1])
        path = [*((i, name) for i, name in path if i < indent), (indent, match[2])]
        text = texts.get(".".join(name for _, name in path))
        continues = text is not None
        kept += [line] if text is None else _beside(line, text, column)
    return "\n".join(kept) + "\n"


def _column(lines: list[str]) -> int:
    """Returns the column at which most comments of a file begin."""
    found = Counter(match.end() for line in lines if (match := re.match(r" *\w+:.*? +(?=# )", line)))
    return found.most_common(1)[0][0] if found else 24


def _beside(line: str, text: str, column: int) -> list[str]:
    """Returns a line with a comment beside its key, and the lines on which the comment goes on."""
    code = re.split(r"\s+# ", line)[0].rstrip()
    start = f"{code:<{column}}# " if len(code) < column - 1 else f"{code}  # "
    following = " " * column + "# "
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
