"""supervisord's logs on a full disk: its own handlers, and writes that fail with ENOSPC."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from supervisor import loggers

from mesh.supervision import full_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

_METHODS = {
    loggers.Handler: ("emit", "handleError", "close"),
    loggers.FileHandler: ("reopen",),
    loggers.RotatingFileHandler: ("doRollover",),
}


@pytest.fixture
def own_log(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Take the plug-in up for this test; gives what stands for supervisord's own log."""
    for kind, names in _METHODS.items():
        for name in names:
            monkeypatch.setattr(kind, name, getattr(kind, name))
    monkeypatch.setattr(loggers.Handler, "failed", 0, raising=False)
    logger = loggers.getLogger()
    loggers.handle_boundIO(logger, "%(message)s")
    full_disk.patch(logger)
    return logger


@pytest.fixture
def log(tmp_path: Path, own_log: Any) -> Iterator[Any]:
    """Give the log of a program that is rolled over at 50 bytes."""
    logger = loggers.getLogger()
    path = str(tmp_path / "risk.out")
    loggers.handle_file(logger, path, "%(message)s", rotating=True, maxbytes=50, backups=1)
    yield logger
    logger.close()


@contextlib.contextmanager
def full_stderr() -> Iterator[None]:
    """Let stderr be a file on the full disk, as it is with `mesh up -d`."""
    stream = open("/dev/full", "w", buffering=1)
    try:
        # In the test itself: pytest puts its own in place between a fixture and a test
        with contextlib.redirect_stderr(stream):
            yield
    finally:
        with contextlib.suppress(OSError):
            stream.close()


@contextlib.contextmanager
def no_room(log: Any) -> Iterator[None]:
    """Let a log's file and stderr be on a full disk for a while."""
    descriptor = log.handlers[0].stream.fileno()
    kept = os.dup(descriptor)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    os.close(full)
    try:
        with full_stderr():
            yield
    finally:
        # It may have been closed, and its number be another file's by now
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == "/dev/full":
            os.dup2(kept, descriptor)
        os.close(kept)


def text_of(log: Any) -> str:
    path = Path(log.handlers[0].baseFilename)
    older = path.with_name(f"{path.name}.1")
    return (older.read_text() if older.exists() else "") + path.read_text()


def test_a_log_waits_for_room_and_goes_on(log: Any, own_log: Any) -> None:
    log.info(b"before\n")
    with no_room(log):
        log.info(b"in the middle\n")
        log.info(b"of it\n")

        assert text_of(log) == "before\n"
        assert own_log.getvalue() == b""

    log.info(b"after\n")

    assert text_of(log) == "before\nin the middle\nof it\nafter\n"
    (told,) = own_log.getvalue().decode().splitlines()
    assert "risk.out" in told
    assert "writes that failed: 2," in told


def test_more_than_fits_into_memory_is_lost_and_nothing_else(log: Any, own_log: Any) -> None:
    log.info(b"before\n")
    with no_room(log):
        for _ in range(100):
            log.info(b"x" * 1000)

    log.info(b"after\n")
    log.info(b"and after that\n")

    assert text_of(log).startswith("before\n" + "x" * 1000)
    assert text_of(log).endswith("after\nand after that\n")
    assert own_log.getvalue().decode().count("risk.out") == 1


def test_a_log_that_is_due_is_rolled_over_when_there_is_room(log: Any) -> None:
    with no_room(log):
        for _ in range(3):
            log.info(b"y" * 40 + b"\n")

    log.info(b"last\n")
    log.info(b"first\n")

    path = Path(log.handlers[0].baseFilename)
    assert path.with_name("risk.out.1").read_text().endswith("y\nlast\n")
    assert path.read_text() == "first\n"


@pytest.mark.parametrize("call", ["reopen", "remove"])
def test_logs_can_be_cleared_and_opened_anew_meanwhile(log: Any, call: str) -> None:
    """SIGUSR2 and `supervisorctl clear`; what was held back is lost with the file."""
    with no_room(log):
        log.info(b"lost\n")
        getattr(log.handlers[0], call)()
        log.handlers[0].reopen()

    log.info(b"after\n")

    assert text_of(log) == "after\n"


def test_a_file_that_cannot_be_opened_is_tried_again(log: Any, own_log: Any) -> None:
    """No inode is left, or the folder is gone for a while."""
    folder = Path(log.handlers[0].baseFilename).parent
    away = folder.with_name("away")
    folder.rename(away)
    with full_stderr():
        log.handlers[0].reopen()
        log.info(b"lost\n")
    away.rename(folder)

    log.info(b"after\n")

    assert text_of(log) == "after\n"
    assert "risk.out can be written again" in own_log.getvalue().decode()


def test_other_mistakes_are_told_where_they_can_be(log: Any) -> None:
    """A traceback as before, and no end of supervisord when stderr takes none."""
    with full_stderr():
        log.info("%(nothing)s", something=1)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        log.info("%(nothing)s", something=1)
    log.info(b"after\n")

    assert text_of(log) == "after\n"
    assert "KeyError" in said.getvalue()
