"""The grammar of topic names: strict, so that no topic can be taken for another."""

from __future__ import annotations

import re

from mesh.errors import TopicError

MAX_TOPIC_LENGTH = 128
#: Ends a topic on the wire. It cannot occur in one, so ``order`` never matches ``order.cancelled``.
DELIMITER = b"\0"
#: Topics that start so belong to the mesh itself: probes, replies.
PRIVATE_PREFIX = "_"
#: Under this and a group's name its dead letters come back: see `replay_topic`.
REPLAY_PREFIX = f"{PRIVATE_PREFIX}replay."

_GRAMMAR = re.compile(r"[A-Za-z0-9_.:-]{1,128}", re.ASCII)


def check_topic(name: str) -> str:
    """
    Return the topic as a plain string when it obeys the grammar.

    Args:
        name: 1 to 128 characters of ``A-Z a-z 0-9 _ . : -``.

    Raises:
        TopicError: The name is something else; the message quotes it.
    """
    if not isinstance(name, str) or _GRAMMAR.fullmatch(name) is None:
        shown = repr(name) if len(repr(name)) <= 80 else f"{repr(name)[:77]}..."
        raise TopicError(
            f"{shown} is not a topic: use 1 to {MAX_TOPIC_LENGTH} characters of A-Z a-z 0-9 _ . : -"
        )
    return str(name)


def replay_topic(group: str) -> str:
    """Give the topic on which dead letters of a group come back to the handler that failed."""
    return REPLAY_PREFIX + group


def is_topic(name: bytes) -> bool:
    """Say whether raw bytes from the wire are a topic."""
    try:
        return _GRAMMAR.fullmatch(name.decode("ascii")) is not None
    except UnicodeDecodeError:
        return False
