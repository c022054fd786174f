"""Where a command works: the project, its run directory, its settings; shared options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mesh.cli.exits import NoMeshError
from mesh.config import MessageBusConfig
from mesh.env import environment
from mesh.errors import ConfigurationError, RunDirError
from mesh.rundir import RunDir
from mesh.supervision.conf import INFRASTRUCTURE, has_own_redis
from mesh.supervision.redis_server import settings_for

if TYPE_CHECKING:
    from collections.abc import Callable

_Command = TypeVar("_Command", bound="Callable[..., Any]")

CONF = "supervisord.conf"
_PARAM = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """One mesh: where its agents are written down, and where it lives."""

    project: Path
    rundir: RunDir

    @classmethod
    def find(cls, directory: str | None, *, fallback: Path | None = None) -> Place:
        """
        Find the project around the current directory, and the run directory.

        Args:
            directory: The run directory; default MESH_DIR, else `.mesh` in the project.
            fallback: The project where there is none around.

        Raises:
            RunDirError: The run directory is a file.
        """
        here = Path.cwd()
        around = next((each for each in (here, *here.parents) if (each / CONF).is_file()), None)
        if around is None and fallback is not None and (fallback / CONF).is_file():
            around = fallback
        project = around or here
        chosen = directory or environment().get("MESH_DIR") or project / ".mesh"
        rundir = RunDir(chosen)
        if rundir.path.exists() and not rundir.path.is_dir():
            raise RunDirError(f"MESH_DIR={rundir.path}: is no directory")
        return cls(project, rundir)


def directory_option(command: _Command) -> _Command:
    """Add `--dir` to a command."""
    return click.option(
        "--dir",
        "directory",
        metavar="DIR",
        help="The mesh's run directory.  [default: $MESH_DIR, else .mesh in the project]",
    )(command)


def json_option(command: _Command) -> _Command:
    """Add `--json` to a command."""
    return click.option("--json", "json_form", is_flag=True, help="Print JSON for programs.")(
        command
    )


def param_option(command: _Command) -> _Command:
    """Add `--param k=v` to a command."""
    return click.option(
        "--param",
        "params",
        metavar="K=V",
        multiple=True,
        callback=_parse_params,
        help="A parameter for the agents (`self.params`); may be given several times.",
    )(command)


def agents_option(command: _Command) -> _Command:
    """Add `--agents a,b` to a command."""
    return click.option(
        "--agents",
        metavar="A,B",
        callback=lambda _context, _option, text: _split(text),
        help="Only these agents.  [default: all in supervisord.conf]",
    )(command)


def checked_settings(rundir: RunDir, *, with_redis: bool = False) -> MessageBusConfig:
    """
    Read the settings and check the run directory, before anything starts.

    Args:
        rundir: The mesh's directory.
        with_redis: The mesh will have a redis-server of its own.

    Raises:
        ConfigurationError: Names everything that is wrong with either.
    """
    problems: list[str] = []
    config = MessageBusConfig()
    try:
        given = settings_for(rundir, environment()) if with_redis else environment()
        config = MessageBusConfig.from_env(given)
    except ConfigurationError as error:
        problems += error.problems
    if config.broker_type == "memory":
        problems.append(
            "LEGION_BROKER_TYPE=memory: memory joins no processes; use zmq, or `mesh run --memory`"
        )
    for check in (rundir.ensure, rundir.journal):
        try:
            check()
        except ConfigurationError as error:
            problems += error.problems
    if problems:
        raise ConfigurationError(problems)
    return config


def settings_of(rundir: RunDir) -> MessageBusConfig:
    """
    Read the settings with which to join the mesh of a directory.

    One that was started with a redis-server of its own is joined there, whatever else is set.

    Raises:
        ConfigurationError: They cannot be used, or the mesh runs on another fabric.
    """
    if has_own_redis(rundir):
        return MessageBusConfig.from_env(settings_for(rundir, environment()))
    config = MessageBusConfig.from_env()
    _require_same_fabric(rundir, config)
    return config


def _require_same_fabric(rundir: RunDir, config: MessageBusConfig) -> None:
    """Keep a shell that lacks the mesh's settings away from a journal that is not the mesh's."""
    if rundir.holder(rundir.lock("monitor")) is None:
        return
    try:
        known = rundir.fabric.read_text()
    except FileNotFoundError:  # supervisord was started by hand
        return
    if known != config.fabric():
        raise ConfigurationError(
            f"the mesh in {rundir.path} was started on {known}; the settings here say"
            f" {config.fabric()}: set LEGION_BROKER_TYPE and REDIS_* as they were for `mesh up`"
        )


def own_redis_is_down(rundir: RunDir) -> bool:
    """Say whether the mesh has a redis-server of its own, and neither of them runs."""
    if not has_own_redis(rundir):
        return False
    # The monitor too: a server that was killed is back in a moment
    return all(rundir.holder(rundir.lock(name)) is None for name in INFRASTRUCTURE)


def joining_settings(place: Place) -> MessageBusConfig:
    """
    Read the settings of a command that joins a running mesh.

    Raises:
        ConfigurationError: They cannot be used.
        NoMeshError: There is no mesh to join.
    """
    config = settings_of(place.rundir)
    if config.broker_type == "memory":
        raise ConfigurationError(
            "LEGION_BROKER_TYPE=memory: a fabric of memory cannot be joined from outside; use zmq"
        )
    rundir = place.rundir
    if own_redis_is_down(rundir):
        raise NoMeshError(f"no mesh runs in {rundir.path}; start one with `mesh up --with-redis`")
    if config.broker_type == "zmq" and rundir.holder(rundir.lock("forwarder")) is None:
        raise NoMeshError(f"no mesh runs in {rundir.path}; start one with `mesh up`")
    return config


def _split(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise click.BadParameter("name at least one agent: --agents features,risk")
    return names


def _parse_params(
    _context: click.Context, _option: click.Parameter, given: tuple[str, ...]
) -> dict[str, str]:
    params: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or _PARAM.fullmatch(name) is None:
            raise click.BadParameter(f"{text!r} is not K=V, such as --param window=20")
        params[name.lower()] = value
    return params
