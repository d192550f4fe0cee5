"""The blocks of a page, and its two writers: one list of sections becomes index.html and report.md."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from litdistill.utils.files import write_atomically, write_text


class Text(NamedTuple):
    text: str


class Code(NamedTuple):
    text: str


class Table(NamedTuple):
    """Cells are text; the columns `left` are left-aligned, and the first column is sticky. `marked`: rows to warn of."""

    id: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    marked: Sequence[int] = ()


class Picture(NamedTuple):
    """An SVG figure and its alternative text."""

    name: str
    svg: str
    alt: str


class Thumb(NamedTuple):
    """A small raster image (PNG)."""

    name: str
    png: bytes
    caption: str

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


class Grid(NamedTuple):
    """Small figures side by side, as many as fit the width."""

    pictures: Sequence[Picture]
    wide: bool = False


class Thumbs(NamedTuple):
    title: str
    thumbs: Sequence[Thumb]
    large: bool = False  # pictures with something small in them


class Link(NamedTuple):
    text: str
    href: str


class Fold(NamedTuple):
    """Texts that are folded away on a screen until somebody opens them, and open on paper."""

    title: str
    texts: Sequence[str]


class Card(NamedTuple):
    """What a reader sees first: whom it is about, and figures with a few words for each."""

    title: str
    figures: Sequence[tuple[str, str]]
    note: str


class Warn(NamedTuple):
    """A finding that makes figures doubtful."""

    text: str


Block = Text | Code | Table | Picture | Grid | Thumbs | Link | Fold | Card | Warn


class Section(NamedTuple):
    """A part of the page; a `chapter` opens a data set, and the sections up to the next one belong to it."""

    id: str
    title: str
    blocks: Sequence[Block]
    chapter: bool = False


def write(title: str, facts: Sequence[str], sections: Sequence[Section], out: Path) -> None:
    """Writes `out`/index.html, which needs no other file, and `out`/report.md with its pictures in `out`/pictures.

    Where `out` ends in .html, it is the page, and nothing else is written.
    """
    if out.suffix == ".html":
        write_text(out, html_page(title, facts, sections))
        return
    write_text(out / "index.html", html_page(title, facts, sections))
    write_text(out / "report.md", markdown_page(title, facts, sections))
    for section in sections:
        for block in section.blocks:
            for picture in _pictures(block):
                write_text(out / "pictures" / f"{picture.name}.svg", _on_paper(picture.svg))
            for thumb in block.thumbs if isinstance(block, Thumbs) else ():
                write_atomically(out / "pictures" / f"{thumb.name}.png", partial(_write_bytes, thumb.png))


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def html_page(title: str, facts: Sequence[str], sections: Sequence[Section]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # Only SVG figures are not escaped: matplotlib wrote them and escaped their texts.
    environment.filters["kind"] = lambda block: type(block).__name__.lower()
    environment.filters["drawing"] = lambda picture: Markup(_labeled(picture))
    environment.filters["parts"] = _parts
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(title=title, facts=facts, sections=sections) + "\n"


def _parts(sections: Sequence[Section], section: Section) -> list[Section]:
    """Returns the sections of a chapter."""
    after = list(sections)[list(sections).index(section) + 1 :]
    return list(itertools.takewhile(lambda s: not s.chapter, after))


def _labeled(picture: Picture) -> str:
    """Returns the SVG with its alternative text for screen readers."""
    return picture.svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(picture.alt)}"', 1)


def _on_paper(svg: str) -> str:
    """Returns the SVG as a standalone file, with its own background and text color."""
    return svg.replace("<svg", '<svg style="background:#fff;color:#1a1a1a"', 1) + "\n"


def _pictures(block: Block) -> Sequence[Picture]:
    return [block] if isinstance(block, Picture) else block.pictures if isinstance(block, Grid) else []


# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown_page(title: str, facts: Sequence[str], sections: Sequence[Section]) -> str:
    lines = [f"# {plain(title)}", "", *(f"- {plain(fact)}" for fact in facts), ""]
    for section in sections:
        lines += [f"{'#' if section.chapter else '##'} {plain(section.title)}", ""]
        for block in section.blocks:
            lines += [*_markdown(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(block: Block) -> list[str]:
    if isinstance(block, Code):
        fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", block.text)), 3)
        return [f"{fence}bash", *block.text.splitlines(), fence]
    if isinstance(block, Table):
        line = "|" + "".join("---|" if i in block.left else "---:|" for i in range(len(block.head)))
        row = lambda cells: "| " + " | ".join(plain(c) for c in cells) + " |"  # noqa: E731
        return [row(block.head), line, *map(row, block.rows)]
    if isinstance(block, (Picture, Grid)):
        return [f"![{plain(p.alt)}](pictures/{p.name}.svg)" for p in _pictures(block)]
    if isinstance(block, Thumbs):
        shown = [f"![{plain(t.caption)}](pictures/{t.name}.png) {plain(t.caption)}" for t in block.thumbs]
        return [f"**{plain(block.title)}**", "", "; ".join(shown)]
    if isinstance(block, Link):
        return [f"[{plain(block.text)}]({block.href})"]
    if isinstance(block, Fold):
        return [line for text in block.texts for line in (plain(text), "")][:-1]
    if isinstance(block, Card):
        figures = ", ".join(f"**{plain(figure)}** {plain(words)}" for figure, words in block.figures)
        return [f"{plain(block.title)}: {figures}.", "", plain(block.note)]
    return [f"**{plain(block.text)}**" if isinstance(block, Warn) else plain(block.text)]


def plain(text: str) -> str:
    """Returns the text on one line, with Markdown and HTML escaped."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)
