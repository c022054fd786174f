"""Where another process finds the class of an agent, and the life it leads there."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mesh.agent_process import Launch
from mesh.errors import ConfigurationError
from mesh.loading import load_agent
from mesh.rundir import RunDir
from mesh.runtime import guarded, run_launch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.agent import Agent
    from mesh.config import MessageBusConfig


def origins_of(
    agents: Sequence[type[Agent] | str | Path], config: MessageBusConfig
) -> dict[str, tuple[str, str]]:
    """Give, by agent name, where another process finds the class: module (or ``script``), name."""
    problems: list[str] = []
    if config.broker_type == "memory":
        problems.append("broker_type=memory: does not reach other processes; use zmq")
    origins: dict[str, tuple[str, str]] = {}
    for each in agents:
        if isinstance(each, (str, Path)):
            name, origin = Path(each).stem, ("script", str(Path(each).absolute()))
        else:
            name = each.name or each.__name__.lower()
            origin = (each.__module__, each.__qualname__)
            if each.__module__ == "__main__" or "<locals>" in each.__qualname__:
                problems.append(
                    f"{each.__qualname__} of {each.__module__}: another process cannot import it;"
                    " put it into a module at top level"
                )
        if name in origins:
            problems.append(f"agent name {name!r} is used twice; names are unique")
        origins[name] = origin
    if problems:
        raise ConfigurationError(problems)
    return origins


def live(
    origin: tuple[str, str],
    name: str,
    directory: str,
    config: MessageBusConfig,
    params: dict[str, str],
) -> int:
    """Run one agent in the process that was started for it."""
    rundir = RunDir(directory)
    output = os.open(rundir.output(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)

    def start() -> int:
        home, qualified = origin
        kind: type[Agent]
        if home == "script":
            kind = load_agent(qualified)
        else:
            kind = getattr(importlib.import_module(home), qualified)
        return run_launch(
            Launch(
                kind=kind,
                name=name,
                script=qualified,
                rundir=rundir,
                config=config,
                params=params,
                parent_bound=True,
                gated=True,
            )
        )

    return guarded(start)
