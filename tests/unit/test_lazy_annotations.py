"""
Signatures in a module whose annotations are no text: evaluated when it is loaded, or from Python
3.14 on when somebody asks, which fails for names that only type checkers know.
"""

# No `from __future__ import annotations`: that is the point
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from mesh import Agent, HandlerSignatureError, every, on
from mesh.testing import AgentHarness

if TYPE_CHECKING:
    from mesh import Event


async def test_a_payload_class_within_a_function_is_understood() -> None:
    heard: list[object] = []

    class Local(msgspec.Struct):
        kind: str

    class Ear(Agent):
        @on("a.b")
        async def hear(self, local: Local, event: "Event") -> None:
            heard.append((local, event.data))

    async with AgentHarness(Ear) as harness:
        await harness.say("a.b", {"kind": "fig"})

    assert heard == [(Local("fig"), {"kind": "fig"})]


def test_a_timer_that_takes_something_is_refused() -> None:
    with pytest.raises(HandlerSignatureError, match="tick takes event; timers and sources"):

        class Ear(Agent):
            @every(1.0)
            async def tick(self, event: "Event") -> None: ...


@pytest.mark.skipif(sys.version_info < (3, 14), reason="evaluated when the function is made")
def test_a_name_that_only_type_checkers_know_is_not_evaluated() -> None:
    script = """
class Ear(Agent):
    @on("a.b")
    async def hear(self, payload: Payload, event: Event) -> Unknown: ...

    @every(1.0)
    async def tick(self) -> Unknown: ...
"""
    payload = msgspec.defstruct("Payload", [("kind", str)])

    exec(script, {"Agent": Agent, "on": on, "every": every, "Payload": payload})
