"""
Decides who shares a group's live events. Pure: what is known comes in, words to agents go out.

A change has two steps. First every member keeps only what it had and will have; when each of them
has said so, the new order holds. So no event is ever handled by two; what belongs to a key that
moves, and comes in these milliseconds, is handled by nobody, and counts as lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.replicas import MARK, Roster, group_of
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterable


class Seen(Value, frozen=True, kw_only=True):
    """What the monitor knows of one process of a group."""

    name: str
    #: Its last beat said READY.
    ready: bool
    #: It hears nothing any more.
    draining: bool
    #: Supervisord runs it, but it has not beaten yet: it has nothing until it is told.
    silent: bool
    #: The roster it acts on; 0: none.
    version: int


class Rosters:
    """
    The rosters of all groups of one mesh.

    Args:
        known: Those of an earlier monitor, by group.
    """

    def __init__(self, known: dict[str, Roster] | None = None) -> None:
        """Begin where another one was."""
        self.current: dict[str, Roster] = dict(known or {})

    def turn(self, seen: Iterable[Seen], *, now_ms: int, patient: bool) -> list[tuple[str, Roster]]:
        """
        Take in what is known now; gives what is to be said to whom.

        Args:
            seen: The processes that supervisord runs.
            now_ms: Where versions begin: later than any that was given before.
            patient: Wait for processes that have not beaten yet before a group gets its first.
        """
        groups: dict[str, list[Seen]] = {}
        for each in seen:
            groups.setdefault(group_of(each.name), []).append(each)
        words: list[tuple[str, Roster]] = []
        for group, members in groups.items():
            if group in self.current or any(MARK in each.name for each in members):
                words += self._turn_group(group, members, now_ms, patient=patient)
        for group in self.current.keys() - groups.keys():
            del self.current[group]
        return words

    def is_settled(self, names: Iterable[str]) -> bool:
        """Say whether every group of these programs that needs a roster has one that holds."""
        groups = {group_of(name) for name in names if MARK in name}
        rosters = [self.current.get(group) for group in groups]
        return all(each is not None and each.before == each.after for each in rosters)

    def _turn_group(
        self, group: str, members: list[Seen], now_ms: int, *, patient: bool
    ) -> list[tuple[str, Roster]]:
        wanted = tuple(sorted(each.name for each in members if each.ready and not each.draining))
        roster = self.current.get(group)
        if roster is None:
            if patient and any(each.silent for each in members):
                return []
            # Whoever runs without a roster has all, or - a replica - nothing
            before = (group,) if any(each.name == group for each in members) else ()
            roster = self.current[group] = Roster(now_ms, before, wanted)
        elif roster.before == roster.after and wanted != roster.after:
            roster = self.current[group] = Roster(roster.version + 1, roster.after, wanted)
        elif roster.before != roster.after and all(
            each.version == roster.version or each.draining or each.silent for each in members
        ):
            roster = self.current[group] = Roster(roster.version + 1, roster.after, roster.after)
        late = [each for each in members if each.version != roster.version and not each.draining]
        alone = len(members) == 1 and members[0].name == group
        if alone and not late and roster.before == roster.after == (group,):
            del self.current[group]
        return [(each.name, roster) for each in late]
