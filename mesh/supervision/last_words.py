"""What a program said last: of one that has failed or is not READY it tells why."""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.rundir import RunDir
    from mesh.supervision.supervisord import ProcessInfo

_LOG_TAIL_BYTES = 16 * 1024
#: Moment and words of a line in an agent's log, without the count of others like it.
_WARNING = re.compile(
    r"(\S+) (?:WARNING|ERROR|CRITICAL) agent=\S+ \S+: (.*?)(?: \(\d+ more like this\))?$"
)


def last_words(rundir: RunDir, program: ProcessInfo) -> str:
    """Give the last line a failed program printed, or what supervisord says of it."""
    if printed := last_printed(rundir, program.name):
        return printed
    if program.spawn_error:
        return program.spawn_error
    if program.state in ("STARTING", "RUNNING"):
        return "was started again, and has not printed a word"
    return f"ended at once with exit code {program.exit_status}, without a word"


def last_printed(rundir: RunDir, name: str) -> str:
    """Give the last line that a program printed; nothing when there is none."""
    for path in (rundir.output(name), *_files_by_itself(rundir, name)):
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace")
            # The frame that Python draws around the errors of a group says nothing
            lines = [words for line in text.splitlines() if (words := line.strip(" \t|+-"))]
            if lines:
                return lines[-1]
    return ""


def _files_by_itself(rundir: RunDir, name: str) -> list[Path]:
    """Give the files that supervisord makes for a program which names none; errors come first."""
    folder = rundir.path / "log"
    return [
        path for stream in ("stderr", "stdout") for path in folder.glob(f"{name}-{stream}---*.log")
    ]


def last_warning(rundir: RunDir, program: ProcessInfo) -> str:
    """Give the last warning or error that a program has logged since its start; else nothing."""
    try:
        with rundir.log(program.name).open("rb") as file:
            file.seek(-min(_LOG_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    # As log lines say it, in the seconds that supervisord's clock shows
    began = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(program.started_at_s))
    for line in reversed(lines):
        found = _WARNING.match(line)
        if found is not None:
            return found[2] if found[1] >= began else ""
    return ""
