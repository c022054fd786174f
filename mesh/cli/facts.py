"""What `mesh status` knows: supervisord's word, the agents' ledgers and cards, joined."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mesh.account import LinkAccount, account
from mesh.card import read_cards
from mesh.ledger_views import LedgerView, read_ledgers
from mesh.replicas import group_of, number_of
from mesh.supervision.conf import INFRASTRUCTURE
from mesh.supervision.last_words import last_warning, last_words
from mesh.supervision.supervisord import ProcessInfo, SupervisorClient
from mesh.topic_map import disagreements

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.rundir import RunDir

#: What the forwarder counts and nobody misses.
_NO_DROPS = ("frames", "subscriptions", "unheard_own")
#: Beats come once a second; one that is so much older is news.
STALE_BEAT_S = 5.0


@dataclass(frozen=True, slots=True)
class ProgramFacts:
    """How one program is doing."""

    name: str
    #: The agent of which it is a replica: itself, mostly.
    group: str
    #: ready, starting, silent, failed or stopped.
    state: str
    #: supervisord's word: RUNNING, BACKOFF, FATAL, ...
    supervisor_state: str
    pid: int | None
    uptime_s: float | None
    ready: bool
    #: The program's own word: starting, ready, draining, stopped.
    phase: str | None
    restarts: int
    beat_age_s: float | None
    handled: int
    failed: int
    lost: int
    dropped: dict[str, int]
    queue: int
    lag_ms: float
    sources: str
    latency_us: dict[str, float | None]
    #: The last line it printed, when it failed.
    last_words: str | None
    problems: list[str] = field(default_factory=list)

    @property
    def waits_to_speak(self) -> bool:
        """Say whether its source begins as soon as all agents are READY; a dead one's does not."""
        return self.sources == "waiting" and self.state in ("starting", "ready", "silent")


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """How all replicas of one agent are doing."""

    replicas: int
    ready: int
    handled: int
    failed: int
    lost: int


@dataclass(frozen=True, slots=True)
class MeshFacts:
    """How a mesh is doing."""

    directory: str
    supervisor_pid: int
    programs: list[ProgramFacts]
    links: dict[str, LinkAccount]
    lost: int
    in_flight: int
    #: Agents with several replicas.
    groups: dict[str, GroupFacts]
    #: Types that are declared durable and travel live, because the settings say so.
    downgraded: list[str]
    #: By type: who takes it for durable and who for live, where not all agree.
    disagreements: dict[str, str]

    @property
    def problems(self) -> list[str]:
        """List what is wrong, in words."""
        return [f"{each.name}: {words}" for each in self.programs for words in each.problems]

    def to_dict(self) -> dict[str, Any]:
        """Give the facts as plain data."""
        return {
            "directory": self.directory,
            "supervisor_pid": self.supervisor_pid,
            "well": not self.problems,
            "problems": self.problems,
            "lost": self.lost,
            "in_flight": self.in_flight,
            "lost_by_link": {name: link.lost for name, link in self.links.items() if link.lost},
            "programs": [asdict(each) for each in self.programs],
            "groups": {name: asdict(each) for name, each in self.groups.items()},
            "downgraded": self.downgraded,
            "disagreements": self.disagreements,
            "links": {name: link.to_dict() for name, link in self.links.items()},
        }


async def look(rundir: RunDir) -> MeshFacts:
    """
    Gather everything that can be known of a mesh from outside.

    Raises:
        SupervisorUnavailableError: None runs there.
    """
    client = SupervisorClient(rundir.socket("supervisor"))
    processes = await client.processes()
    views = read_ledgers(rundir.ledgers)
    cards = read_cards(rundir)
    hears = {name: frozenset(card.hears) for name, card in cards.items()}
    joined = account(views, hears)
    programs = [_facts(rundir, each, views.get(each.name)) for each in _in_order(processes)]
    return MeshFacts(
        directory=str(rundir.path),
        supervisor_pid=await client.pid(),
        programs=programs,
        links=dict(joined.links),
        lost=joined.lost,
        in_flight=joined.in_flight,
        groups=_groups(programs, views, joined.links),
        downgraded=sorted({topic for card in cards.values() for topic in card.downgraded}),
        disagreements=disagreements(rundir),
    )


def _groups(
    programs: list[ProgramFacts],
    views: Mapping[str, LedgerView],
    links: Mapping[str, LinkAccount],
) -> dict[str, GroupFacts]:
    """Sum up the replicas of each agent that has several; what scaled-away ones did counts, too."""
    found: dict[str, list[ProgramFacts]] = {}
    for each in programs:
        found.setdefault(each.group, []).append(each)
    return {
        group: GroupFacts(
            replicas=len(members),
            ready=sum(each.ready for each in members),
            handled=sum(view.handled for name, view in views.items() if group_of(name) == group),
            failed=sum(view.failed for name, view in views.items() if group_of(name) == group),
            lost=sum(
                link.lost
                for name, link in links.items()
                if group_of(name.rpartition(">")[2]) == group
            ),
        )
        for group, members in found.items()
        if len(members) > 1
    }


def _in_order(processes: list[ProcessInfo]) -> list[ProcessInfo]:
    """Put replicas behind their agent."""
    places = {each.name: place for place, each in enumerate(processes)}
    return sorted(
        processes,
        key=lambda each: (
            places.get(group_of(each.name), places[each.name]),
            number_of(each.name),
        ),
    )


def _facts(rundir: RunDir, process: ProcessInfo, view: LedgerView | None) -> ProgramFacts:
    runs = process.state in ("RUNNING", "STARTING", "STOPPING")
    mine = view is not None and runs and view.pid == process.pid
    ready = mine and view is not None and view.state == "ready"
    age_s = time.monotonic() - view.beat_mono_s if mine and view and view.beat_mono_s else None
    ended_badly = (
        process.state in ("FATAL", "BACKOFF")
        or (process.state == "EXITED" and process.exit_status != 0)
        # Tried again after it had ended: what it said then is the best anybody knows
        or (process.state in ("STARTING", "RUNNING") and not ready and process.stopped_at_s > 0)
    )
    return ProgramFacts(
        name=process.name,
        group=group_of(process.name),
        state=_state(process, ready=ready, age_s=age_s),
        supervisor_state=process.state,
        pid=process.pid or None,
        uptime_s=max(0.0, time.time() - process.started_at_s) if runs else None,
        ready=ready,
        phase=view.state if mine and view else None,
        restarts=max(0, view.incarnation - 1) if view else 0,
        beat_age_s=age_s,
        handled=view.handled if view else 0,
        failed=view.failed if view else 0,
        lost=sum(each.lost for each in view.in_.values()) if view else 0,
        dropped=_dropped(process.name, view),
        queue=view.queue if mine and view else 0,
        lag_ms=view.lag_s * 1e3 if mine and view else 0.0,
        sources=view.sources if view else "none",
        latency_us={
            "p50": view.latency_us(50) if view else None,
            "p99": view.latency_us(99) if view else None,
        },
        last_words=last_words(rundir, process) if ended_badly else None,
        problems=_problems(rundir, process, view, ready=ready, age_s=age_s),
    )


def _state(process: ProcessInfo, *, ready: bool, age_s: float | None) -> str:
    if process.state == "STOPPED":
        return "stopped"
    if process.has_given_up:
        return "failed"
    if not ready:
        return "starting"
    return "ready" if age_s is None or age_s <= STALE_BEAT_S else "silent"


def _problems(
    rundir: RunDir,
    process: ProcessInfo,
    view: LedgerView | None,
    *,
    ready: bool,
    age_s: float | None,
) -> list[str]:
    if process.state == "STOPPED" and not process.started_at_s:
        return []  # autostart=false: nobody meant it to run
    if process.state != "RUNNING" and not (process.state == "STARTING" and ready):
        return [f"is {process.state}"]
    if not ready:
        why = last_warning(rundir, process)
        return [f"is not READY: {why}" if why else "is not READY"]
    if age_s is None or age_s > STALE_BEAT_S:
        return ["has not beaten yet" if age_s is None else f"last beat {age_s:.1f} s ago"]
    if view is not None and view.sources == "failed":
        return ["its source failed"]
    return []


def _dropped(name: str, view: LedgerView | None) -> dict[str, int]:
    if view is None:
        return {}
    if name in INFRASTRUCTURE:
        # The forwarder counts what it passed on as well
        return {reason: n for reason, n in view.dropped.items() if n and reason not in _NO_DROPS}
    return {reason: amount for reason, amount in view.dropped.items() if amount}
