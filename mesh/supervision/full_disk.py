"""
Keeps supervisord alive on a full disk: its plug-in, ``[rpcinterface:full_disk]``.

As it comes, supervisord prints a traceback for each line that it cannot log, and ends when stderr,
which mostly goes to the same disk, cannot take that either: the whole mesh ends with it. A log that
could not be rolled over stays closed. Here logs wait for room, and supervisord's own says
afterwards which have missed something.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from supervisor import loggers

# supervisord's own: a SIGHUP has it make its interfaces once more
_emit = loggers.Handler.emit
_handle_error = loggers.Handler.handleError
_close = loggers.Handler.close
_reopen = loggers.FileHandler.reopen
_roll_over = loggers.RotatingFileHandler.doRollover


def make_rpcinterface(supervisord: Any) -> object:
    """Let no log of this supervisord raise; the interface itself offers nothing."""
    patch(supervisord.options.logger)
    return object()


def patch(logger: Any) -> None:
    """
    Let no log of this process raise for its file.

    Args:
        logger: supervisord's own log, which is told when one can be written again.
    """

    def emit(log: Any, record: Any) -> None:
        failed = log.failed
        if _is_closed(log):
            log.reopen()
        _emit(log, record)
        if failed and log.failed == failed:
            log.failed = 0
            name = getattr(log, "baseFilename", "a stream")
            logger.warn(
                f"{name} can be written again; writes that failed: {failed}, lines are late or lost"
            )

    def handle_error(log: Any) -> None:
        if isinstance(sys.exception(), OSError) or _is_closed(log):
            log.failed += 1
            return
        with contextlib.suppress(OSError):
            _handle_error(log)

    def close(log: Any) -> None:
        # A file is closed also when what it holds back cannot be written
        with contextlib.suppress(OSError):
            if not _is_closed(log):
                _close(log)

    def reopen(log: Any) -> None:
        with contextlib.suppress(OSError):
            _reopen(log)

    def roll_over(log: Any) -> None:
        with contextlib.suppress(OSError):
            if not _is_closed(log):
                # What does not fit now can be written later, unless the file is closed
                log.stream.flush()
                _roll_over(log)

    loggers.Handler.failed = 0
    loggers.Handler.emit = emit
    loggers.Handler.handleError = handle_error
    loggers.Handler.close = close
    loggers.FileHandler.reopen = reopen
    loggers.RotatingFileHandler.doRollover = roll_over


def _is_closed(log: Any) -> bool:
    return bool(getattr(log.stream, "closed", False))
