"""Agents that remember what they heard: what belongs to a key goes where the key goes."""

from __future__ import annotations

from typing import Any

import pytest

from agents.features import FeatureAgent
from agents.payloads import Features, Quote
from agents.signals import Signals
from mesh import EventType
from mesh.replicas import Roster
from mesh.testing import AgentHarness

LENGTHS = {"fast": "2", "slow": "4"}


def quote(symbol: str, price: float) -> Quote:
    return Quote(symbol, 1, "2022-01-01T00:00:00+00:00", price, price)


async def features_of(harness: AgentHarness[FeatureAgent], said: Quote) -> dict[str, Any]:
    await harness.say(EventType.MARKET_DATA_RECEIVED, said, key=said.symbol)
    return (await harness.expect(EventType.FEATURES_COMPUTED)).data


def share(harness: AgentHarness[Any], *names: str) -> None:
    harness.agent.consumer.share(Roster(1, names, names))


async def test_features_are_computed_for_each_symbol() -> None:
    async with AgentHarness(FeatureAgent, params=LENGTHS) as harness:
        await features_of(harness, quote("BTCUSD", 40_000.0))
        await features_of(harness, quote("USDJPY", 114.0))
        dollar = await features_of(harness, quote("USDJPY", 116.0))
        bitcoin = await features_of(harness, quote("BTCUSD", 44_000.0))

    assert (dollar["fast_mean"], bitcoin["fast_mean"]) == (115.0, 42_000.0)
    assert bitcoin["change"] == pytest.approx(0.1)


async def test_windows_begin_anew_when_another_replica_has_had_the_symbol() -> None:
    async with AgentHarness(FeatureAgent, params=LENGTHS) as harness:
        name = harness.agent.name
        await features_of(harness, quote("BTCUSD", 1.0))
        assert (await features_of(harness, quote("BTCUSD", 3.0)))["fast_mean"] == 2.0
        share(harness, "somebody else")
        share(harness, name)

        back = await features_of(harness, quote("BTCUSD", 9.0))
        assert (back["fast_mean"], back["change"]) == (None, 0.0)
        assert (await features_of(harness, quote("BTCUSD", 11.0)))["fast_mean"] == 10.0


async def test_a_wish_is_said_for_each_symbol_and_again_when_the_symbol_comes_back() -> None:
    def up(symbol: str) -> Features:
        return Features(quote(symbol, 100.0), 0.0, fast_mean=110.0, slow_mean=100.0, volatility=0.0)

    async def said(symbol: str) -> list[str]:
        before = len(harness.heard)
        await harness.say(EventType.FEATURES_COMPUTED, up(symbol), key=symbol)
        await harness.agent.consumer.drained()
        await harness.agent.publisher.flush()
        return [event.data["quote"]["symbol"] for event in harness.heard[before:]]

    async with AgentHarness(Signals) as harness:
        assert await said("BTCUSD") == ["BTCUSD"]
        assert await said("BTCUSD") == []
        assert await said("USDJPY") == ["USDJPY"]
        share(harness, "somebody else")
        share(harness, harness.agent.name)
        assert await said("BTCUSD") == ["BTCUSD"]
