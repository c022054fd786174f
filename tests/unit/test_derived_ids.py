"""Ids of what a step publishes: the same if it is done again, and side by side in an index."""

from __future__ import annotations

import pytest

from mesh import Event
from mesh.context import HandlerContext


def derived_from(event: Event | None, cause: str | None = None, count: int = 1) -> list[str]:
    context = HandlerContext("desk", {}, event, cause=cause)
    context.begin("on_order")
    made = [context.derive_id() for _ in range(count)]
    assert None not in made
    return [str(each) for each in made]


def event_of(identity: str) -> Event:
    return Event("a.b", {}, "mouth", id=identity)


def test_the_same_step_gives_the_same_ids_and_no_other_does() -> None:
    first = derived_from(event_of("e-1"), count=2)

    assert derived_from(event_of("e-1"), count=2) == first
    assert len({*first, *derived_from(event_of("e-2"), count=2)}) == 4


def test_ids_begin_with_what_their_chain_began_with() -> None:
    """And do not grow with its length."""
    (second,) = derived_from(event_of("e-1"))
    (third,) = derived_from(event_of(second))

    assert second.startswith("e-1~")
    assert third.startswith("e-1~")
    assert third != second
    assert len(third) == len(second)


@pytest.mark.parametrize(
    ("cause", "begins"),
    [("row 7", "row-7~"), ("x" * 500, f"{'x' * 40}~"), ("urn:ü/1", "urn-1~"), ("", "~")],
)
def test_whatever_a_cause_is_its_id_is_short_and_plain(cause: str, begins: str) -> None:
    (made,) = derived_from(None, cause)

    assert made.startswith(begins)
    assert made.isascii()


def test_without_a_cause_any_id_will_do() -> None:
    assert HandlerContext("desk", {}).derive_id() is None
