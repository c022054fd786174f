"""`mesh new NAME`: a working agent, its test and its program, ready to run."""

from __future__ import annotations

import keyword
import re

import click

from mesh.cli.common import project
from mesh.errors import ConfigurationError
from mesh.supervision.boot import INFRASTRUCTURE, programs_of
from mesh.topics import check_topic

_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}", re.ASCII)

_AGENT = '''"""{title}: hears {hears}, says {says}."""

from __future__ import annotations

from mesh import Agent, Event, on, run


class {title}(Agent):
    """Echoes what it hears; write your own thoughts here."""

    @on("{hears}")
    async def on_event(self, event: Event) -> None:
        await self.publish("{says}", {{"heard": event.data}})


if __name__ == "__main__":
    run({title})
'''

_TEST = '''"""The agent {name}, alone and in memory."""

from __future__ import annotations

from agents.{name} import {title}
from mesh.testing import AgentHarness


async def test_{name}_says_what_it_heard() -> None:
    async with AgentHarness({title}) as harness:
        await harness.say("{hears}", {{"number": 1}})
        event = await harness.expect("{says}")

    assert event.data == {{"heard": {{"number": 1}}}}
'''

_PROGRAM = """
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


@click.command()
@click.argument("name")
@click.option("--hears", default="system.alert", show_default=True, help="The type it hears.")
@click.option("--says", help="The type it says (default: NAME.said).")
def new(*, name: str, hears: str, says: str | None) -> int:
    r"""
    Write agents/NAME.py, tests/test_NAME.py and [program:NAME].

    \b
    mesh new hello && mesh reload
    """
    home = project()
    script, test = home / "agents" / f"{name}.py", home / "tests" / f"test_{name}.py"
    problems = _problems(name)
    problems += [f"{path} is there already" for path in (script, test) if path.exists()]
    if not problems and name in programs_of(home):
        problems.append(f"[program:{name}] is in {home / 'supervisord.conf'} already")
    if problems:
        raise ConfigurationError(problems)
    words = {
        "name": name,
        "title": "".join(part.title() for part in name.split("_")),
        "hears": check_topic(hears),
        "says": check_topic(says or f"{name}.said"),
    }
    for path, text in ((script, _AGENT), (test, _TEST)):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(**words))
    with (home / "supervisord.conf").open("a") as file:
        file.write(_PROGRAM.format(**words))
    for path in (script, test):
        click.echo(path.relative_to(home))
    click.echo(f"supervisord.conf: [program:{name}]; `mesh reload` starts it")
    return 0


def _problems(name: str) -> list[str]:
    if _NAME.fullmatch(name) is None or keyword.iskeyword(name):
        return [f"{name!r} is no agent name: use a-z 0-9 _, beginning with a letter"]
    if name in (*INFRASTRUCTURE, "payloads", "settings", "feed"):
        return [f"{name!r} is taken"]
    return []
