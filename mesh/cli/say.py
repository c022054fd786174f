"""
How commands speak: tables and colour in a terminal, plain text in a pipe, words on stderr.

What comes from events and logs is cleaned of control characters before a terminal sees it.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.live import Live
    from rich.table import Table

Colour = Literal["green", "yellow", "red", "dim", ""]

#: Wider than any table.
_ANY_WIDTH = 100_000
# C0 but tab and newline, DEL, C1, and the marks that turn the direction of writing
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


def clean(text: str) -> str:
    """Show control characters as escapes, so that content cannot command the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def is_terminal(stream: TextIO | None = None) -> bool:
    """Say whether somebody looks: stdout, or the given stream, is a terminal."""
    return (stream or sys.stdout).isatty()


def line(text: str = "", colour: Colour = "") -> None:
    """Print a line on stdout."""
    click.echo(_coloured(clean(text), colour))


def note(text: str, colour: Colour = "") -> None:
    """Print a line on stderr: progress, warnings, errors. That nobody reads them stops nothing."""
    with contextlib.suppress(BrokenPipeError):
        click.echo(_coloured(clean(text), colour), err=True)


def as_json(value: Any, *, compact: bool = False) -> None:
    """Print a value as JSON on stdout."""
    click.echo(json.dumps(value, default=str, indent=None if compact else 2))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], colours: Sequence[Colour] = ()
) -> None:
    """
    Print a table on stdout.

    Args:
        columns: Their heads.
        rows: The cells; None is shown as ``-``.
        colours: One a row, for terminals.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if is_terminal():
        from rich.console import Console

        Console().print(rich_table(columns, cells, colours))
        return
    widths = [max(len(cell) for cell in column) for column in zip(columns, *cells, strict=True)]
    for row in ([name.upper() for name in columns], *cells):
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def rich_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], colours: Sequence[Colour] = ()
) -> Table:
    """Make the table that a terminal shows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        # A word too long for the terminal goes on in the next line: nothing is cut away
        made.add_column(name, overflow="fold")
    for number, row in enumerate(rows):
        style = colours[number] if number < len(colours) else ""
        made.add_row(*(Text(_cell(value)) for value in row), style=style or None)
    return made


def has_room(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bool:
    """Say whether the terminal shows a table without breaking a cell into several lines."""
    from rich.console import Console

    needs = Console(width=_ANY_WIDTH).measure(rich_table(columns, rows)).maximum
    return needs <= Console().width


def begin_live(*, auto_refresh: bool = True) -> Live | None:
    """Begin a display on stderr that is drawn anew and leaves no trace; None: nobody looks."""
    if not is_terminal(sys.stderr):
        return None
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(stderr=True), transient=True, auto_refresh=auto_refresh)
    live.start()
    return live


def duration(seconds: float) -> str:
    """Show a time span in one or two units."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24}h"


def counted(count: int, one: str, many: str = "") -> str:
    """Show a number of things: ``1 event``, ``2 events``; `many` where an s does not make it."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def size(count: float) -> str:
    """Show bytes in one unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def micros(value: float | None) -> str:
    """Show a time given in microseconds, in the unit that it fills."""
    if value is None:
        return "-"
    if value < 999.5:
        return f"{value:.0f}us"
    if value < 999_500:
        return f"{value / 1e3:.1f}ms" if value < 9_950 else f"{value / 1e3:.0f}ms"
    return f"{value / 1e6:.1f}s"


def _cell(value: object) -> str:
    return "-" if value is None else clean(str(value))


def _coloured(text: str, colour: Colour) -> str:
    # click takes the colour away again where the stream is no terminal
    if colour == "dim":
        return click.style(text, dim=True)
    return click.style(text, fg=colour) if colour else text
