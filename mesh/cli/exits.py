"""Exit codes of `mesh`, and which error ends in which."""

from __future__ import annotations

import errno

from mesh.errors import (
    EXIT_BUG,
    EXIT_CONFIGURATION,
    EXIT_LOCKED,
    AlreadyRunningError,
    BrokerUnavailableError,
    ConfigurationError,
    MeshError,
    PayloadError,
    TopicError,
)
from mesh.supervision.supervisord import SupervisorSilentError, SupervisorUnavailableError

EXIT_WRONG = 1
EXIT_USAGE = 2
EXIT_NO_MESH = 3
EXIT_DATA = 65
EXIT_UNAVAILABLE = 69
EXIT_FILE = 74
EXIT_INTERRUPTED = 130
#: As of any tool whose reader closes the pipe: 128 and the number of SIGPIPE.
EXIT_UNREAD = 141

MEANINGS = {
    0: "all is well",
    EXIT_WRONG: "something is wrong; the words say what",
    EXIT_USAGE: "the command line is wrong",
    EXIT_NO_MESH: "no mesh runs in this directory",
    EXIT_DATA: "the given event cannot travel: bad JSON, topic or payload",
    EXIT_UNAVAILABLE: "the fabric or supervisord does not answer",
    EXIT_BUG: "an agent failed",
    EXIT_FILE: "a file cannot be written: the disk is full, or not yours to write on",
    EXIT_LOCKED: "a mesh runs in this directory already",
    EXIT_CONFIGURATION: "the configuration cannot be used; the words say what",
    EXIT_INTERRUPTED: "interrupted",
    EXIT_UNREAD: "whoever read the output closed the pipe; how it went is not known",
}


class NoMeshError(MeshError):
    """No mesh runs in the directory that was asked about."""


class AgentFailedError(MeshError):
    """An agent did not start, or ended by itself; the message names it."""


_CODES: tuple[tuple[type[MeshError], int], ...] = (
    (ConfigurationError, EXIT_CONFIGURATION),
    (AlreadyRunningError, EXIT_LOCKED),
    (NoMeshError, EXIT_NO_MESH),
    (SupervisorSilentError, EXIT_UNAVAILABLE),
    (SupervisorUnavailableError, EXIT_NO_MESH),
    (AgentFailedError, EXIT_BUG),
    (PayloadError, EXIT_DATA),
    (TopicError, EXIT_DATA),
    (BrokerUnavailableError, EXIT_UNAVAILABLE),
)


#: What can be done about a file that cannot be written.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, then try again"),
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), then try again",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "see that you may write there"),
}


def words_for_file(error: OSError) -> str | None:
    """Say which file cannot be written, and what to do; None for any other error."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    return f"{error.filename or 'what this command writes'}: {error.strerror}; {remedy}"


def code_of(error: MeshError) -> int:
    """Give the exit code for an error that reached the command line."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), EXIT_WRONG)
