"""Which agents a mesh has: those of its supervisord.conf, and those that run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.card import read_cards
from mesh.cli.place import CONF
from mesh.replicas import group_of
from mesh.supervision.conf import INFRASTRUCTURE, programs_of

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.cli.place import Place


@dataclass(frozen=True, slots=True)
class KnownAgents:
    """The agents of a mesh, by the names of their groups."""

    #: Where they are written down; None: nowhere.
    conf: Path | None
    #: Those that stand there.
    written: frozenset[str]
    #: Those of which a process runs here, with its pid.
    running: dict[str, int]
    #: Those that have run here since the mesh was last started, and what they hear durably.
    seen: dict[str, frozenset[str]]

    @property
    def names(self) -> frozenset[str]:
        """Give all that are to be reckoned with; where nothing is written down, all ever seen."""
        return self.written.union(self.seen if self.conf is None else self.running)

    def hears(self, group: str) -> frozenset[str]:
        """Give what an agent heard durably when it last ran."""
        return self.seen.get(group, frozenset())

    def is_stray(self, group: str) -> bool:
        """Say whether a group belongs to no agent, as far as that is written down."""
        return self.conf is not None and group not in self.names


def known_agents(place: Place) -> KnownAgents:
    """
    Look up the agents of a mesh, from its project or else from what it was last started with.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    rundir = place.rundir
    folders = [place.project, rundir.path / "conf"]
    folder = next((each for each in folders if (each / CONF).is_file()), None)
    programs = [] if folder is None else programs_of(folder)
    cards = read_cards(rundir)
    groups = {name: card.group or group_of(name) for name, card in cards.items()}
    seen: dict[str, frozenset[str]] = {}
    for name, group in groups.items():
        seen[group] = seen.get(group, frozenset()).union(cards[name].durable)
    running: dict[str, int] = {}
    for name, group in groups.items():
        pid = rundir.holder(rundir.lock(name))
        if pid is not None:
            running[group] = pid
    return KnownAgents(
        conf=None if folder is None else folder / CONF,
        # A program can be given another group than its name says; then its card tells
        written=frozenset(
            groups.get(name, group_of(name)) for name in programs if name not in INFRASTRUCTURE
        ),
        running=running,
        seen=seen,
    )
