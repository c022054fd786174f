"""What `mesh new` writes."""

from __future__ import annotations

import pprint
import types
import typing
from textwrap import indent
from typing import Any

from mesh.events import EventType

#: What makes agents/ a package of the project's own.
PACKAGE = '"""The agents of this project, one a file."""\n'
GITIGNORE = ".mesh/\n.venv/\n__pycache__/\n"
#: `pytest` alone, without `python -m`, does not look for packages in the project.
PYTEST = """\
[tool.pytest.ini_options]
pythonpath = ["."]
asyncio_default_fixture_loop_scope = "function"
"""

#: A supervisord.conf that has no agent yet.
_CONFIGURATION = """\
; LEGION mesh: every agent a process, kept by supervisord.
;
;   mesh up                              renders this file for MESH_DIR and starts it
;   supervisord -c supervisord.conf      starts it as it stands, in .mesh beside this file
;
; One [program:NAME] an agent: the program, the script agents/NAME.py, the source of its heartbeats
; and the agent= in its log carry the same name. `mesh new NAME` adds one.

[supervisord]
directory=%(here)s
logfile=%(here)s/.mesh/log/supervisord.log
logfile_maxbytes=5MB
logfile_backups=2
pidfile=%(here)s/.mesh/run/supervisord.pid
childlogdir=%(here)s/.mesh/log
umask=077
environment=MESH_DIR="%(here)s/.mesh",MESH_SUPERVISED="1"

[unix_http_server]
file=%(here)s/.mesh/run/supervisor.sock
chmod=0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

; Without it a full disk ends supervisord, and every agent with it.
[rpcinterface:full_disk]
supervisor.rpcinterface_factory=mesh.supervision.full_disk:make_rpcinterface

[supervisorctl]
serverurl=unix://%(here)s/.mesh/run/supervisor.sock

; exitcodes=78: a configuration error does not become right by trying again; everything else does.
; stopasgroup=false: a group SIGTERM would kill the workers of a job in flight.
; Output goes to small files of our own; agents log to log/NAME.log themselves.
"""

#: The processes that every mesh has, in the order of their start.
_INFRASTRUCTURE = {
    "forwarder": "mesh.brokers.forwarder",
    "monitor": "mesh.supervision.monitor",
}

_PROGRAM = """\
[program:{name}]
command={python} -m {module}
environment=MESH_AGENT="{name}"
directory=%(here)s
priority={priority}
autorestart=unexpected
exitcodes=78
startsecs=1
startretries={retries}
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

{declarations}from mesh import {imports}


class {kind}(Agent):
    """What this agent is for."""

    @on({hears_code})
    async def on_event(self, event: Event) -> None:
        {publish}


if __name__ == "__main__":
    run({kind})
'''

_HEARD = 'await self.publish({says}, {{"heard": event.id}}, key=event.key)'
_DECLARATIONS = "import agents.payloads  # noqa: F401 - declares what its events carry\n"

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

        assert answer.causation_id == asked.id
        assert answer.correlation_id == asked.correlation_id
'''


def configuration(python: str) -> str:
    """Write a supervisord.conf for a mesh without agents; `python` is the interpreter's path."""
    programs = [
        _PROGRAM.format(name=name, python=python, module=module, priority=10 * number, retries=20)
        for number, (name, module) in enumerate(_INFRASTRUCTURE.items(), 1)
    ]
    return "\n".join([_CONFIGURATION, *programs])


def agent_section(name: str, python: str) -> str:
    """Write the section of an agent, where there is none to take the form from."""
    module = f"mesh.runtime agents/{name}.py"
    return _PROGRAM.format(name=name, python=python, module=module, priority=100, retries=3)


def agent_script(
    name: str, hears: str, says: str, *, payload: dict[str, object] | None, declares: bool
) -> str:
    """
    Write the script of an agent.

    Args:
        name: The agent's.
        hears: A topic.
        says: Another.
        payload: What it says; None: whatever it likes.
        declares: The project's agents/payloads.py declares something about these topics.
    """
    built_in = any(topic in list(EventType) for topic in (hears, says))
    return _SCRIPT.format(
        hears=hears,
        says=says,
        imports=", ".join(["Agent", "Event", *(["EventType"] if built_in else []), "on", "run"]),
        kind=class_name(name),
        hears_code=_code(hears),
        declarations=_DECLARATIONS if declares else "",
        publish=_HEARD.format(says=_code(says)) if payload is None else _says(says, payload),
    )


def agent_test(name: str, hears: str, says: str, *, payload: dict[str, object]) -> str:
    """Write the test of an agent."""
    return _TEST.format(name=name, hears=hears, says=says, payload=_shown(payload))


def _says(topic: str, payload: dict[str, object]) -> str:
    made = indent(f"made = {_shown(payload)}", "        ").lstrip()
    return f"{made}\n        await self.publish({_code(topic)}, made, key=event.key)"


def _shown(payload: dict[str, object]) -> str:
    shown = pprint.pformat(payload, width=80, sort_dicts=False)
    if "\n" in shown:
        shown = "{\n" + indent(f" {shown[1:-1]},", "   ", lambda _: True) + "\n}"
    return shown.replace("'", '"')


def class_name(name: str) -> str:
    """Turn an agent's name into its class's: ``my_agent`` becomes ``MyAgent``."""
    made = "".join(word.capitalize() for word in name.split("_"))
    return f"{made}Agent" if made in ("Agent", "Event", "EventType") else made


def sample_of(schema: Any) -> dict[str, object]:
    """Invent a payload with every field a class asks for, or the first of several classes."""
    if typing.get_origin(schema) in (typing.Union, types.UnionType):
        return sample_of(typing.get_args(schema)[0])
    hints = typing.get_type_hints(schema)
    return _tag_of(schema) | {
        name: _value_of(hint) for name, hint in hints.items() if not name.startswith("_")
    }


def _tag_of(schema: Any) -> dict[str, object]:
    """Give what tells a class of a union from the others."""
    config = getattr(schema, "__struct_config__", None)
    return {} if config is None or config.tag is None else {config.tag_field: config.tag}


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
