"""The project's supervisord.conf, and the one that is made of it for a run directory."""

from __future__ import annotations

import configparser
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from mesh.errors import ConfigurationError
from mesh.files import replace_file
from mesh.replicas import MARK, MAX_REPLICAS, group_of, replica_names
from mesh.rundir import RunDir
from mesh.supervision.conf_check import complaints_of
from mesh.supervision.redis_server import PROGRAM as REDIS_PROGRAM

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_CONF = "supervisord.conf"
#: The programs that every supervisord.conf has, and those that are no agents.
REQUIRED = ("forwarder", "monitor")
INFRASTRUCTURE = (*REQUIRED, REDIS_PROGRAM)
_PROGRAM = "program:"
#: Read by supervisord, which then lives on when the disk is full.
_PLUG_IN = {
    "rpcinterface:full_disk": {
        "supervisor.rpcinterface_factory": "mesh.supervision.full_disk:make_rpcinterface"
    }
}
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
#: What a script ends with that is an agent.
_RUNS = re.compile(r"__main__.*\brun\(", re.DOTALL)
#: How a percent sign is written for supervisord, which else reads ``%(...)s`` there.
_PERCENT, _PERCENT_TWICE = "%%", "%%%%"
#: Begins a comment, ends a value or is cut off in supervisord's file, which can quote none of it.
_UNREADABLE = re.compile(r"""\s[#;]|["\n\r]|\s$""")
#: supervisord's own words for where output goes, in place of a path.
_NO_PATHS = ("auto", "none", "off", "syslog")


def programs_of(project: Path) -> list[str]:
    """
    List the programs of a project's supervisord.conf.

    Raises:
        ConfigurationError: There is none, or it cannot be read.
    """
    return [
        name[len(_PROGRAM) :] for name in _read(project).sections() if name.startswith(_PROGRAM)
    ]


def script_of(project: Path, name: str) -> str | None:
    """Give the script a program runs; None for the mesh's own programs."""
    words = _read(project).get(_PROGRAM + name, "command", fallback="").split()
    after = words[words.index("mesh.runtime") + 1 :] if "mesh.runtime" in words else []
    return after[0] if after else None


def unlisted_of(project: Path) -> list[str]:
    """Name the scripts of agents/ that would run an agent, but are no program."""
    listed = {script_of(project, name) for name in programs_of(project)}
    return [
        script.stem
        for script in sorted((project / "agents").glob("*.py"))
        if f"agents/{script.name}" not in listed and runs_an_agent(script)
    ]


def runs_an_agent(script: Path) -> bool:
    """Say whether a script ends as an agent's does, in ``run(...)``."""
    return _RUNS.search(script.read_text(errors="replace")) is not None


def render(
    project: Path,
    rundir: RunDir,
    agents: Collection[str] | None = None,
    *,
    replicas: Mapping[str, int] | None = None,
    with_forwarder: bool = True,
    with_redis: bool = False,
    environ: Mapping[str, str] | None = None,
) -> Path:
    """
    Write the project's supervisord.conf for a run directory, if supervisord can read it.

    Args:
        project: Where supervisord.conf is.
        rundir: The mesh's directory.
        agents: Only these agents; default all.
        replicas: How many there shall be of an agent; default one.
        with_forwarder: Keep the forwarder, which only the ZeroMQ fabric needs.
        with_redis: Add a redis-server of the mesh's own.
        environ: What supervisord finds in its environment; default: ours.

    Returns:
        The file that was written.

    Raises:
        ConfigurationError: A program has a bad name or runs an agent of another name, an agent is
            not in the file, or supervisord could not read it, or one of the paths.
        OSError: The file cannot be written.
    """
    text = _text_for(
        project,
        rundir,
        agents,
        replicas=replicas or {},
        with_forwarder=with_forwarder,
        with_redis=with_redis,
        environ=os.environ if environ is None else environ,
    )
    path = _file(rundir)
    replace_file(path, text)
    return path


def check_conf(project: Path) -> None:
    """
    Render a project's supervisord.conf for nobody; writes nothing.

    Raises:
        ConfigurationError: Names what `render` would.
        OSError: There is no room for the empty folders that supervisord wants to see.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rundir = RunDir(scratch)
        for folder in ("run", "log"):
            (rundir.path / folder).mkdir()
        _text_for(project, rundir, environ={**os.environ, "MESH_DIR": scratch})


def unreadable_paths(project: Path, rundir: RunDir) -> list[str]:
    """Name the paths that supervisord would not read as they are written, and what to do."""
    paths = {
        str(project.absolute()): ("the project", "move or rename it"),
        str(rundir.path): ("MESH_DIR", "use another one"),
        sys.executable: ("this Python", "make its environment elsewhere"),
    }
    problems: list[str] = []
    for path, (what, remedy) in paths.items():
        found = _UNREADABLE.search(path)
        # What lies in the project is moved with it
        if found is not None and not (
            problems and path.startswith(f"{project.absolute()}{os.sep}")
        ):
            problems.append(
                f"{path}: supervisord does not read {found[0]!r} in a path as it is; {what} cannot"
                f" be there: {remedy}"
            )
    return problems


def rendered_programs(rundir: RunDir) -> list[str]:
    """List the programs of the file that was last made for a run directory; none without one."""
    path = _file(rundir)
    return programs_of(path.parent) if path.exists() else []


def has_own_redis(rundir: RunDir) -> bool:
    """Say whether the mesh of a directory was started with a redis-server of its own."""
    return REDIS_PROGRAM in rendered_programs(rundir)


def read_replicas(rundir: RunDir) -> dict[str, int]:
    """Give how many replicas of which agents are wanted, where it is not one."""
    try:
        found = json.loads(_wishes(rundir).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        name: count
        for name, count in found.items()
        if isinstance(count, int) and 1 < count <= MAX_REPLICAS and MARK not in name
    }


def write_replicas(rundir: RunDir, name: str, count: int) -> dict[str, int]:
    """Remember for this directory how many replicas of an agent are wanted; gives all wishes."""
    wishes = {**read_replicas(rundir), name: count}
    wishes = {each: wishes[each] for each in sorted(wishes) if wishes[each] > 1}
    replace_file(_wishes(rundir), json.dumps(wishes, indent=2) + "\n")
    return wishes


def _text_for(
    project: Path,
    rundir: RunDir,
    agents: Collection[str] | None = None,
    *,
    environ: Mapping[str, str],
    replicas: Mapping[str, int] = MappingProxyType({}),
    with_forwarder: bool = True,
    with_redis: bool = False,
) -> str:
    parser = _read(project)
    names = [name[len(_PROGRAM) :] for name in parser.sections() if name.startswith(_PROGRAM)]
    problems = unreadable_paths(project, rundir)
    problems += [f"[program:{name}]: no usable name" for name in names if not _NAME.fullmatch(name)]
    problems += [
        f"{name!r} is no program of {project / _CONF}; it has {', '.join(names)}"
        for name in (agents or ())
        if name not in names
    ]
    if problems:
        raise ConfigurationError(problems)
    for name in names:
        if agents is not None and name not in agents and name not in INFRASTRUCTURE:
            parser.remove_section(_PROGRAM + name)
    for name, count in replicas.items():
        if parser.has_section(_PROGRAM + name):
            for replica in replica_names(name, count)[1:]:
                _add_replica(parser, name, replica)
    if not with_forwarder:
        parser.remove_section(f"{_PROGRAM}forwarder")
    if with_redis:
        _add_redis(parser)
    # A project's file may be older than this plug-in
    parser.read_dict(_PLUG_IN)
    for section in parser.sections():
        for key, value in parser.items(section):
            percent = _PERCENT_TWICE if _is_expanded_twice(section, key) else _PERCENT
            parser.set(section, key, _translate(value, project, rundir, percent))
    if os.geteuid() == 0 and parser.has_section("supervisord"):
        parser.set("supervisord", "user", "root")
    text = io.StringIO()
    parser.write(text)
    problems = complaints_of(text.getvalue(), _file(rundir), project / _CONF, environ)
    if problems:
        raise ConfigurationError(problems)
    return text.getvalue()


def _file(rundir: RunDir) -> Path:
    return rundir.path / "conf" / _CONF


def _wishes(rundir: RunDir) -> Path:
    return rundir.path / "conf" / "replicas.json"


def _add_replica(parser: configparser.RawConfigParser, name: str, replica: str) -> None:
    """Add a program like the agent's, under a name and with files of its own."""
    section = _PROGRAM + replica
    parser.add_section(section)
    for key, value in parser.items(_PROGRAM + name):
        if key == "environment":
            value = re.sub(r"""\bMESH_(AGENT|GROUP)=("[^"]*"|'[^']*'|[^,]*)(,|$)""", "", value)
        elif key == "command":
            own = rf"""(--name[= ]["']?){re.escape(name)}(?=["'\s]|$)"""
            value = re.sub(own, rf"\g<1>{replica}", value)
        elif key in ("stdout_logfile", "stderr_logfile"):
            value = _own_file(value, replica)
        parser.set(section, key, value)
    others = parser.get(section, "environment", fallback="").strip(", \n")
    mine = f'MESH_AGENT="{replica}",MESH_GROUP="{name}"'
    parser.set(section, "environment", f"{mine},{others}" if others else mine)


def _own_file(value: str, replica: str) -> str:
    path = Path(value)
    if value.lower() in _NO_PATHS or value.startswith("/dev/") or "%(program_name)s" in value:
        return value
    return str(path.with_name(f"{path.stem}{replica[len(group_of(replica)) :]}{path.suffix}"))


def _add_redis(parser: configparser.RawConfigParser) -> None:
    """Add the program beside the monitor and like it, but before the agents."""
    section = _PROGRAM + REDIS_PROGRAM
    parser.add_section(section)
    for key, value in parser.items(f"{_PROGRAM}monitor"):
        parser.set(section, key, value.replace("monitor", REDIS_PROGRAM))
    parser.set(section, "command", "%(here)s/.venv/bin/python -m mesh.supervision.redis_server")
    parser.set(section, "priority", "5")


def _read(project: Path) -> configparser.RawConfigParser:
    path = project / _CONF
    parser = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    try:
        with path.open() as file:
            parser.read_file(file)
    except OSError as error:
        raise ConfigurationError(
            f"{path}: {error.strerror}; run this in a project that has one, or begin one: mesh init"
        ) from error
    except configparser.Error as error:
        raise ConfigurationError(f"{path}: {error}") from error
    return parser


def _is_expanded_twice(section: str, key: str) -> bool:
    """Say whether supervisord reads ``%(...)s`` in a value, and then again in what it got."""
    if section == "supervisord":
        return key == "environment"
    return key in ("stdout_logfile", "stderr_logfile")


def _translate(value: str, project: Path, rundir: RunDir, percent: str) -> str:
    """Put real paths where the file says ``%(here)s``, with their percent signs written so."""
    paths = {
        "%(here)s/.venv/bin/python": sys.executable,
        "%(here)s/.mesh": str(rundir.path),
        "%(here)s": str(project.absolute()),
    }
    # In one pass: a path may look like a pattern
    return re.sub(
        "|".join(map(re.escape, paths)), lambda found: paths[found[0]].replace("%", percent), value
    )
