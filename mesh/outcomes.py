"""
What a handler can raise to say how its event shall end; anything else it raises is a failure.

::

    raise Skip("not our symbol")            # settled, nothing of it is kept
    raise Retry(after_s=2, reason="busy")   # tried again then; counts as a try
    raise Reject("no such account")         # a dead letter at once, without another try
"""

from __future__ import annotations


class Outcome(Exception):
    """
    Base of the three.

    Args:
        reason: Why, in words for people.
    """

    def __init__(self, reason: str = "") -> None:
        """Keep the reason."""
        super().__init__(reason)
        self.reason = reason


class Skip(Outcome):
    """The event is none of this handler's: settled; what the handler published is dropped."""


class Reject(Outcome):
    """The event can never be handled: it is put aside as a dead letter without another try."""


class Retry(Outcome):
    """
    The event cannot be handled yet: try again later, within the handler's number of tries.

    Args:
        after_s: When, in seconds from now.
        reason: Why, in words for people.

    Raises:
        ValueError: `after_s` is below 0.
    """

    def __init__(self, after_s: float, reason: str = "") -> None:
        """Keep the pause."""
        if not after_s >= 0:
            raise ValueError(f"after_s must be 0 or more, was {after_s!r}")
        super().__init__(reason)
        self.after_s = after_s
