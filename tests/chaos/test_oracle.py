"""The oracle sees what it is there for: each promise is broken once on purpose."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.chaos.oracle import Evidence, Got, judge
from tests.chaos.words import EAR, HEARS, ORDER, PACKED, SHIPPED, Order, state_name

ORDERS: list[Order] = [("till_1", key, number) for number in (1, 2, 3) for key in ("k0", "k1")]
ONE = ORDERS[2]


def sound() -> Evidence:
    """Six orders that all had their effects."""
    return Evidence(
        tried=set(ORDERS),
        kept=set(ORDERS),
        till_lives=1,
        got={
            **{
                group: Got({topic: list(ORDERS) for topic, _ in heard}, lives=1)
                for group, heard in HEARS.items()
            },
            EAR: Got(lives=1),
        },
        journal={topic: Counter(ORDERS) for topic in (ORDER, PACKED, SHIPPED)},
        state={
            group: {
                state_name(topic, "till_1", key): (3, 6)
                for topic, _ in heard
                for key in ("k0", "k1")
            }
            for group, heard in HEARS.items()
        },
        ledgers=[],
        parked=Counter(),
    )


def test_what_is_sound_has_no_problems() -> None:
    verdict = judge(sound())

    assert verdict.problems == []
    assert verdict.figures["orders accepted"] == 6
    assert verdict.figures["effects"] == 5 * 6


def test_what_was_given_twice_and_had_one_effect_is_no_problem() -> None:
    told = sound()
    told.got["packer"].orders[ORDER].append(ONE)

    verdict = judge(told)

    assert verdict.problems == []
    assert verdict.figures["  of these again"] == 1


def test_what_was_not_accepted_may_be_kept_or_not() -> None:
    told = sound()
    told.kept.remove(ONE)
    told.tried.add(("till_1", "k0", 4))

    assert judge(told).problems == []


def test_an_accepted_order_that_is_not_there_is_lost() -> None:
    told = sound()
    told.kept.add(("till_1", "k0", 4))
    told.tried.add(("till_1", "k0", 4))

    assert judge(told).figures["lost"] == 1


@pytest.mark.parametrize("group", list(HEARS))
def test_an_order_that_a_group_never_got_is_lost(group: str) -> None:
    told = sound()
    for orders in told.got[group].orders.values():
        orders.remove(ONE)

    assert judge(told).figures["lost"] == len(HEARS[group])


@pytest.mark.parametrize("topic", [PACKED, SHIPPED])
def test_a_missing_link_is_lost(topic: str) -> None:
    told = sound()
    del told.journal[topic][ONE]

    assert judge(told).figures["lost"] > 0


@pytest.mark.parametrize(
    ("found", "kind"), [((2, 4), "lost"), ((4, 8), "effects twice"), ((3, 7), "effects twice")]
)
def test_a_state_that_does_not_fit_the_events_is_seen(found: tuple[int, int], kind: str) -> None:
    told = sound()
    told.state["sink"][state_name(SHIPPED, "till_1", "k0")] = found

    assert judge(told).figures[kind] == 1


def test_an_effect_that_was_said_twice_is_seen() -> None:
    told = sound()
    told.journal[PACKED][ONE] += 1

    assert judge(told).figures["effects twice"] == 1


def test_first_deliveries_out_of_order_are_seen() -> None:
    told = sound()
    orders = told.got["shipper"].orders[PACKED]
    orders[0], orders[2] = orders[2], orders[0]

    assert judge(told).figures["reordered"] == 1


def test_what_nobody_said_is_seen() -> None:
    told = sound()
    told.got["auditor"].orders[ORDER].append(("till_1", "k0", 99))

    assert judge(told).figures["unexpected"] == 1


def test_a_dead_letter_is_seen() -> None:
    told = sound()
    told.parked["packer/failed: ValueError"] += 1

    assert judge(told).figures["parked"] == 1


def test_ticks_that_the_ledgers_do_not_know_of_are_seen() -> None:
    told = sound()
    told.tried |= {("till_1", "chaos.tick", number) for number in (1, 2, 3)}

    (problem,) = judge(told).problems
    assert "0 ticks published, 3 were tried" in problem
