"""Dead letters: what is kept of a failure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from mesh import Agent, on
from mesh.deadletters import (
    MAX_FRAME_BYTES,
    Attempt,
    DeadLetter,
    DeadLetters,
    decode_letter,
    encode_letter,
    traceback_hash,
)
from mesh.errors import BrokerUnavailableError
from mesh.events import Event
from mesh.journals.memory import MemoryJournal
from mesh.testing import AgentHarness
from tests.plumbing.journals import letter

if TYPE_CHECKING:
    from collections.abc import Sequence


def _event() -> Event:
    return Event("order", {"price": 1.5}, "feed", datetime(2024, 1, 1, tzinfo=UTC))


def _raised(kind: type[Exception], words: str) -> Exception:
    try:
        raise kind(words)
    except Exception as error:  # noqa: BLE001 - it is what is tested
        return error


def test_a_letter_survives_its_bytes() -> None:
    whole = letter(
        "a",
        event={"data": {"x": [1, None, "ü"]}},
        frame=b"\0\xff",
        history=(Attempt(at_s=1.0, error="one"), Attempt(at_s=2.0, error="two")),
    )

    assert decode_letter(encode_letter(whole)) == whole


def test_errors_of_one_place_share_a_hash() -> None:
    one, other = _raised(ValueError, "price 1"), _raised(ValueError, "price 2")

    assert traceback_hash(one) == traceback_hash(other) != ""
    assert traceback_hash(one) != traceback_hash(_raised(KeyError, "price 1"))
    assert traceback_hash(ValueError("never raised")) == ""


async def test_the_log_names_the_class_of_what_a_handler_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Buyer(Agent):
        @on("order", max_retries=0)
        async def on_order(self, event: Event) -> None:
            raise KeyError("price")

    async with AgentHarness(Buyer) as harness:
        await harness.say("order", {})
        await harness.mesh.quiet()

    (told,) = [each for each in caplog.messages if "put aside" in each]
    assert told.endswith(" after 1 try and the event was put aside: KeyError: 'price'")


def test_an_event_is_kept_with_its_failure() -> None:
    letters = DeadLetters("risk")
    event = _event()
    letters.put(
        letters.letter(event, "failed", _raised(ValueError, "no"), handler="check", attempts=3)
    )
    (kept,) = letters.newest

    assert (kept.id, kept.error) == (f"{event.id}/risk/check", "ValueError: no")
    assert (kept.handler, kept.attempts, kept.topic) == ("check", 3, "order")
    assert kept.event == event.to_dict()
    assert kept.first_at_s == kept.at_s > 0
    assert kept.traceback_hash


async def test_bytes_that_are_no_event_are_kept_cut_and_sampled() -> None:
    journal = MemoryJournal()
    await journal.connect()
    letters = DeadLetters("risk", journal.bury)
    for _ in range(3):
        letters.put_frame("order", "undecodable", "bad", b"\xff" * (MAX_FRAME_BYTES + 1))
    await letters.close()

    assert letters.total == 3
    (kept,) = await journal.dead()
    assert kept.frame == b"\xff" * MAX_FRAME_BYTES
    assert kept.reason == "undecodable"


async def test_letters_wait_for_a_journal_that_is_away() -> None:
    kept: list[DeadLetter] = []
    away = [True, True, False]

    async def bury(batch: Sequence[DeadLetter]) -> None:
        if away.pop(0):
            raise BrokerUnavailableError("away")
        kept.extend(batch)

    letters = DeadLetters("risk", bury)
    event = _event()
    letters.put(letters.letter(event, "failed", "no"))
    await letters.close()

    assert [letter.id for letter in kept] == [f"{event.id}/risk/"]


async def test_a_letter_that_cannot_be_kept_holds_up_no_other() -> None:
    kept: list[str] = []

    async def bury(batch: Sequence[DeadLetter]) -> None:
        if any(letter.id.startswith("odd") for letter in batch):
            raise OverflowError("no form for it")
        kept.extend(letter.id for letter in batch)

    letters = DeadLetters("risk", bury)
    for name in ("a", "odd", "b"):
        letters.put(letter(name))
    await letters.close()

    assert kept == ["a", "b"]
    assert letters.unkept == 1


@pytest.mark.parametrize("value", [2**70, "\udcff", {1, 2}, object()])
def test_a_letter_can_be_kept_whatever_its_event_carries(value: object) -> None:
    letters = DeadLetters("risk")
    event = Event("order", {"x": value}, "feed", datetime(2024, 1, 1, tzinfo=UTC))

    made = letters.letter(event, "failed", _raised(ValueError, "cannot open \udcff.csv"))

    assert decode_letter(encode_letter(made)) == made
    assert "cannot open \\udcff.csv" in made.error


def test_only_so_much_of_an_error_is_kept() -> None:
    made = DeadLetters("risk").letter(_event(), "failed", _raised(ValueError, "x" * 1_000_000))

    assert len(made.error) < 5_000
    assert made.error.endswith("characters more)")
