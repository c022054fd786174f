"""Who gets which live event: every key one replica, and at no moment two."""

from __future__ import annotations

import random

import pytest

from mesh.replicas import SLOTS, Roster, replica_names, slots_of
from mesh.supervision.sharing import Rosters, Seen


class Group:
    """Agents that act on what the monitor said last, as far as they have heard it."""

    def __init__(self) -> None:
        self.rosters = Rosters()
        self.now_ms = 0
        self.ready: dict[str, bool] = {}
        self.acts_on: dict[str, Roster | None] = {}

    def begin(self, name: str, *, ready: bool = True) -> None:
        """Start a process: without a word it has all, unless others may have had it before."""
        is_one_of_many = name != "a" or "a" in self.rosters.current
        self.acts_on[name] = Roster(0, (), ()) if is_one_of_many else None
        self.ready[name] = ready

    def end(self, name: str) -> None:
        del self.ready[name], self.acts_on[name]

    def turn(self) -> list[tuple[str, Roster]]:
        seen = [
            Seen(
                name=name,
                ready=ready,
                draining=False,
                silent=False,
                version=acts_on.version if (acts_on := self.acts_on[name]) else 0,
            )
            for name, ready in self.ready.items()
        ]
        self.now_ms += 1000
        return self.rosters.turn(seen, now_ms=self.now_ms, patient=True)

    def hear(self, words: list[tuple[str, Roster]]) -> None:
        for name, roster in words:
            acts_on = self.acts_on.get(name)
            if name in self.acts_on and (acts_on is None or roster.version > acts_on.version):
                self.acts_on[name] = roster

    def slots(self) -> list[int]:
        taken: list[int] = []
        for name, roster in self.acts_on.items():
            taken += range(SLOTS) if roster is None else roster.slots_of(name)
        return taken

    def settle(self) -> None:
        for _ in range(10):
            self.hear(self.turn())


def test_an_agent_alone_needs_no_roster() -> None:
    group = Group()
    group.begin("a")
    group.settle()

    assert group.rosters.current == {}
    assert group.acts_on == {"a": None}


def test_when_all_is_said_every_slot_has_one_owner() -> None:
    group = Group()
    for name in ("a", "a@2", "a@3"):
        group.begin(name)
        group.settle()
        assert sorted(group.slots()) == list(range(SLOTS))
    group.end("a")
    group.settle()
    assert sorted(group.slots()) == list(range(SLOTS))
    assert group.rosters.is_settled(group.ready)


def test_an_agent_alone_again_has_everything() -> None:
    group = Group()
    for name in ("a", "a@2"):
        group.begin(name)
    group.settle()
    group.end("a@2")
    group.settle()

    assert group.rosters.current == {}
    assert sorted(group.slots()) == list(range(SLOTS))


@pytest.mark.parametrize("seed", range(30))
def test_at_no_moment_has_a_slot_two_owners(seed: int) -> None:
    """Whatever comes, dies, and hears the monitor late or not at all."""
    chance, group = random.Random(seed), Group()
    group.begin("a")
    said: list[tuple[str, Roster]] = []
    for _ in range(300):
        name = chance.choice(["a", "a@2", "a@3", "a@4"])
        act = chance.random()
        if act < 0.1 and name not in group.ready:
            group.begin(name, ready=False)
        elif act < 0.2 and name in group.ready:
            group.end(name)
        elif act < 0.4 and name in group.ready:
            group.ready[name] = True
        elif act < 0.7:
            said += group.turn()
        chance.shuffle(said)
        heard = [said.pop() for _ in range(min(len(said), chance.randrange(3)))]
        group.hear([word for word in heard if chance.random() < 0.8])

        assert len(group.slots()) == len(set(group.slots()))
    group.settle()
    for name in group.ready:
        group.ready[name] = True
    group.settle()

    assert sorted(group.slots()) == (list(range(SLOTS)) if group.ready else [])


def test_slots_are_spread_and_few_of_them_move() -> None:
    for count in range(1, 16):
        names = replica_names("features", count)
        before = {name: slots_of(name, names) for name in names}
        more = replica_names("features", count + 1)
        after = {name: slots_of(name, more) for name in more}

        assert sorted(slot for slots in before.values() for slot in slots) == list(range(SLOTS))
        assert all(after[name] <= before[name] for name in names)
        assert all(len(slots) > SLOTS / count / 3 for slots in before.values())
