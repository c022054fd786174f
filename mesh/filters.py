"""
Predicates over events that combine with ``&``, ``|`` and ``~``.

    cheap_btc = (data("symbol") == "BTC") & (data("price") < 20_000)

    @on(EventType.MARKET_DATA_RECEIVED, filter=cheap_btc)
"""

from __future__ import annotations

import inspect
import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.events import Event

_MISSING = object()


def check_question(ask: object) -> None:
    """
    Refuse what cannot answer yes or no.

    Raises:
        ValueError: The message says what to do.
    """
    wrong = None
    if not callable(ask):
        wrong = "must be a function of an event, or of mesh.filters"
    # A coroutine is true: it would let everything pass
    elif any(map(inspect.iscoroutinefunction, (inspect.unwrap(ask), type(ask).__call__))):
        wrong = (
            "must answer at once: write `def`, not `async def`, or ask in the handler, or in a"
            " middleware"
        )
    if wrong:
        raise ValueError(f"filter={ask!r}: {wrong}")


class Filter:
    """
    A yes-or-no question about an event.

    Args:
        ask: Gets the event.
        words: How it reads in messages.

    Raises:
        ValueError: It is no function, or a coroutine function.
    """

    __slots__ = ("_ask", "_words")

    def __init__(self, ask: Callable[[Event], bool], words: str = "filter") -> None:
        """Keep the question."""
        check_question(ask)
        self._ask = ask
        self._words = words

    def __call__(self, event: Event) -> bool:
        """Answer for an event."""
        return bool(self._ask(event))

    def __and__(self, other: Filter) -> Filter:
        """Both."""
        return Filter(lambda event: self(event) and other(event), f"({self!r} & {other!r})")

    def __or__(self, other: Filter) -> Filter:
        """Either."""
        return Filter(lambda event: self(event) or other(event), f"({self!r} | {other!r})")

    def __invert__(self) -> Filter:
        """Not."""
        return Filter(lambda event: not self(event), f"~{self!r}")

    def __repr__(self) -> str:
        """Show the question."""
        return self._words


def where(ask: Callable[[Event], bool]) -> Filter:
    """Make a filter of any function of an event."""
    return Filter(ask, getattr(ask, "__name__", "where"))


def source(*names: str) -> Filter:
    """Only events of these agents."""
    return Filter(lambda event: event.source_agent in names, f"source{names}")


def key(*keys: str) -> Filter:
    """Only events of these keys."""
    return Filter(lambda event: event.key in keys, f"key{keys}")


class data:
    """
    A field of the payload, to be compared; dots go deeper: ``data("quote.bid") > 0``.

    An event without the field, or with a value that cannot be compared, does not match.
    """

    __slots__ = ("_path",)
    __hash__ = None  # type: ignore[assignment]  # comparisons build filters

    def __init__(self, path: str) -> None:
        """Name the field."""
        self._path = tuple(path.split("."))

    def exists(self) -> Filter:
        """Any value."""
        return Filter(lambda event: self._of(event) is not _MISSING, f"{self!r}.exists()")

    def is_in(self, *values: Any) -> Filter:
        """One of these values."""
        return Filter(lambda event: self._of(event) in values, f"{self!r}.is_in{values}")

    def __eq__(self, value: object) -> Filter:  # type: ignore[override]  # builds a filter
        """Equal."""
        return self._compare(operator.eq, value, "==")

    def __ne__(self, value: object) -> Filter:  # type: ignore[override]  # builds a filter
        """Different, and there."""
        return self._compare(operator.ne, value, "!=")

    def __lt__(self, value: Any) -> Filter:
        """Less."""
        return self._compare(operator.lt, value, "<")

    def __le__(self, value: Any) -> Filter:
        """Less or equal."""
        return self._compare(operator.le, value, "<=")

    def __gt__(self, value: Any) -> Filter:
        """Greater."""
        return self._compare(operator.gt, value, ">")

    def __ge__(self, value: Any) -> Filter:
        """Greater or equal."""
        return self._compare(operator.ge, value, ">=")

    def __repr__(self) -> str:
        """Show the field."""
        return f"data({'.'.join(self._path)!r})"

    def _of(self, event: Event) -> Any:
        value: Any = event.data
        for name in self._path:
            if not isinstance(value, dict) or name not in value:
                return _MISSING
            value = value[name]
        return value

    def _compare(self, compare: Callable[[Any, Any], Any], wanted: Any, sign: str) -> Filter:
        def ask(event: Event) -> bool:
            found = self._of(event)
            if found is _MISSING:
                return False
            try:
                return bool(compare(found, wanted))
            except TypeError:
                return False

        return Filter(ask, f"{self!r} {sign} {wanted!r}")
