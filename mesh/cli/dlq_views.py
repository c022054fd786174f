"""How `mesh dlq` shows letters, groups of them, and what a replay did."""

from __future__ import annotations

import json
import shutil
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mesh.cli import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.dead_letter_queue import DeadGroup, ReplayReport
    from mesh.deadletters import DeadLetter

#: Of an error, a table in a terminal shows so much, or half a line where that is more.
_CELL = 80
_REFUSED = 20
_BYTES = 200


def group_facts(group: DeadGroup) -> dict[str, Any]:
    """Give a group as plain data."""
    return {
        "agent": group.agent,
        "handler": group.handler,
        "reason": group.reason,
        "error": group.error,
        "count": group.count,
        "oldest": _moment(group.oldest_s),
        "newest": _moment(group.newest_s),
    }


def report_facts(report: ReplayReport) -> dict[str, Any]:
    """Give what a replay did as plain data."""
    return {
        "dry_run": report.dry_run,
        "matched": report.matched,
        "replayed": report.replayed,
        "sent": [
            {"agent": agent, "handler": handler, "count": count}
            for (agent, handler), count in report.sent.items()
        ],
        "published": report.published,
        "refused": [{"id": each.id, "why": each.why} for each in report.refused],
    }


def show_groups(groups: Sequence[DeadGroup], limit: int, total: int) -> None:
    """Print groups."""
    now_s = time.time()
    say.table(
        ("count", "agent", "handler", "reason", "error", "oldest", "newest"),
        [
            (
                each.count,
                each.agent,
                each.handler,
                each.reason,
                _first_line(each.error),
                _ago(each.oldest_s, now_s),
                _ago(each.newest_s, now_s),
            )
            for each in groups[:limit]
        ],
    )
    say.line(f"{say.counted(total, 'dead letter')} in {say.counted(len(groups), 'group')}")
    if len(groups) > limit:
        hidden = say.counted(len(groups) - limit, "smaller group")
        say.note(f"not shown: {hidden}; --limit shows more")


def show_letters(letters: Sequence[DeadLetter], total: int) -> None:
    """Print one line a letter."""
    now_s = time.time()
    say.table(
        ("id", "agent", "handler", "type", "reason", "tries", "failed", "error"),
        [
            (
                each.id,
                each.agent,
                each.handler,
                each.topic,
                each.reason,
                each.attempts,
                _ago(each.at_s, now_s),
                _first_line(each.error),
            )
            for each in letters
        ],
    )
    if len(letters) < total:
        hidden = say.counted(total - len(letters), "older letter")
        say.note(f"not shown: {hidden}; --limit shows more")


def show_letter(letter: DeadLetter) -> None:
    """Print all of a letter."""
    handler = f", handler {letter.handler}" if letter.handler else ""
    say.line(f"letter   {letter.id}")
    say.line(f"agent    {letter.agent}{handler}")
    say.line(f"type     {letter.topic}")
    say.line(f"reason   {letter.reason} after {say.counted(letter.attempts, 'try', 'tries')}")
    say.line(f"failed   {_moment(letter.at_s)}, first {_moment(letter.first_at_s)}")
    say.line(f"error    {letter.error}", "red")
    if letter.traceback_hash:
        say.line(f"place    {letter.traceback_hash}: the same for all errors of the same lines")
    if letter.event is None:
        say.line(f"bytes    {(letter.frame or b'')[:_BYTES]!r}")
    else:
        say.line("event")
        text = json.dumps(letter.event, indent=2, default=str, ensure_ascii=False)
        for row in text.splitlines():
            say.line(f"  {row}")
    if letter.original is not None:
        say.line("edited: `--json` holds what stood there first, as `original`")
    if letter.history:
        say.line("before")
        for each in letter.history:
            say.line(f"  {_moment(each.at_s)} {each.error}")


def show_report(report: ReplayReport) -> None:
    """Print what a replay did, or would do."""
    if not report.matched:
        say.note("there is no such dead letter; `mesh dlq ls` shows what there is")
        return
    would = "would go" if report.dry_run else "went"
    for (agent, handler), count in report.sent.items():
        to = f"{agent}.{handler}" if handler else f"all handlers of {agent}"
        say.line(f"{count} {would} to {to}", "green")
    for topic, count in report.published.items():
        again = "would be published" if report.dry_run else "published"
        say.line(f"{again} again as {topic}: {count}", "green")
    for each in report.refused[:_REFUSED]:
        say.line(f"refused {each.id}: {each.why}", "yellow")
    if len(report.refused) > _REFUSED:
        say.line(f"and {len(report.refused) - _REFUSED} more; --json lists all", "yellow")


def _first_line(error: str) -> str:
    first = error.partition("\n")[0]
    room = max(_CELL, shutil.get_terminal_size().columns // 2)
    # A pipe has room for all of it
    if len(first) <= room or not say.is_terminal():
        return first
    return f"{first[: room - 3]}..."


def _moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")


def _ago(at_s: float, now_s: float) -> str:
    return f"{say.duration(max(0.0, now_s - at_s))} ago"
