"""A real redis-server of our own, on a Unix socket."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.plumbing.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping


def find_redis() -> str | None:
    """Give the path of redis-server: the machine's own, else the one scripts/test unpacked."""
    return shutil.which("redis-server") or shutil.which(
        "redis-server", path=Path(sys.prefix, "bin")
    )


class RedisServer:
    """
    A server in a short folder of its own, without a port; it ends with this process.

    Args:
        append_only: Keep every write on disk (`fsync` each): data survive `kill` and `start`.
        settings: Others, such as ``requirepass``.
        sentinel: Watch other servers instead of keeping data.
    """

    def __init__(
        self,
        *,
        append_only: bool = False,
        settings: Mapping[str, str] | None = None,
        sentinel: bool = False,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lgr-"))
        self.socket = self.folder / "redis.sock"
        self._append_only = append_only
        self._settings = settings or {}
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self, *, wait: bool = True) -> Self:
        """
        Start it.

        Args:
            wait: Return when it answers; it does not while it loads.
        """
        program = find_redis()
        assert program, "there is no redis-server"
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "logfile": str(self.folder / "redis.log"),
        }
        if not self._sentinel:
            settings |= {
                "save": "",
                "appendonly": "yes" if self._append_only else "no",
                "appendfsync": "always",
            }
        settings |= self._settings
        conf = self.folder / "redis.conf"
        if not conf.exists():
            # Kept over `kill` and `start`: sentinels and replicas write what they learn into it
            lines = (f"{name} {value or chr(34) * 2}" for name, value in settings.items())
            conf.write_text("\n".join(lines) + "\n")
        self._process = subprocess.Popen(
            [program, str(conf), *(["--sentinel"] if self._sentinel else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
        )
        if wait:
            self.wait_up()
        return self

    def wait_up(self) -> None:
        wait_until(self._answers, what=f"redis-server answers; see {self.folder}/redis.log")

    def kill(self) -> None:
        """End it as a power cut would; `start` brings it back."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        self._end(signal.SIGTERM)
        shutil.rmtree(self.folder)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(10.0)
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"redis-server ended with {self._process.returncode}"
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5.0)
            connection.connect(str(self.socket))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)
