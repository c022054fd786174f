"""What several commands need: where the project is, how to draw a table, how to be a guest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from mesh.errors import MeshError
from mesh.rundir import RunDir

NO_MESH = 3
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class NoMeshError(MeshError):
    """No mesh runs in this directory."""

    exit_code = NO_MESH

    def __init__(self, rundir: RunDir) -> None:
        """Name the directory and the command that helps."""
        super().__init__(f"no mesh runs in {rundir.path}; start one with `mesh up`")


def project() -> Path:
    """
    Give the project: here or above where a supervisord.conf is, else where this package came from.

    A checkout's `scripts/run` may be called from anywhere.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "supervisord.conf").is_file():
            return folder
    home = Path(__file__).resolve().parent.parent.parent
    return home if (home / "supervisord.conf").is_file() else here


def rundir() -> RunDir:
    """Give the run directory: MESH_DIR, else `.mesh` in the project."""
    import os

    return RunDir(os.environ.get("MESH_DIR") or project() / ".mesh")


def clean(text: object) -> str:
    """Make text safe to print: control characters cannot drive the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))


def echo_json(value: Any) -> None:
    """Print one JSON object, and nothing else."""
    click.echo(json.dumps(value, default=str))


def print_table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Draw a table in a terminal; in a pipe, columns of plain text that a script can cut."""
    console = Console(soft_wrap=True)
    if console.is_terminal:
        table = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*[_coloured(cell) for cell in row])
        console.print(table)
        return
    widths = [max(len(str(cell)) for cell in column) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        click.echo("  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


_COLOURS = {
    "ready": "green",
    "ok": "green",
    "starting": "yellow",
    "draining": "yellow",
    "warn": "yellow",
    "silent": "red",
    "failed": "red",
    "fail": "red",
}


def _coloured(cell: str) -> str:
    from rich.markup import escape

    colour = _COLOURS.get(cell)
    return f"[{colour}]{cell}[/]" if colour else escape(cell)
