"""An agent's card: what it is, hears and says, in a small file that `mesh agents` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mesh.replicas import MAX_REPLICAS
from mesh.values import Value

if TYPE_CHECKING:
    from mesh.rundir import RunDir


class Card(Value, frozen=True, kw_only=True):
    """What an agent says of itself."""

    name: str
    pid: int
    script: str
    hears: tuple[str, ...]
    says: tuple[str, ...]
    started_at_s: float
    state: str
    #: What replicas of one agent share; empty: what the name says.
    group: str = ""
    #: What it hears durably.
    durable: tuple[str, ...] = ()
    #: What it hears live, by the settings, although it is declared durable.
    downgraded: tuple[str, ...] = ()
    #: Parameters that it has asked for so far.
    params_read: tuple[str, ...] = ()
    #: How many replicas there may be.
    max_replicas: int = MAX_REPLICAS


def write_card(rundir: RunDir, card: Card) -> None:
    """Replace the agent's card in one step."""
    path = rundir.card(card.name)
    draft = path.with_name(f".{path.name}.{card.pid}")
    draft.write_bytes(msgspec.json.encode(card))
    draft.replace(path)


def read_card(rundir: RunDir, name: str) -> Card | None:
    """Read one agent's card; None when it has none yet."""
    try:
        return msgspec.json.decode(rundir.card(name).read_bytes(), type=Card)
    except (OSError, msgspec.MsgspecError):
        return None


def read_cards(rundir: RunDir) -> dict[str, Card]:
    """Read the cards of all agents that have started in this mesh, by name."""
    cards: dict[str, Card] = {}
    for path in sorted((rundir.path / "agents").glob("[!.]*.json")):
        try:
            card = msgspec.json.decode(path.read_bytes(), type=Card)
        except (OSError, msgspec.MsgspecError):
            continue  # replaced or removed in this moment
        cards[card.name] = card
    return cards
