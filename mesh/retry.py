"""When to try again: exponential back-off with jitter. Pure: chance is an argument."""

from __future__ import annotations

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
        if self.first_delay_s < 0:
            raise ValueError(f"first_delay_s must be 0 or more, was {self.first_delay_s}")

    def delay_s(self, retry: int, chance: float | None = None) -> float:
        """
        Give the pause before a retry.

        Args:
            retry: 1 for the first retry.
            chance: 0..1, decides the jitter; None draws one.
        """
        drawn = random.random() if chance is None else chance  # noqa: S311 - jitter, no secret
        # The exponent is held: 2 ** 10_000 would raise where only max_delay_s matters
        base = min(self.first_delay_s * self.factor ** min(retry - 1, 60), self.max_delay_s)
        return base * (1 + self.jitter * (2 * drawn - 1))


#: Pauses while a fabric or journal does not answer.
OUTAGE = RetryPolicy(first_delay_s=0.05, max_delay_s=2.0)
