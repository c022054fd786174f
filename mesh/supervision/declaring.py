"""
What agents hear durably is kept for them before the first one starts: `mesh up` asks their scripts.

An agent that boots late, or fails at first, then misses nothing. `supervisord -c` alone cannot do
that: there each agent declares its group when it starts.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from mesh.errors import ConfigurationError, DamagedJournalError
from mesh.factory import make_broker
from mesh.journal import cannot_keep
from mesh.supervision.conf import programs_of, script_of
from mesh.topics import replay_topic
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence
    from pathlib import Path

    from mesh.config import MessageBusConfig
    from mesh.journal import Journal
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
    said = await look_at_scripts(project, rundir, agents)
    durable = {name: each for name, each in said.items() if each is not None and each.durable}
    if durable:
        async with _journal_for(durable_topics(said), rundir, config) as journal:
            for name, each in durable.items():
                topics = [*each.durable, replay_topic(name)]
                await journal.declare(name, topics, start=each.start)
    return [name for name, each in said.items() if each is None or each.problem]


async def check_journal(project: Path, rundir: RunDir, config: MessageBusConfig) -> bool:
    """
    Make the check of `declare_groups`, and declare nothing.

    Returns:
        False when no agent hears anything durably, so that there is nothing to check.

    Raises:
        ConfigurationError: The journal cannot keep what it promises.
        BrokerUnavailableError: It does not answer.
    """
    topics = durable_topics(await look_at_scripts(project, rundir))
    if topics:
        async with _journal_for(topics, rundir, config):
            pass
    return bool(topics)


@asynccontextmanager
async def _journal_for(
    topics: Collection[str], rundir: RunDir, config: MessageBusConfig
) -> AsyncIterator[Journal]:
    try:
        async with make_broker(config, rundir.path).make_journal() as journal:
            yield journal
    except (ConfigurationError, DamagedJournalError) as error:
        raise cannot_keep(topics, config.broker_type, error) from None


def durable_topics(said: Mapping[str, Finding | None]) -> set[str]:
    """Give what is heard durably, of what `look_at_scripts` gave."""
    return {topic for each in said.values() if each is not None for topic in each.durable}


async def look_at_scripts(
    project: Path, rundir: RunDir, agents: Collection[str] | None = None
) -> dict[str, Finding | None]:
    """
    Ask the scripts of agents what they hear.

    Args:
        project: Where supervisord.conf and agents/ are.
        rundir: The mesh's directory.
        agents: Only these; default all.

    Returns:
        What was found, by agent; None of those that did not answer.
    """
    found = {
        name: script_of(project, name)
        for name in programs_of(project)
        if agents is None or name in agents
    }
    scripts = {name: script for name, script in found.items() if script is not None}
    if not scripts:
        return {}
    environ = {**os.environ, "MESH_DIR": str(rundir.path)}
    findings = await survey(project, sorted(set(scripts.values())), environ)
    return {name: findings.get(script) for name, script in scripts.items()}
