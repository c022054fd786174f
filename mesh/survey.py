"""
Asks agents' scripts what they hear: ``python -m mesh.survey agents/risk.py ...`` prints JSON.

Each script is loaded in a fork of its own, within a time limit: one that raises, ends, hangs or
changes what others see harms nobody.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

import msgspec

from mesh.config import MessageBusConfig
from mesh.events import is_durable, set_delivery
from mesh.runtime import load_script
from mesh.supervision.declaring import Finding

#: For all scripts together.
_LIMIT_S = 20.0


def survey(scripts: list[str], limit_s: float = _LIMIT_S) -> list[Finding]:
    """
    Load scripts, each in a process of its own, and give what they say.

    Args:
        scripts: Their paths.
        limit_s: How long all of them may take.
    """
    asked = {script: _ask(script) for script in scripts}
    ends_s = time.monotonic() + limit_s
    return [_answer(script, *asked[script], ends_s) for script in scripts]


def _ask(script: str) -> tuple[int, int]:
    """Start one; gives its pid and where its answer comes."""
    here, there = os.pipe()
    pid = os.fork()
    if pid:
        os.close(there)
        return pid, here
    code = 1
    try:
        os.close(here)
        # What a script prints is no answer
        silence = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silence, descriptor)
        answer = msgspec.json.encode(_look_at(script))
        while answer:
            answer = answer[os.write(there, answer) :]
        code = 0
    finally:
        # Whatever was raised: nothing of the parent's is to be done here
        os._exit(code)


def _look_at(script: str) -> Finding:
    try:
        kind = load_script(script)
        durable = tuple(filter(is_durable, kind.hears()))
    except BaseException as error:  # noqa: BLE001 - also a script that calls exit()
        return Finding(script=script, problem=f"{type(error).__name__}: {error}")
    return Finding(script=script, durable=durable, start=kind.start)


def _answer(script: str, pid: int, here: int, ends_s: float) -> Finding:
    """Read one's answer, and end it."""
    parts: list[bytes] = []
    while select.select([here], [], [], max(0.0, ends_s - time.monotonic()))[0]:
        part = os.read(here, 65536)
        if not part:
            break
        parts.append(part)
    os.close(here)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        return msgspec.json.decode(b"".join(parts), type=Finding)
    except msgspec.MsgspecError:
        return Finding(script=script, problem="it ended, or did not end, without an answer")


def main() -> int:
    """Answer for the scripts that are named; returns the exit code."""
    config = MessageBusConfig.from_env()
    set_delivery(config.durable_events, config.allow_downgrade)
    sys.stdout.buffer.write(msgspec.json.encode(survey(sys.argv[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
