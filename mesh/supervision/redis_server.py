"""
A redis-server of the mesh's own, as a supervised program: ``mesh up --with-redis``.

``python -m mesh.supervision.redis_server`` runs it on a Unix socket in the run directory, with an
append-only file, and beats like any other program: a server that answers no more is found and
replaced like an agent that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mesh import process
from mesh.beats import BeatSender
from mesh.env import is_supervised
from mesh.errors import (
    EXIT_BUG,
    EXIT_CONFIGURATION,
    EXIT_LOCKED,
    AlreadyRunningError,
    ConfigurationError,
)
from mesh.ledger import STATES, Ledger
from mesh.logs import set_up_logging
from mesh.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.rundir import Lock

_log = logging.getLogger("mesh.redis")

#: The program's name in supervisord and in the logs.
PROGRAM = "redis"
_BEAT_S = 1.0
_LOOK_S = 0.02
_ANSWER_S = 2.0


def socket_of(rundir: RunDir) -> Path:
    """Give the socket of a mesh's own redis-server."""
    return rundir.socket(PROGRAM)


def settings_for(rundir: RunDir, environ: Mapping[str, str]) -> dict[str, str]:
    """Give the environment of those who use a mesh's own server: other Redis settings are gone."""
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith(("REDIS_", "LEGION_REDIS_"))
    }
    return {**kept, "LEGION_BROKER_TYPE": "redis", "REDIS_SOCKET": str(socket_of(rundir))}


def find_server() -> str | None:
    """Give the path of redis-server: on PATH, else beside this Python."""
    beside = str(Path(sys.prefix, "bin"))
    return shutil.which("redis-server") or shutil.which("redis-server", path=beside)


def _arguments(program: str, rundir: RunDir) -> list[str]:
    folder = rundir.path / "redis"
    folder.mkdir(mode=0o700, exist_ok=True)
    settings = {
        "port": "0",
        "unixsocket": str(socket_of(rundir)),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
        "daemonize": "no",
    }
    return [program, *(word for name, value in settings.items() for word in (f"--{name}", value))]


class _Server:
    """The child process and its beats."""

    def __init__(self, rundir: RunDir, ledger: Ledger) -> None:
        self._rundir = rundir
        self._ledger = ledger
        self._stop = asyncio.Event()

    async def run(self, program: str) -> int:
        """Run it until we are told to stop (0) or it ends by itself (70)."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        child = await asyncio.create_subprocess_exec(
            *_arguments(program, self._rundir),
            stdin=asyncio.subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )
        async with BeatSender(self._rundir, PROGRAM) as beats:
            ended = asyncio.create_task(child.wait(), name="redis-server")
            told = asyncio.create_task(self._stop.wait(), name="stop")
            beating = asyncio.create_task(self._beat(beats), name="beat")
            await asyncio.wait({ended, told}, return_when=asyncio.FIRST_COMPLETED)
            for task in (told, beating):
                task.cancel()
            await asyncio.gather(told, beating, return_exceptions=True)
            if not ended.done():
                child.send_signal(signal.SIGTERM)
                await ended
                return 0
        print(f"redis-server ended with exit code {child.returncode}", file=sys.stderr)  # noqa: T201
        return EXIT_BUG

    async def _beat(self, beats: BeatSender) -> None:
        """Beat for the server: only while it answers."""
        while not await self._answers():  # noqa: ASYNC110 - a socket that is not there wakes nobody
            await asyncio.sleep(_LOOK_S)
        self._ledger.set("ready_at_us", time.time_ns() // 1000)
        self._ledger.set("state", STATES.index("ready"))
        _log.info("redis-server answers at %s", socket_of(self._rundir))
        while True:
            if await self._answers():
                self._ledger.set("beat_mono_ms", int(time.monotonic() * 1000))
                beats.send(beats.make(state="ready"))
            await asyncio.sleep(_BEAT_S)

    async def _answers(self) -> bool:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(str(socket_of(self._rundir)))
                try:
                    writer.write(b"PING\r\n")
                    return (await reader.readline()) == b"+PONG\r\n"
                finally:
                    writer.close()
                    await writer.wait_closed()
        return False


def _end_with_parent() -> None:
    """Ask the kernel for SIGTERM when we die: no orphan keeps the socket."""
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)


def _run(rundir: RunDir, lock: Lock, program: str) -> int:
    with lock:
        close_log = set_up_logging(PROGRAM, rundir.log(PROGRAM))
        ledger = Ledger.open(rundir.ledger(PROGRAM))
        try:
            return asyncio.run(_Server(rundir, ledger).run(program))
        finally:
            ledger.set("state", STATES.index("stopped"))
            close_log()
            process.drop_empty_stacks()


def main() -> int:
    """Run the server of MESH_DIR; returns the exit code."""
    try:
        rundir = RunDir.from_env().ensure()
        program = find_server()
        if program is None:
            raise ConfigurationError(
                "no redis-server on PATH; install one, or name one by REDIS_URL"
            )
        process.prepare(rundir, PROGRAM, parent_bound=is_supervised())
        lock = process.only_incarnation(rundir, PROGRAM)
    except ConfigurationError as error:
        print(error, file=sys.stderr)  # noqa: T201 - before there is a log
        return EXIT_CONFIGURATION
    except AlreadyRunningError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return EXIT_LOCKED
    return _run(rundir, lock, program)


if __name__ == "__main__":
    sys.exit(main())
