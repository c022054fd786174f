"""
The door to supervisord: XML-RPC over its Unix socket, with a time limit on every call.

supervisor's own transport knows no time limit and is not safe across threads; this is a connection
a call on the loop, with the standard library's XML-RPC marshalling.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import xmlrpc.client
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mesh.errors import ConfigurationError, MeshError

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 2.0
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}(@[0-9]{1,2})?", re.ASCII)
#: supervisor.xmlrpc.Faults.NOT_RUNNING
NOT_RUNNING = 70
#: supervisor.xmlrpc.Faults.CANT_REREAD
_CANT_REREAD = 92
_MAX_ANSWER_BYTES = 16 * 1024 * 1024
#: supervisord respawns at the next turn of its loop, in a second at most; its clock shows seconds.
_RESPAWN_S = 3.0
#: The kernel's struct ucred: pid, user, group.
_UCRED = struct.Struct("3i")


class SupervisorError(MeshError):
    """
    supervisord refused a call.

    Args:
        message: What was asked and what it said.
        code: Its fault code, such as 10 for an unknown program; 0 without one.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        """Keep the code apart."""
        self.code = code
        super().__init__(message)


class SupervisorUnavailableError(SupervisorError):
    """Nobody answers on supervisord's socket."""


class SupervisorSilentError(SupervisorUnavailableError):
    """supervisord is there and does not answer in time: stopped, or on an overloaded host."""


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One program as supervisord sees it."""

    name: str
    #: STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL or UNKNOWN.
    state: str
    pid: int
    exit_status: int
    spawn_error: str
    #: Seconds since 1970; 0: never.
    started_at_s: float
    stopped_at_s: float
    #: supervisord's clock when it was asked.
    asked_at_s: float = 0.0

    @property
    def has_given_up(self) -> bool:
        """Say whether supervisord will not start it again by itself."""
        if self.state == "EXITED":
            # For a moment this is the state of one that was killed and is about to be respawned
            unexpected = bool(self.spawn_error)
            return not unexpected or self.asked_at_s - self.stopped_at_s > _RESPAWN_S
        return self.state in ("FATAL", "STOPPED")


class SupervisorClient:
    """
    Calls one supervisord.

    Args:
        socket_path: Its Unix socket.
    """

    def __init__(self, socket_path: Path) -> None:
        """Connect to nothing yet."""
        self._path = socket_path

    async def is_up(self) -> bool:
        """Say whether supervisord answers."""
        try:
            await self._call("getState")
        except SupervisorError:
            return False
        return True

    async def pid(self) -> int:
        """Give supervisord's pid."""
        return int(await self._call("getPID"))

    async def processes(self) -> list[ProcessInfo]:
        """List the programs; each call also wakes supervisord, which else turns once a second."""
        return [
            ProcessInfo(
                name=row["name"],
                state=row["statename"],
                pid=row["pid"],
                exit_status=row["exitstatus"],
                spawn_error=row["spawnerr"],
                started_at_s=row["start"],
                stopped_at_s=row["stop"],
                asked_at_s=row["now"],
            )
            for row in await self._call("getAllProcessInfo")
        ]

    async def start(self, name: str) -> None:
        """Start a program; returns before it runs."""
        await self._call("startProcess", _checked(name), False)

    async def stop(self, name: str, timeout_s: float = 15.0) -> None:
        """Stop a program and wait until it has ended; one that does not run is left alone."""
        try:
            await self._call("stopProcess", _checked(name), True, timeout_s=timeout_s)
        except SupervisorError as error:
            if error.code != NOT_RUNNING:
                raise

    async def signal(self, name: str, signal_name: str) -> None:
        """Send a signal (``ABRT``, ``KILL``, ...) to a program's process."""
        await self._call("signalProcess", _checked(name), signal_name)

    async def shutdown(self) -> None:
        """Stop everything and end supervisord; returns before it has ended."""
        await self._call("shutdown")

    async def reload(self) -> tuple[list[str], list[str], list[str]]:
        """
        Read the configuration again; gives the added, changed and removed programs.

        Raises:
            ConfigurationError: supervisord cannot, and goes on with what it has.
        """
        try:
            ((added, changed, removed),) = await self._call("reloadConfig")
        except SupervisorError as error:
            if error.code == _CANT_REREAD:
                raise ConfigurationError(str(error)) from None
            raise
        return added, changed, removed

    async def add(self, name: str) -> None:
        """Take up a program that `reload` found; it starts by itself."""
        await self._call("addProcessGroup", _checked(name))

    async def remove(self, name: str) -> None:
        """Forget a stopped program."""
        await self._call("removeProcessGroup", _checked(name))

    async def _call(self, method: str, *arguments: Any, timeout_s: float = TIMEOUT_S) -> Any:
        body = xmlrpc.client.dumps(arguments, f"supervisor.{method}").encode()
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._post(body)
        except TimeoutError:
            pid = _pid_behind(self._path)
            who = f"supervisord (pid {pid})" if pid else "supervisord"
            raise SupervisorSilentError(
                f"{who} on {self._path} did not answer {method} within {timeout_s:g} s: it is"
                f" stopped or busy; try again, or end it with its agents: kill -9 {pid or 'PID'}"
            ) from None
        except (OSError, asyncio.IncompleteReadError) as error:
            raise SupervisorUnavailableError(
                f"no supervisord answers on {self._path} ({error}); start one with `mesh up`"
            ) from error
        try:
            (result,), _ = xmlrpc.client.loads(answer)
        except xmlrpc.client.Fault as fault:
            words = ", ".join(str(each) for each in (method, *arguments))
            raise SupervisorError(
                f"supervisord: {fault.faultString} ({words})", fault.faultCode
            ) from None
        return result

    async def _post(self, body: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self._path))
        try:
            writer.write(
                b"POST /RPC2 HTTP/1.1\r\nHost: mesh\r\nContent-Type: text/xml\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length:\s*(\d+)", head, re.IGNORECASE)
            if not head.startswith(b"HTTP/1.1 200") or length is None:
                raise OSError(head.split(b"\r\n", 1)[0].decode("latin-1"))
            size = int(length[1])
            if size > _MAX_ANSWER_BYTES:
                raise OSError(f"an answer of {size} bytes")
            return await reader.readexactly(size)
        finally:
            writer.close()


def _pid_behind(path: Path) -> int | None:
    """Ask the kernel who listens on a Unix socket; None when it does not say."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
            owner = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        except OSError:
            return None
    pid: int = _UCRED.unpack(owner)[0]
    return pid


def _checked(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise SupervisorError(f"{name!r} is no program name: use A-Z a-z 0-9 _ . -, at most 64")
    return name
