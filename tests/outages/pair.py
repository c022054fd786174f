"""A publisher and a counting consumer of durable events, and what must hold whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from mesh import codec, launch
from mesh.card import read_cards
from mesh.config import MessageBusConfig
from mesh.factory import make_broker
from mesh.rundir import RunDir
from tests.outages.words import ORDER
from tests.plumbing.processes import end_forwarder, eventually, is_alive

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

HERE = Path(__file__).parent
SCRIPTS = (HERE / "till.py", HERE / "counter.py")
AGENTS = ("till", "counter")
#: How long the pair's publisher waits: short, so that a test of its end is short.
PUBLISH_S = 1.0
#: From the end of an outage until events flow; what is promised.
BACK_S = 5.0
#: Lines in one log about one outage.
MAX_LINES = 8
_MAX_GROWTH_KIB = 20 * 1024
#: Events that must flow before, between and after outages.
_SOME = 20


class Refusal(NamedTuple):
    number: int
    kind: str
    words: str


class Pair:
    """
    The two agents of one mesh, as their notes tell of them.

    Args:
        home: The mesh's run directory.
        config: Its settings.
        others: Agents beside them, which only have to live through it.
    """

    def __init__(self, home: Path, config: MessageBusConfig, *others: str) -> None:
        self.home = home
        self.config = config
        self.agents = (*AGENTS, *others)
        #: What was kept after this order, up to the next refusal, may be lost: its Redis was killed
        #: then, and a replica that knew no more took its place.
        self.safe: int | None = None
        self._before: dict[str, tuple[int, int]] = {}

    def kept(self) -> list[int]:
        return [int(words[1]) for words in self.notes("till") if words[0] == "kept"]

    def refused(self) -> list[Refusal]:
        found = [words for words in self.notes("till") if words[0] == "refused"]
        return [Refusal(int(words[1]), words[2], " ".join(words[3:])) for words in found]

    def got(self) -> list[int]:
        return [int(words[1]) for words in self.notes("counter") if words[0] == "got"]

    def log(self, name: str) -> list[str]:
        path = RunDir(self.home).log(name)
        return path.read_text().splitlines() if path.exists() else []

    def _losable(self) -> set[int]:
        if self.safe is None:
            return set()
        after = [each.number for each in self.refused() if each.number > self.safe]
        return set(range(self.safe + 1, min(after, default=self.safe + 1)))

    def pid(self, name: str) -> int:
        return self._process(name)[0]

    async def flows(self, within_s: float = BACK_S) -> None:
        """Return when more is kept, and the consumer has been given all that was."""
        before = len(self.kept())

        def is_so() -> bool:
            kept = self.kept()
            # The newest may be on its way
            awaited = set(kept[:-1]) - self._losable()
            return len(kept) >= before + _SOME and awaited <= set(self.got())

        await eventually(is_so, within_s=within_s, what="events flow")

    async def begins(self) -> None:
        """Return when events flow for the first time."""
        await self.flows(20.0)
        self._before = {name: self._process(name) for name in self.agents}

    async def weathers(
        self,
        begin: Callable[[], Awaitable[object]],
        end: Callable[[], Awaitable[object]],
        *told: str,
    ) -> None:
        """
        See an outage through.

        Args:
            begin: Begins it.
            end: Ends it.
            told: The kind of the publisher's error, and words of it.
        """
        spoken = {name: len(self.log(name)) for name in (*self.agents, "monitor")}
        refused = len(self.refused())
        await begin()

        def is_told() -> bool:
            errors = [f"{each.kind}: {each.words}" for each in self.refused()[refused:]]
            return any(all(words in error for words in told) for error in errors)

        await eventually(is_told, what=f"refused for {told}")
        await end()
        await self.flows()
        kinds = {each.kind for each in self.refused()[refused:]}
        assert kinds <= {"BackpressureError", "BrokerUnavailableError"}
        for name, lines in spoken.items():
            said = self.log(name)[lines:]
            assert len(said) <= MAX_LINES, f"{name} about {told}:\n" + "\n".join(said)
            assert not any("Traceback" in line for line in said), said

    async def starts_anew(
        self,
        name: str,
        begin: Callable[[], Awaitable[object]],
        end: Callable[[], Awaitable[object]],
    ) -> None:
        """Kill an agent in an outage: its successor waits, and is READY soon after the end."""
        before = self.pid(name)
        await begin()
        os.kill(before, signal.SIGKILL)
        card = RunDir(self.home)
        await eventually(lambda: read_cards(card)[name].pid != before, what=f"{name} starts anew")
        successor = read_cards(card)[name].pid
        await end()
        await self.flows()
        assert self.pid(name) == successor, "it was started more than once"
        self._before[name] = self._process(name)

    def is_the_same(self) -> None:
        """Check that the agents have lived through it, and have not grown."""
        for name, (pid, rss_kib) in self._before.items():
            assert self.pid(name) == pid, f"{name} was started anew"
            assert self._process(name)[1] < rss_kib + _MAX_GROWTH_KIB, f"{name} has grown"

    async def closes(self) -> None:
        """Let the publisher end, and check that nothing kept is lost, and effects are once."""
        self.is_the_same()
        (self.home / "closing").touch()
        await eventually(lambda: self.notes("till")[-1] == ["closed"])
        async with make_broker(self.config, self.home).make_journal() as journal:

            async def is_all_settled() -> bool:
                return not any(view.pending for view in await journal.groups())

            await eventually(is_all_settled, what="all is settled")
            state = await journal.load_state("counter")
            there = {
                codec.decode_frame(each.topic, each.frame).events[0].data["n"]
                for each in await journal.scan([ORDER], limit=100_000)
            }
        counted = {int(name): msgspec.msgpack.decode(raw) for name, raw in state.items()}
        kept, refused = self.kept(), {each.number for each in self.refused()}
        lost = set(kept) - counted.keys() - self._losable()
        assert not lost, f"lost {sorted(lost)}"
        passed_over = there - counted.keys()
        assert not passed_over, f"kept, and never handled: {sorted(passed_over)}"
        repeated = {number for number, count in counted.items() if count != 1}
        if self.config.redis_cluster and self.safe is not None:
            # State lies on another node than what was settled, and has not forgotten it
            repeated -= self._losable() | set(range(self.safe - _SOME, self.safe + 1))
        assert not repeated, {number: counted[number] for number in sorted(repeated)}
        assert counted.keys() <= {*kept, *refused}
        firsts = list(dict.fromkeys(self.got()))
        for key in range(5):
            mine = [n for n in firsts if n % 5 == key and n not in refused]
            assert mine == sorted(mine), "first deliveries of a key are out of order"

    def _process(self, name: str) -> tuple[int, int]:
        """Give pid and resident memory in KiB."""
        pid = int([words for words in self.notes(name) if words[0] == "began"][-1][1])
        assert is_alive(pid), f"{name} has ended"
        assert read_cards(RunDir(self.home))[name].state == "ready"
        status = Path(f"/proc/{pid}/status").read_text()
        return pid, int(status.partition("VmRSS:")[2].split()[0])

    def notes(self, name: str) -> list[list[str]]:
        path = self.home / f"notes.{name}"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.asynccontextmanager
async def launched(home: Path, **settings: object) -> AsyncIterator[Pair]:
    """Run the pair as processes, and check them at the end."""
    config = MessageBusConfig(publish_timeout_s=PUBLISH_S, **settings)  # type: ignore[arg-type]
    pair = Pair(home, config)
    try:
        async with launch(SCRIPTS, directory=home, config=config):
            await pair.begins()
            yield pair
            await pair.closes()
    finally:
        await asyncio.to_thread(end_forwarder, home)
