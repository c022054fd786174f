"""When sources may speak. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from mesh.supervision.supervisord import ProcessInfo

#: Programs that are no agents and are not waited for.
INFRASTRUCTURE = ("monitor",)


def is_open(programs: Iterable[ProcessInfo], ready: Collection[tuple[str, int]]) -> bool:
    """
    Say whether all that will come has come.

    Args:
        programs: What supervisord keeps.
        ready: Name and pid of every process whose last beat said READY.

    Returns:
        True when each program but the monitor is READY, or supervisord has given it up.
    """
    waited = [program for program in programs if program.name not in INFRASTRUCTURE]
    return bool(waited) and all(
        program.has_given_up or (program.name, program.pid) in ready for program in waited
    )
