"""`mesh logs`: what the agents wrote."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TextIO

import click

from mesh.cli.common import clean, rundir
from mesh.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

_LOOK_S = 0.2


@click.command()
@click.argument("names", nargs=-1)
@click.option("-f", "--follow", is_flag=True, help="Go on as they write.")
@click.option("-n", "lines", default=20, show_default=True, help="Lines of each to begin with.")
def logs(*, names: tuple[str, ...], follow: bool, lines: int) -> int:
    r"""
    Print the agents' logs, each line with its agent's name.

    \b
    mesh logs -f risk execution
    """
    folder = rundir().path / "log"
    known = {path.stem: path for path in sorted(folder.glob("*.log"))}
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigurationError(
            [f"no log of {name!r} in {folder}; there are {', '.join(known)}" for name in missing]
        )
    chosen = {name: known[name] for name in (names or known)}
    followed = [_Followed(path) for path in chosen.values()]
    last = [line for each in followed for line in each.last(lines)]
    for line in sorted(last, key=lambda line: line[:24]) if len(followed) > 1 else last:
        click.echo(clean(line))
    while follow:
        # Files that rotate are told apart by their inode; nothing portable wakes us for all of them
        for each in followed:
            for line in each.new():
                click.echo(clean(line))
        time.sleep(_LOOK_S)
    return 0


class _Followed:
    """One log file, through its rotations."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO = path.open(errors="replace")

    def last(self, count: int) -> list[str]:
        lines = self._file.read().splitlines()
        return lines[-count:] if count else []

    def new(self) -> list[str]:
        lines = self._file.read().splitlines()
        try:
            rotated = self._path.stat().st_ino != _inode(self._file)
        except FileNotFoundError:
            return lines
        if rotated:
            self._file.close()
            self._file = self._path.open(errors="replace")
            lines += self._file.read().splitlines()
        return lines


def _inode(file: TextIO) -> int:
    import os

    return os.fstat(file.fileno()).st_ino
