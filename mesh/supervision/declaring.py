"""
What agents hear durably is kept for them before the first one starts: `mesh up` asks their scripts.

An agent that boots late, or fails at first, then misses nothing. `supervisord -c` alone cannot do
that: there each agent declares its group when it starts.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

import msgspec

from mesh.factory import make_broker
from mesh.supervision.conf import programs_of, script_of
from mesh.topics import replay_topic
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from mesh.config import MessageBusConfig
    from mesh.rundir import RunDir

_SURVEY_S = 30.0


class Finding(Value, frozen=True, kw_only=True):
    """What a script says of its agent."""

    script: str
    durable: tuple[str, ...] = ()
    start: str = "now"
    #: Why there is nothing to say; the agent itself will tell the same.
    problem: str = ""


async def survey(
    project: Path, scripts: Sequence[str], environ: Mapping[str, str]
) -> dict[str, Finding]:
    """
    Ask scripts what they hear, each in a process of its own: a broken one harms nobody.

    Args:
        project: Where they are.
        scripts: Their paths, from there.
        environ: The settings.

    Returns:
        What was found, by script; nothing of those that did not answer in time.
    """
    asking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mesh.survey", *scripts),
        cwd=project,
        env=dict(environ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_SURVEY_S):
            said, _ = await asking.communicate()
    except TimeoutError:
        return {}
    finally:
        if asking.returncode is None:
            asking.kill()
            await asking.wait()
    try:
        findings = msgspec.json.decode(said, type=list[Finding])
    except msgspec.MsgspecError:
        return {}
    return {each.script: each for each in findings}


async def declare_groups(
    project: Path,
    rundir: RunDir,
    config: MessageBusConfig,
    agents: Collection[str] | None = None,
) -> list[str]:
    """
    Let the journal keep from now on what agents hear; those that it knows keep their place.

    Args:
        project: Where supervisord.conf and agents/ are.
        rundir: The mesh's directory.
        config: The settings of the mesh.
        agents: Only these; default all.

    Returns:
        The agents whose scripts could not be asked.

    Raises:
        ConfigurationError: The journal cannot keep what it promises.
        BrokerUnavailableError: It does not answer.
    """
    found = {
        name: script_of(project, name)
        for name in programs_of(project)
        if agents is None or name in agents
    }
    scripts = {name: script for name, script in found.items() if script is not None}
    if not scripts:
        return []
    environ = {**os.environ, "MESH_DIR": str(rundir.path)}
    findings = await survey(project, sorted(set(scripts.values())), environ)
    said = {name: findings.get(script) for name, script in scripts.items()}
    durable = {name: each for name, each in said.items() if each is not None and each.durable}
    if durable:
        async with make_broker(config, rundir.path).make_journal() as journal:
            for name, each in durable.items():
                await journal.declare(name, [*each.durable, replay_topic(name)], start=each.start)
    return [name for name, each in said.items() if each is None or each.problem]
