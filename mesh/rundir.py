"""
The run directory: everything of one mesh - sockets, locks, logs, ledgers - lives under MESH_DIR.

Several meshes run side by side, each in a directory of its own. The directory is private (mode
0700): ipc sockets accept any local peer that can reach them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mesh.env import journal_name, mesh_dir
from mesh.errors import AlreadyRunningError, RunDirError
from mesh.files import naming

if TYPE_CHECKING:
    from types import TracebackType

#: What a Unix socket address holds, without the final zero.
MAX_SOCKET_PATH = 107
_LONGEST_SOCKET = "supervisor.sock.99999999"
# Open-file-description locks: like flock(2) they end with their holder, and unlike flock(2) one can
# ask for the holder without taking the lock for a moment and disturbing somebody who starts
_FLOCK = "hhqqi4x"
_WHOLE_FILE = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
_JOURNAL = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_FOLDERS = ("run", "log", "stacks", "ledger", "agents", "conf", "journal")


class Lock:
    """A held lock: ends with the process, at the latest."""

    def __init__(self, descriptor: int, path: Path) -> None:
        """Take over a locked descriptor."""
        self._descriptor: int | None = descriptor
        self.path = path

    def release(self) -> None:
        """Let go; can be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        """Hold."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go."""
        self.release()


class RunDir:
    """
    The paths of one mesh.

    Args:
        path: The directory; made by `ensure`.

    Raises:
        RunDirError: Its name is no text.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Touch nothing."""
        self.path = Path(path).expanduser().absolute()
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            shown = os.fsencode(self.path).decode(errors="backslashreplace")
            raise RunDirError(
                f"MESH_DIR={shown}: is no UTF-8, and could be written neither in a log nor in a"
                " configuration; use another path"
            ) from None

    @classmethod
    def from_env(cls) -> RunDir:
        """Use MESH_DIR, or `.mesh` in the current directory."""
        return cls(mesh_dir())

    def __repr__(self) -> str:
        """Show the path."""
        return f"RunDir({str(self.path)!r})"

    def ensure(self) -> Self:
        """
        Make the directory and its folders, or check the one that is there.

        Raises:
            RunDirError: It is a link, somebody else's, open to others, or its path is too long.
        """
        self._check_length()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_private()
            for folder in _FOLDERS:
                (self.path / folder).mkdir(mode=0o700, exist_ok=True)
        except FileExistsError as error:
            raise RunDirError(f"MESH_DIR={self.path}: {error.filename} is no directory") from error
        except OSError as error:
            raise RunDirError(
                f"MESH_DIR={self.path}: {error.strerror}: {error.filename}"
            ) from error
        return self

    def socket(self, name: str) -> Path:
        """Give a socket's path."""
        return self.path / "run" / f"{name}.sock"

    def lock(self, name: str) -> Path:
        """Give a lock file's path."""
        return self.path / "run" / f"{name}.lock"

    def journal(self, name: str | None = None) -> Path:
        """
        Give the file in which durable events and dead letters are kept; default MESH_JOURNAL.

        Raises:
            RunDirError: That is no name of a file in the directory.
        """
        chosen = name or journal_name()
        if _JOURNAL.fullmatch(chosen) is None:
            raise RunDirError(
                f"MESH_JOURNAL={chosen}: must be 1 to 64 characters of A-Z a-z 0-9 _ -"
            )
        return self.path / "journal" / f"{chosen}.sqlite"

    def replayed(self, group: str, name: str | None = None) -> Path:
        """Give the file that is there once dead letters of a group were replayed."""
        return self.journal(name).with_suffix(f".replayed.{group}")

    def log(self, name: str) -> Path:
        """Give an agent's log file."""
        return self.path / "log" / f"{name}.log"

    def output(self, name: str) -> Path:
        """Give the file where supervisord keeps a program's stdout and stderr."""
        return self.path / "log" / f"{name}.out"

    def stack(self, name: str, pid: int) -> Path:
        """Give the file for a process's stacks at its end."""
        return self.path / "stacks" / f"{name}.{pid}.txt"

    def ledger(self, name: str) -> Path:
        """Give an agent's ledger."""
        return self.path / "ledger" / name

    @property
    def fabric(self) -> Path:
        """What joins the mesh that was started last, in words."""
        return self.path / "run" / "fabric"

    @property
    def ledgers(self) -> Path:
        """Give the folder of all ledgers."""
        return self.path / "ledger"

    def card(self, name: str) -> Path:
        """Give the file in which an agent says what it is."""
        return self.path / "agents" / f"{name}.json"

    def acquire(self, path: Path, note: str = "") -> Lock:
        """
        Lock a file for this process, for as long as it lives.

        Args:
            path: A lock file of this directory.
            note: A word kept beside the pid, such as ``adhoc`` or ``supervised``.

        Raises:
            AlreadyRunningError: Another process holds it; carries its pid.
            OSError: It cannot be written; names the file.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise AlreadyRunningError(f"{path.name} in {self.path}", self.holder(path)) from None
        lock = Lock(descriptor, path)
        # At no moment empty: others read it, too
        words = f"{os.getpid()} {note}".strip().encode() + b"\n"
        try:
            with naming(path):
                os.pwrite(descriptor, words, 0)
                os.ftruncate(descriptor, len(words))
        except OSError:
            lock.release()
            raise
        return lock

    def holder(self, path: Path) -> int | None:
        """Give the pid of the process that holds a lock; None when nobody does."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _WHOLE_FILE)
            if struct.unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK:
                return None
            words = os.read(descriptor, 64).split()
            return int(words[0]) if words and words[0].isdigit() else 0
        finally:
            os.close(descriptor)

    def note(self, path: Path) -> str:
        """Give the note beside the pid in a lock file; empty when there is none."""
        try:
            words = path.read_text().partition("\n")[0].split()
        except OSError:
            return ""
        return words[1] if len(words) > 1 else ""

    def supervisor_pid(self) -> int | None:
        """Give the pid that this directory's supervisord wrote down; it may be gone by now."""
        try:
            return int((self.path / "run" / "supervisord.pid").read_text())
        except (OSError, ValueError):
            return None

    def _check_length(self) -> None:
        longest = len(os.fsencode(self.path / "run" / _LONGEST_SOCKET))
        if longest > MAX_SOCKET_PATH:
            spare = MAX_SOCKET_PATH - (longest - len(os.fsencode(self.path)))
            raise RunDirError(
                f"MESH_DIR={self.path}: {len(os.fsencode(self.path))} bytes are too many for Unix"
                f" sockets, at most {spare} fit; use a shorter path, such as one under /tmp"
            )

    def _check_private(self) -> None:
        facts = self.path.lstat()
        if stat.S_ISLNK(facts.st_mode):
            raise RunDirError(
                f"MESH_DIR={self.path}: is a symbolic link; name the directory itself"
            )
        if not stat.S_ISDIR(facts.st_mode):
            raise RunDirError(f"MESH_DIR={self.path}: is no directory")
        if facts.st_uid != os.geteuid():
            raise RunDirError(
                f"MESH_DIR={self.path}: belongs to user {facts.st_uid}, not to you"
                f" ({os.geteuid()}); use a directory of your own"
            )
        mode = stat.S_IMODE(facts.st_mode)
        if mode & 0o077:
            raise RunDirError(
                f"MESH_DIR={self.path}: mode {mode:04o} lets others in; run `chmod 700 {self.path}`"
            )
