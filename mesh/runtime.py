"""
How an agent process is started, and what its exit code says.

Started by supervisord as ``python -m mesh.runtime agents/risk.py``, or by `run` at the end of a
script. Exit codes: 0 clean, 70 the agent failed, 75 another incarnation lives, 78 configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from mesh import env, process
from mesh.agent_process import AgentProcess, Launch
from mesh.config import MessageBusConfig
from mesh.errors import (
    EXIT_BUG,
    EXIT_CONFIGURATION,
    EXIT_LOCKED,
    AccessDeniedError,
    AlreadyRunningError,
    BrokerUnavailableError,
    ConfigurationError,
    MeshError,
    first_leaf,
)
from mesh.loading import load_agent
from mesh.logs import set_up_logging
from mesh.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.agent import Agent

_log = logging.getLogger("mesh.runtime")

#: True while a script is loaded by `main`: its own `run(...)` must not start it a second time.
_loading = False


def run(kind: type[Agent]) -> None:
    """
    Run an agent in this process until SIGTERM or SIGINT; then exit.

    Args:
        kind: The agent class. Put ``if __name__ == "__main__":`` before the call.

    Raises:
        SystemExit: Always; the code says how it went.
    """
    if _loading:
        return
    script = sys.argv[0] or kind.__module__
    sys.exit(guarded(lambda: _start(kind, script, None, by_hand=not env.is_supervised())))


def main(argv: list[str] | None = None) -> int:
    """Run the agent of a script; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mesh.runtime", description="Run the one agent of a script."
    )
    parser.add_argument("script", help="a Python file with one Agent class")
    parser.add_argument("--name", help="the agent's name (default: MESH_AGENT, or the file's name)")
    options = parser.parse_args(argv)
    return guarded(lambda: _load_and_start(options.script, options.name))


def _load_and_start(script: str, name: str | None) -> int:
    # Before the script is loaded, for that may never end: no orphan then, and its stack is kept
    known_as = name or env.agent_name() or Path(script).stem
    process.prepare(RunDir.from_env().ensure(), known_as, parent_bound=env.is_supervised())
    try:
        return _start(load_script(script), script, name)
    finally:
        process.drop_empty_stacks()


def load_script(script: str) -> type[Agent]:
    """
    Give the agent class of a script; a `run` at the script's end starts nothing.

    Raises:
        AgentScriptError: It holds no agent that can run.
    """
    global _loading
    _loading = True
    try:
        return load_agent(script)
    finally:
        _loading = False


def guarded(start: Callable[[], int]) -> int:
    """Turn what stops a process into an exit code and words on stderr."""
    try:
        return start()
    except ConfigurationError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)  # noqa: T201 - there may be no log
        return EXIT_CONFIGURATION
    except AlreadyRunningError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return EXIT_LOCKED
    except MeshError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return EXIT_BUG
    except (Exception, asyncio.CancelledError):  # noqa: BLE001 - printed as it is
        traceback.print_exc()
        return EXIT_BUG


def _start(kind: type[Agent], script: str, name: str | None, *, by_hand: bool = False) -> int:
    supervised = env.is_supervised()
    launch = Launch(
        kind=kind,
        name=name or env.agent_name() or kind.name or Path(script).stem,
        group=env.agent_group(),
        script=script,
        rundir=RunDir.from_env().ensure(),
        config=MessageBusConfig.from_env(),
        params=env.agent_params(),
        parent_bound=supervised,
        gated=supervised,
        by_hand=by_hand,
    )
    return run_launch(launch)


def run_launch(launch: Launch) -> int:
    """
    Run one agent to its end in this process.

    Raises:
        AlreadyRunningError: Another process lives under this name.
        ConfigurationError: The agent's `setup` refuses its settings.
    """
    process.prepare(launch.rundir, launch.name, parent_bound=launch.parent_bound)
    lock = process.only_incarnation(launch.rundir, launch.name)
    close_log = set_up_logging(launch.name, launch.rundir.log(launch.name), launch.config.log_level)
    try:
        return _run_to_its_end(AgentProcess(launch, lock, close_log), launch.name)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - passed on
        cause = _sole_leaf(error)
        if not isinstance(cause, MeshError):
            # stderr is not kept as long as the log
            _log.critical("%s ends by an error", launch.name, exc_info=cause)
        raise cause from None
    finally:
        close_log()
        process.drop_empty_stacks()


def _run_to_its_end(agent: AgentProcess, name: str) -> int:
    try:
        return asyncio.run(agent.main())
    except* (ConfigurationError, AccessDeniedError) as group:
        first = first_leaf(group)
        _log.error("%s: configuration: %s", name, first)
        if isinstance(first, AccessDeniedError):
            # A password or certificate does not become right by trying again
            raise ConfigurationError(str(first)) from None
        raise first from None
    except* MeshError as group:
        first = first_leaf(group)
        # That something does not answer is no mistake in the code
        trace = None if isinstance(first, BrokerUnavailableError) else first
        _log.error("%s could not begin: %s", name, first, exc_info=trace)
        raise first from None


def _sole_leaf(error: BaseException) -> BaseException:
    """Unwrap groups that hold one error: their own traces say nothing about the agent."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
