"""Small files that are there whole or not at all, and errors that name them."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name a file: that of a failed write does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_new(path: Path, text: str) -> None:
    """
    Write a file that is not there yet; when that fails, it still is not.

    Raises:
        FileExistsError: It is there already, and is left as it is.
        OSError: It cannot be written; names the file.
    """
    with naming(path):
        file = path.open("x")
        try:
            with file:
                file.write(text)
        except BaseException:
            path.unlink()
            raise


def replace_file(path: Path, text: str) -> None:
    """
    Write a file in one step, with the mode of the one it replaces, which stays when that fails.

    Raises:
        OSError: It cannot be written; names the file.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path):
        try:
            draft.write_text(text)
            with contextlib.suppress(FileNotFoundError):
                draft.chmod(stat.S_IMODE(path.stat().st_mode))
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
