"""
A process on a journal, made to be killed: ``python -m tests.plumbing.journal_worker ROLE``.

What it was promised it writes into a file of its own with O_APPEND, one line a fact, so that a test
can hold the journal to it after any death.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mesh.journal import Journal, Record, Step
from mesh.journals.redis import RedisJournal
from mesh.journals.sqlite import SQLiteJournal

_KEYS = 7


def open_journal(where: str) -> Journal:
    """Give a journal in a file, or where a URL of Redis says; not connected."""
    if "://" in where:
        return RedisJournal(url=where, allow_volatile="LEGION_TEST_REDIS_URL" in os.environ)
    return SQLiteJournal(Path(where))


class Account:
    """Lines that survive the death of their writer."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, *words: object) -> None:
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())


async def append(path: str, account: str, name: str, count: int) -> None:
    """Append `count` events in batches of several sizes; note what was accepted."""
    notes = Account(account)
    async with open_journal(path) as journal:
        number = 0
        while number < count:
            batch = [
                Record("order", f"{name}-{at}", b"%d" % at, f"key-{name}-{at % _KEYS}")
                for at in range(number, min(count, number + 1 + number % 13))
            ]
            await journal.append(batch)
            notes.note("accepted", *(record.id for record in batch))
            number += len(batch)


async def handle(path: str, account: str, consumer: str) -> None:
    """Turn each order into a fill, with a sum in the state, until killed."""
    notes = Account(account)
    async with open_journal(path) as journal:
        state = await journal.load_state("risk")
        count = int(state.get(f"count-{consumer}", b"0"))
        while True:
            for delivery in await journal.read("risk", consumer, limit=50, wait_s=1.0):
                notes.note("handled", delivery.id, delivery.deliveries)
                count += 1
                step = Step(
                    acks=[delivery],
                    records=[Record("fill", f"{consumer}:{count}", delivery.id.encode())],
                    state={f"count-{consumer}": b"%d" % count},
                )
                if await journal.commit("risk", consumer, [step]):
                    notes.note("refused", delivery.id)
                    count -= 1


async def die_of(path: str, account: str, consumer: str, poison: str) -> None:
    """Handle orders; die in the handler of one of them."""
    notes = Account(account)
    async with open_journal(path) as journal:
        while batch := await journal.read("risk", consumer):
            for delivery in batch:
                notes.note("handled", delivery.id, delivery.deliveries)
                if delivery.id == poison and delivery.deliveries < 5:
                    os.kill(os.getpid(), 9)
                await journal.commit("risk", consumer, [Step(acks=[delivery])])


def main(arguments: list[str]) -> None:
    role, *rest = arguments
    if role == "append":
        asyncio.run(append(rest[0], rest[1], rest[2], int(rest[3])))
    elif role == "handle":
        asyncio.run(handle(rest[0], rest[1], rest[2]))
    elif role == "die-of":
        asyncio.run(die_of(rest[0], rest[1], rest[2], rest[3]))
    else:
        raise SystemExit(f"no role {role!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
