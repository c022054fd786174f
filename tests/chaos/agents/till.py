"""Says orders and ticks under one name, in all the ways there are, and swears to what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesh import Agent, run, source
from tests.chaos.words import NO_KEY, ORDER, TICK, Notes, highest_numbers

_KEYS = 8
#: Orders of one turn: in one step, or one by one with a batch without keys at the end.
_TURN = 5


class Till(Agent):
    """An odd-numbered till publishes; an even one makes steps and keeps its place in its state."""

    async def setup(self) -> None:
        self.count = int(self.params["orders"])
        self.rate = float(self.params["rate"])
        self.steps = self.name.endswith("2")
        if self.steps:
            await self.keep_state()
        self.notes = Notes(self.name)
        # Tries of an earlier life: what became of the last is not known
        self.tried = highest_numbers(Path(self.notes.path))

    async def teardown(self) -> None:
        self.notes.close()

    @source
    async def sell(self) -> None:
        if self.steps:
            said = self.ctx.state.get("said", {})
            # Kept together with the events: whatever it says was accepted
            self.notes.write_all([("said", key, number) for key, number in said.items() if number])
        begun_s, sold = self.clock.mono_s(), 0
        while (so_far := self.so_far()) < self.count:
            if self.steps:
                await self.in_a_step()
            else:
                await self.one_by_one()
            sold += self.so_far() - so_far
            await self.clock.sleep(begun_s + sold / self.rate - self.clock.mono_s())

    def so_far(self) -> int:
        if self.steps:
            return sum(self.ctx.state.get("said", {}).values())
        return sum(amount for key, amount in self.tried.items() if key != TICK)

    async def one_by_one(self) -> None:
        for _ in range(_TURN):
            key = f"k{self.so_far() % _KEYS}"
            number = self.tried[key] = self.tried[key] + 1
            self.notes.write("tried", key, number)
            await self.publish(ORDER, self.order(key, number), key=f"{self.name}.{key}")
            self.notes.write("kept", key, number)
            await self.tick()
        numbers = range(self.tried[NO_KEY] + 1, self.tried[NO_KEY] + 3)
        self.tried[NO_KEY] = numbers[-1]
        self.notes.write_all([("tried", NO_KEY, number) for number in numbers])
        await self.publish_batch([(ORDER, self.order(NO_KEY, number)) for number in numbers])
        self.notes.write_all([("kept", NO_KEY, number) for number in numbers])

    async def in_a_step(self) -> None:
        said = self.ctx.state.get("said", {})
        begun = sum(said.values())
        made: list[tuple[str, int]] = []
        for number in range(begun, begun + _TURN):
            key = f"k{number % _KEYS}"
            said[key] = said.get(key, 0) + 1
            made.append((key, said[key]))
        self.notes.write_all([("tried", *each) for each in made])
        async with self.step(f"orders from {begun}") as ctx:
            for key, number in made:
                await self.publish(ORDER, self.order(key, number), key=f"{self.name}.{key}")
            ctx.state["said"] = said
        self.notes.write_all([("kept", *each) for each in made])
        for _ in made:
            await self.tick()

    def order(self, key: str, number: int) -> dict[str, Any]:
        return {"publisher": self.name, "key": key, "number": number}

    async def tick(self) -> None:
        number = self.tried[TICK] = self.tried[TICK] + 1
        self.notes.write("tried", TICK, number)
        await self.publish(TICK, {"publisher": self.name, "number": number})


if __name__ == "__main__":
    run(Till)
