"""When to try again: exponential back-off with jitter. Pure: chance is an argument."""

from __future__ import annotations

import math
import random

from mesh.values import Value


class RetryPolicy(Value, frozen=True, kw_only=True):
    """
    How often and how fast something is tried again.

    Full-range jitter keeps many agents from retrying in step; source: M. Brooker, "Exponential
    Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    max_retries: int = 3
    first_delay_s: float = 0.1
    factor: float = 2.0
    max_delay_s: float = 30.0
    jitter: float = 0.2
    #: Only these errors are tried again; timeouts and payloads that do not fit never are.
    on: tuple[type[BaseException], ...] = (BaseException,)

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, was {self.max_retries}")
        for name in ("first_delay_s", "factor", "max_delay_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, was {getattr(self, name)}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be 0 to 1, was {self.jitter}")

    def delay_s(self, retry: int, chance: float | None = None) -> float:
        """
        Give the pause before a retry.

        Args:
            retry: 1 for the first retry.
            chance: 0..1, decides the jitter; None draws one.
        """
        drawn = random.random() if chance is None else chance  # noqa: S311 - jitter, no secret
        try:
            base = min(self.first_delay_s * self.factor ** (retry - 1), self.max_delay_s)
        except OverflowError:
            base = self.max_delay_s if self.first_delay_s else 0.0
        return base * (1 + self.jitter * (2 * drawn - 1))


#: Pauses while a fabric or journal does not answer.
OUTAGE = RetryPolicy(first_delay_s=0.05, max_delay_s=2.0)


def in_words(tries: int) -> str:
    """Show how often something was tried: ``1 try``, ``2 tries``."""
    return "1 try" if tries == 1 else f"{tries} tries"
