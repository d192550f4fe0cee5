"""Tables on a terminal of any width: nothing is cut off, and nothing left out in silence."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from litdistill.utils.text import printable

Row = Sequence[str]


def stdout(width: int) -> Console:
    """Returns a console of the terminal's width, and of `width` columns where the output goes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def tables(head: Row, rows: Sequence[Row], console: Console, title: str = "") -> list[Table]:
    """Returns rows as tables as wide as the console at most: the columns that have no room in one go on in the next.

    The first column stands in each of them, left-aligned; the others are figures. Cells are text, no markup; one that is
    wider than the console itself goes on in the next line.
    """
    found: list[Table] = []
    columns = list(range(1, len(head)))
    while columns:
        count = len(columns)
        while count > 1 and not _fits(_table(head, rows, columns[:count], title), console):
            count -= 1
        found.append(_table(head, rows, columns[:count], title))
        columns, title = columns[count:], ""
    return found


def show(head: Row, rows: Sequence[Row], console: Console, title: str = "") -> None:
    """Prints `tables`."""
    for table in tables(head, rows, console, title):
        console.print(table)


def _fits(table: Table, console: Console) -> bool:
    unlimited = console.options.update(width=10_000)
    return console.measure(table, options=unlimited).maximum <= console.width


def _table(head: Row, rows: Sequence[Row], columns: Sequence[int], title: str) -> Table:
    table = Table(title=Text(title, "bold") if title else None, title_justify="left")
    for i in (0, *columns):
        table.add_column(Text(head[i]), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(row[i])) for i in (0, *columns)))
    return table
