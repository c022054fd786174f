"""How agents behave while the fabric or the journal is away: patient, bounded and quiet."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest

from mesh import (
    AccessDeniedError,
    Agent,
    BrokerUnavailableError,
    ConfigurationError,
    Event,
    InMemoryMessageBroker,
    event_type,
    every,
    on,
    source,
)
from mesh.agent import AgentContext
from mesh.deadletters import DeadLetters
from mesh.errors import RequestTimeoutError, is_outage
from mesh.logs import Sparing
from tests.plumbing.agents import running
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from mesh.journal import Journal, Step

ORDER = event_type("manners.order", durable=True)
AWAY = BrokerUnavailableError("the journal is away")


class Listens(Agent):
    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        pass


# -- starting ------------------------------------------------------------------------------------


class Late(InMemoryMessageBroker):
    """Its journal opens at the third try."""

    def __init__(self, error: Exception = AWAY) -> None:
        super().__init__()
        self.error = error
        self.tries = 0

    async def open_journal(self) -> Journal:
        self.tries += 1
        if self.tries < 3:
            raise self.error
        return await super().open_journal()


async def opened(broker: Late, *, patient: bool) -> None:
    agent = Listens(AgentContext(name="shop", broker=broker, patient=patient))
    try:
        await agent.open()
    finally:
        await agent.close()


async def test_a_patient_agent_waits_for_the_journal() -> None:
    """supervisord would start it anew over and over, and at last give it up."""
    async with Late() as broker:
        await opened(broker, patient=True)

        assert broker.tries >= 3


@pytest.mark.parametrize(
    ("patient", "error"), [(False, AWAY), (True, AccessDeniedError("wrong password"))]
)
async def test_others_are_told_at_once(patient: bool, error: Exception) -> None:
    async with Late(error) as broker:
        with pytest.raises(type(error)):
            await opened(broker, patient=patient)
        assert broker.tries == 1


# -- sources and timers --------------------------------------------------------------------------


class Tries(Agent):
    """Meets an outage three times."""

    calls = 0
    failure: Exception = AWAY

    @source
    async def speak(self) -> None:
        self.calls += 1
        if self.calls < 4:
            raise self.failure


async def test_a_source_that_meets_an_outage_is_called_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with InMemoryMessageBroker() as broker, running(broker, Tries) as agent:
        await agent.sources_done.wait()
        assert agent.calls == 4

    (said,) = [each for each in caplog.records if "is then called again" in each.getMessage()]
    assert said.exc_info is None


async def test_one_that_fails_for_another_reason_ends_its_agent() -> None:
    class Broken(Tries):
        failure = ExceptionGroup("two", [AWAY, ValueError("no such row")])

    async with InMemoryMessageBroker() as broker:
        agent = Broken(AgentContext(name="shop", broker=broker))
        await agent.open()
        agent.context.gate.set()
        with pytest.raises(ExceptionGroup):
            await agent.work()
        await agent.close()
        assert agent.calls == 1


async def test_a_timer_that_meets_an_outage_says_so_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Ticks(Agent):
        count = 0

        @every(0.001)
        async def tick(self) -> None:
            self.count += 1
            raise AWAY

    async with InMemoryMessageBroker() as broker, running(broker, Ticks) as agent:
        await eventually(lambda: agent.count > 5)

    (said,) = [each for each in caplog.records if "timer tick failed" in each.getMessage()]
    assert said.exc_info is None


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (AWAY, True),
        (ExceptionGroup("all", [AWAY, ExceptionGroup("inner", [AWAY])]), True),
        (ExceptionGroup("some", [AWAY, ValueError()]), False),
        (AccessDeniedError("wrong password"), False),
        (RequestTimeoutError("nobody replied"), False),
        (ValueError(), False),
    ],
)
def test_what_is_an_outage(error: Exception, outage: bool) -> None:
    assert is_outage(error) is outage


# -- memory --------------------------------------------------------------------------------------


async def test_state_that_is_written_in_an_outage_does_not_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What timers and live handlers write is one step when the journal is back."""
    async with InMemoryMessageBroker() as broker:
        journal = await broker.open_journal()
        commit = journal.commit
        sizes: list[int] = []

        async def refuse(*_: Any) -> list[Step]:
            raise AWAY

        async def note(group: str, consumer: str, steps: list[Step]) -> list[Step]:
            sizes.append(len(steps))
            return await commit(group, consumer, steps)

        async with running(broker, Listens) as agent:
            monkeypatch.setattr(journal, "commit", refuse)
            for number in range(1000):
                agent.ctx.state["newest"] = number
                agent.ctx.state[f"n{number % 3}"] = number
                await asyncio.sleep(0)
            monkeypatch.setattr(journal, "commit", note)
            await agent.consumer.drained()
            agent.ctx.state["later"] = 1
            await agent.consumer.drained()

        assert sum(sizes) <= 3
        assert (await journal.load_state("shop")).keys() == {"newest", "n0", "n1", "n2", "later"}


# -- words ---------------------------------------------------------------------------------------


def test_a_trouble_that_lasts_is_said_ever_more_seldom(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    sparing = Sparing(logging.getLogger("words"))
    for _ in range(600):
        sparing.say("down", logging.WARNING, "no answer")
        now_s += 1.0
    lasting = [each.getMessage() for each in caplog.records]
    now_s += 700.0
    sparing.say("down", logging.WARNING, "no answer")

    assert lasting[:3] == [
        "no answer",
        "no answer (9 more like this)",
        "no answer (19 more like this)",
    ]
    assert len(lasting) == 6
    # A new outage is said at once, however long the last one was
    assert caplog.records[-1].getMessage() == "no answer"


async def test_dead_letters_that_nothing_can_keep_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a Redis that may forget, say: the writer must not die of it."""

    async def bury(_: object) -> None:
        raise ConfigurationError("redis has appendonly='no'")

    letters = DeadLetters("shop", bury)
    for _ in range(3):
        letters.put(letters.frame_letter("order", "undecodable", "no event", b"\0"))
        await letters.written()
    await letters.close()

    assert (letters.total, letters.unkept) == (3, 3)
    assert "cannot keep dead letters (said once): redis has" in caplog.text
