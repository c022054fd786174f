"""
Throw random and mutated frames at every socket of a running mesh, and hold its counters to account.

``scripts/fuzz --frames 1000000 --seed 7`` is the full size; tests/faults/test_fuzz.py a small one.
Nothing is sampled: after every burst the forwarder's counters must say what became of each frame,
and the agent's what became of each that reached it. All the while an honest publisher speaks; it
must not lose one event.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mesh import EventPublisher, PublisherConfig, ZeroMQMessageBroker
from mesh.codec import MAX_FRAME_BYTES
from mesh.ledger_views import In, LedgerView, read_ledger
from mesh.rundir import RunDir
from mesh.supervision import boot
from mesh.supervision.supervisord import SupervisorClient
from tests.faults.account import Account
from tests.faults.frames import HEARD, Frames, is_private
from tests.faults.project import write_project
from tests.faults.zmtp import GREETING, Peer, message, ready_command

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_BURST = 1000
_PATIENCE_S = 20.0
_LOOK_S = 0.002
#: Reasons for which an agent puts a frame or an event aside before a handler sees it.
_REASONS = (
    "undecodable", "too_large", "unknown_version", "invalid", "too_deep", "too_many_items",
    "wrong_topic",
)  # fmt: skip
_HANDLER_REASONS = ("handler_invalid", "handler_failed", "handler_timeout", "expired", "hops")


class Target:
    """
    A supervised mesh of a forwarder, a monitor and one agent, and an honest publisher beside it.

    Args:
        rundir: Where it runs.
        project: An empty folder for its supervisord.conf and its agent.
    """

    def __init__(self, rundir: RunDir, project: Path) -> None:
        self.rundir = rundir
        self._project = project

    async def __aenter__(self) -> Self:
        write_project(self._project, "hearer")
        async with contextlib.AsyncExitStack() as exits:
            await boot.up(self._project, self.rundir)
            exits.push_async_callback(boot.down, self.rundir)
            states = await boot.wait_ready(self.rundir)
            failed = [each for each in states if each.verdict != "ready"]
            assert not failed, failed
            self.pids = {each.name: each.pid for each in states}
            broker = await exits.enter_async_context(ZeroMQMessageBroker(self.rundir.path))
            await broker.synchronize()
            config = PublisherConfig(agent_name="citizen", broker=broker)
            self._publisher = EventPublisher(config)
            exits.push_async_callback(self._publisher.close)
            self.said = 0
            # What our broker sent to be let in goes before it: from now on all that comes is ours
            await self.say()
            heard = await _settle(lambda: _settled(self.view("hearer")), self.said)
            assert heard == self.said, "the mesh does not hear what is said"
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._exits.aclose()

    async def say(self) -> None:
        """Publish one honest event, in a frame of its own."""
        await self._publisher.publish(HEARD, {"honest": self.said})
        await self._publisher.flush()
        self.said += 1

    def view(self, name: str) -> LedgerView:
        """Give a program's counters."""
        view = read_ledger(self.rundir.ledger(name))
        assert view is not None
        return view

    def counts(self, name: str) -> Counter[str]:
        """Give a program's named counters, and those of its frames."""
        view = self.view(name)
        return Counter(
            {**view.dropped, "frames_in": view.frames, "rejected_frames": view.rejected_frames}
        )

    async def stopped(self) -> list[str]:
        """Name the programs that do not run any more, or not as the process that they were."""
        client = SupervisorClient(self.rundir.socket("supervisor"))
        now = {each.name: each for each in await client.processes()}
        return [
            f"{name}: was pid {pid}, now {now[name].state} with pid {now[name].pid}"
            for name, pid in self.pids.items()
            if now[name].pid != pid or now[name].state != "RUNNING"
        ]

    def resident_mib(self) -> str:
        """Tell how much memory the programs hold."""
        words = []
        for name, pid in self.pids.items():
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                words.append(f"{name} {pages * os.sysconf('SC_PAGE_SIZE') / 2**20:.0f} MiB")
        return ", ".join(words)


async def fuzz(frames: int, seed: int, target: Target) -> Account:
    """
    Throw so many frames at a mesh, and a share of that at its other sockets.

    Returns:
        The account; its `problems` are empty when it closes and nobody stopped.
    """
    account = Account()
    account.notes["memory before"] = target.resident_mib()
    made = Frames(seed)
    began_s = time.monotonic()
    await _publishers(frames, made, target, account)
    account.notes["frames a second"] = f"{frames / (time.monotonic() - began_s):,.0f}"
    await _subscribers(max(200, frames // 20), made, target, account)
    await _beats(max(200, frames // 50), made, target, account)
    await _words(max(50, frames // 500), made, target, account)
    await _strangers(min(200, max(20, frames // 1000)), made, target, account)
    for _ in range(100):
        await target.say()
    await _honest(target, account)
    account.problems += await target.stopped()
    account.notes["memory after"] = target.resident_mib()
    return account


async def _publishers(frames: int, made: Frames, target: Target, account: Account) -> None:
    """Throw frames at the publishers' side; some of them reach the agent."""
    forwarder, hearer = target.counts("forwarder"), target.counts("hearer")
    heard_before = target.view("hearer")
    sent = private = 0
    said_before = target.said

    def said() -> int:
        return target.said - said_before

    def arrived() -> int:
        counted = target.counts("forwarder") - forwarder
        return sum(counted[name] for name in _FATES)

    def heard() -> int:
        return (target.counts("hearer") - hearer)["frames_in"]

    async with Peer(target.rundir.socket("in"), "PUB") as peer:
        while sent < frames:
            messages = made.take(min(_BURST, frames - sent))
            private += sum(map(is_private, messages))
            sent += len(messages)
            # Every fourth burst in pairs, as messages of two parts
            step = 2 if sent // _BURST % 4 == 0 else 1
            await peer.send(
                message(*messages[at : at + step]) for at in range(0, len(messages), step)
            )
            await target.say()
            # A burst is less than what the sockets hold, so nothing is lost by speed
            if await _settle(arrived, sent + said()) != sent + said():
                break
            await _settle(heard, (target.counts("forwarder") - forwarder)["frames"] - private)
    await _settle(lambda: -_unsettled(target.view("hearer")), 0)
    counted = target.counts("forwarder") - forwarder
    account.close(
        "thrown at in.sock, and said by the honest publisher",
        sent + said(),
        **{name: counted[name] for name in _FATES},
    )
    account.close("forwarded", counted["frames"], to_the_agent=heard(), on_private_topics=private)
    account_of_agent(target.counts("hearer") - hearer, heard_before, target.view("hearer"), account)


_FATES = ("frames", "malformed_topic", "malformed_frame", "unheard_frames")


def account_of_agent(
    heard: Counter[str], before: LedgerView, after: LedgerView, account: Account
) -> None:
    """Add what became of the frames that reached the agent."""
    events = _received(after) - _received(before)
    aside = sum(heard[reason] for reason in _REASONS)
    rejected_events = aside - heard["rejected_frames"]
    account.close(
        "frames at the agent",
        heard["frames_in"],
        decoded=heard["frames_in"] - heard["rejected_frames"],
        put_aside_whole=heard["rejected_frames"],
    )
    account.close("put aside by the agent", aside, **{name: heard[name] for name in _REASONS})
    account.close(
        "events in decoded frames",
        events,
        handled=heard["seen"],
        put_aside=rejected_events,
        **{name: heard[name] for name in _HANDLER_REASONS},
    )
    account.close("settled events", events, settled=_settled(after) - _settled(before))


async def _subscribers(count: int, made: Frames, target: Target, account: Account) -> None:
    """Throw subscriptions at the subscribers' side; libzmq joins those that are alike."""
    before = target.counts("forwarder")
    sent = 0

    def arrived() -> int:
        counted = target.counts("forwarder") - before
        return counted["subscriptions"] + counted["malformed_subscription"]

    async with Peer(target.rundir.socket("out"), "XSUB") as peer:
        while sent < count:
            burst = [made.subscription(sent + n) for n in range(min(_BURST, count - sent))]
            # Half of what was subscribed to is cancelled again
            burst += [b"\0" + each[1:] for each in burst[::2] if each[:1] == b"\x01"]
            await peer.send(map(message, burst))
            sent += len(burst)
            count += len(burst) - min(_BURST, len(burst))
            await target.say()
            if await _settle(arrived, sent) != sent:
                break
        counted = target.counts("forwarder") - before
        account.close(
            "thrown at out.sock",
            sent,
            subscriptions=counted["subscriptions"],
            malformed_subscription=counted["malformed_subscription"],
        )


async def _beats(count: int, made: Frames, target: Target, account: Account) -> None:
    """Throw datagrams at the monitor; some claim to be the agent's."""
    before = target.counts("monitor")
    await _datagrams(target.rundir.socket("monitor"), count, made.datagram)
    await _settle(lambda: (target.counts("monitor") - before)["rejected_beats"], count)
    counted = target.counts("monitor") - before
    account.close("datagrams at the monitor", count, rejected_beats=counted["rejected_beats"])


async def _words(count: int, made: Frames, target: Target, account: Account) -> None:
    """Throw datagrams at the socket on which the agent hears the monitor."""
    before = target.counts("hearer")
    await _datagrams(target.rundir.socket("hearer.ctl"), count, made.datagram)
    await _settle(lambda: (target.counts("hearer") - before)["foreign_words"], count)
    counted = target.counts("hearer") - before
    account.close("datagrams at the agent", count, foreign_words=counted["foreign_words"])


async def _datagrams(path: Path, count: int, make: Callable[[], bytes]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(str(path))
        for _ in range(count):
            # Waits while the receiver's queue is full: what was taken was delivered
            await asyncio.to_thread(sender.send, make())


async def _strangers(count: int, made: Frames, target: Target, account: Account) -> None:
    """Connect with what is no ZMTP, or ends in the middle, or is too large for the socket."""
    noise = b"".join(message(each) for each in made.take(20))
    openings = (
        noise,
        GREETING[:10],
        GREETING + noise,
        GREETING + ready_command(b"REQ"),
        GREETING + ready_command(b"PUB") + b"\x02" + (2**63 - 1).to_bytes(8, "big"),
        GREETING + ready_command(b"PUB") + b"\x04\xff" + noise,
    )
    for number in range(count):
        for name in ("in", "out"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
                stranger.connect(str(target.rundir.socket(name)))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    stranger.sendall(openings[number % len(openings)])
    for _ in range(3):
        async with Peer(target.rundir.socket("in"), "PUB") as peer:
            with contextlib.suppress(ConnectionError):
                await peer.send([message(b"fuzz.heard\0" + b"x" * 2 * MAX_FRAME_BYTES)])
            async with asyncio.timeout(_PATIENCE_S):
                await peer.closed()
    account.notes["strangers"] = f"{2 * count} connections, and 3 cut off for a frame too large"


async def _honest(target: Target, account: Account) -> None:
    def link() -> In | None:
        return target.view("hearer").in_.get(("citizen", HEARD))

    await _settle(lambda: found.settled if (found := link()) else 0, target.said)
    found = link()
    account.close(
        "events of the honest publisher",
        target.said,
        handled=found.settled if found else 0,
    )
    if found and found.lost:
        account.problems.append(f"the honest publisher lost {found.lost} events")


def _received(view: LedgerView) -> int:
    return sum(each.received for each in view.in_.values())


def _settled(view: LedgerView) -> int:
    return sum(each.settled for each in view.in_.values())


def _unsettled(view: LedgerView) -> int:
    return _received(view) - _settled(view)


async def _settle(read: Callable[[], int], goal: int) -> int:
    """Return a figure when it has come to what it should be, or will not any more."""
    give_up_s = time.monotonic() + _PATIENCE_S
    # Counters in shared memory wake nobody
    while (figure := read()) < goal and time.monotonic() < give_up_s:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_S)
    return figure


async def _main(frames: int, seed: int, folder: Path) -> int:
    async with Target(RunDir(folder / "m"), folder) as target:
        account = await fuzz(frames, seed, target)
    sys.stdout.write(f"{frames:,} frames, seed {seed}\n{account.table()}")
    return 1 if account.problems else 0


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=100_000, help="how many (default 100,000)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed throws the same frames")
    options = parser.parse_args()
    # Sockets lie in it, and their paths end at 107 bytes
    with tempfile.TemporaryDirectory(prefix="lg-", dir="/tmp") as folder:
        return asyncio.run(_main(options.frames, options.seed, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
