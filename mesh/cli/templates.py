"""What `mesh new` writes."""

from __future__ import annotations

import pprint
import types
import typing
from textwrap import indent
from typing import Any

from mesh.events import EventType

#: For a supervisord.conf that has no agent to take the form from.
SECTION = """\
[program:{name}]
command=%(here)s/.venv/bin/python -m mesh.runtime agents/{name}.py
environment=MESH_AGENT="{name}"
directory=%(here)s
priority=100
autorestart=unexpected
exitcodes=78
startsecs=1
startretries=3
stopwaitsecs=10
stopasgroup=false
killasgroup=true
redirect_stderr=true
stdout_logfile=%(here)s/.mesh/log/{name}.out
stdout_logfile_maxbytes=1MB
stdout_logfile_backups=1
"""

_SCRIPT = '''\
"""Hears {hears}, says {says}."""

from __future__ import annotations

from mesh import {imports}


class {kind}(Agent):
    """What this agent is for."""

    @on({hears_code})
    async def on_event(self, event: Event) -> None:
        await self.publish({says_code}, {{"heard": event.id}}, key=event.key)


if __name__ == "__main__":
    run({kind})
'''

_TEST = '''\
"""What `{name}` does, with nothing else running."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mesh.loading import load_agent

if TYPE_CHECKING:
    from mesh.testing import AgentHarness

SCRIPT = Path(__file__).parents[1] / "agents" / "{name}.py"
PAYLOAD: dict[str, Any] = {payload}


@pytest.mark.asyncio
async def test_it_answers(agent_harness: type[AgentHarness[Any]]) -> None:
    async with agent_harness(load_agent(SCRIPT)) as harness:
        asked = await harness.say("{hears}", PAYLOAD)

        answer = await harness.expect("{says}")

        assert answer.data == {{"heard": asked.id}}
        assert answer.correlation_id == asked.correlation_id
'''


def agent_script(name: str, hears: str, says: str) -> str:
    """Write the script of an agent."""
    built_in = any(topic in list(EventType) for topic in (hears, says))
    return _SCRIPT.format(
        hears=hears,
        says=says,
        imports=", ".join(["Agent", "Event", *(["EventType"] if built_in else []), "on", "run"]),
        kind=class_name(name),
        hears_code=_code(hears),
        says_code=_code(says),
    )


def agent_test(name: str, hears: str, says: str, *, payload: dict[str, object]) -> str:
    """Write the test of an agent."""
    shown = pprint.pformat(payload, width=90, sort_dicts=False)
    if "\n" in shown:
        shown = "{\n" + indent(f" {shown[1:-1]},", "   ", lambda _: True) + "\n}"
    return _TEST.format(name=name, hears=hears, says=says, payload=shown.replace("'", '"'))


def class_name(name: str) -> str:
    """Turn an agent's name into its class's: ``my_agent`` becomes ``MyAgent``."""
    made = "".join(word.capitalize() for word in name.split("_"))
    return f"{made}Agent" if made in ("Agent", "Event", "EventType") else made


def sample_of(schema: Any) -> dict[str, object]:
    """Invent a payload with every field a class asks for."""
    hints = typing.get_type_hints(schema)
    return {name: _value_of(hint) for name, hint in hints.items() if not name.startswith("_")}


def _value_of(hint: Any) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if type(None) in arguments else _value_of(arguments[0])
    if origin is typing.Literal:
        return arguments[0]
    if origin in (typing.Annotated, typing.Required, typing.NotRequired):
        return _value_of(arguments[0])
    simple: dict[Any, object] = {str: "x", int: 1, float: 1.0, bool: True, list: [], dict: {}}
    kind = origin or hint
    if kind in simple:
        return simple[kind]
    if isinstance(kind, type) and typing.get_type_hints(kind):
        return sample_of(kind)
    return "x"


def _code(topic: str) -> str:
    member = next((each for each in EventType if each == topic), None)
    return f'"{topic}"' if member is None else f"EventType.{member.name}"
