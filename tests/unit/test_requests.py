"""Asking while the fabric is away, and afterwards."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mesh import (
    Agent,
    AgentContext,
    BrokerUnavailableError,
    Event,
    InMemoryMessageBroker,
    RequestTimeoutError,
    on,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from mesh.broker import Receiver


class Moody(InMemoryMessageBroker):
    """Refuses subscriptions, or takes for ever, while `mood` says so."""

    mood = ""

    async def attach(self, topics: Collection[str], receiver: Receiver) -> None:
        if self.mood == "refuses":
            raise BrokerUnavailableError("away")
        if self.mood == "hangs":
            await asyncio.Event().wait()
        await super().attach(topics, receiver)


class Clerk(Agent):
    @on("desk.asked")
    async def answer(self, event: Event) -> None:
        await self.reply(event, {"n": event.data["n"] + 1})


async def test_a_request_that_met_an_outage_leaves_the_next_one_alone() -> None:
    async with Moody() as broker:
        clerk, asker = (Clerk(AgentContext(name=name, broker=broker)) for name in ("a", "b"))
        await clerk.open()
        broker.mood = "refuses"
        with pytest.raises(BrokerUnavailableError):
            await asker.request("desk.asked", {"n": 1})
        broker.mood = ""

        assert (await asker.request("desk.asked", {"n": 1})).data == {"n": 2}
        await asker.close()
        await clerk.close()


async def test_its_time_limit_holds_while_the_fabric_does_not_answer() -> None:
    async with Moody() as broker:
        asker = Clerk(AgentContext(name="a", broker=broker))
        broker.mood = "hangs"
        with pytest.raises(RequestTimeoutError, match=r"within 0\.01 s"):
            await asker.request("desk.asked", {"n": 1}, timeout_s=0.01)
        await asker.close()


@pytest.mark.parametrize("timeout_s", [-1, float("nan")])
async def test_a_limit_that_is_no_time_is_refused(timeout_s: float) -> None:
    async with InMemoryMessageBroker() as broker:
        asker = Clerk(AgentContext(name="a", broker=broker))
        with pytest.raises(ValueError, match="timeout_s="):
            await asker.request("desk.asked", {"n": 1}, timeout_s=timeout_s)
        await asker.close()
