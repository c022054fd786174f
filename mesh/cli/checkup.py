"""`mesh doctor`: is everything as a mesh needs it?"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import os
import platform
import socket
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from mesh.cli import say
from mesh.cli.agents import topics_in
from mesh.cli.exits import EXIT_WRONG
from mesh.cli.place import (
    CONF,
    Place,
    directory_option,
    json_option,
    own_redis_is_down,
    settings_of,
)
from mesh.cli.publish import load_schemas
from mesh.errors import ConfigurationError, MeshError
from mesh.events import is_declared
from mesh.rundir import MAX_SOCKET_PATH
from mesh.supervision.conf import (
    INFRASTRUCTURE,
    REQUIRED,
    check_conf,
    has_own_redis,
    programs_of,
    script_of,
    unlisted_of,
    unreadable_paths,
)
from mesh.supervision.declaring import check_journal
from mesh.supervision.supervisord import SupervisorClient, SupervisorSilentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mesh.rundir import RunDir

_PYTHON = (3, 11)
_PACKAGES = (
    "msgspec",
    "pyzmq",
    "redis",
    "hiredis",
    "supervisor",
    "aiomultiprocess",
    "click",
    "rich",
)
_OPTIONAL = ("opentelemetry-api", "pydantic", "pytest")
_LIBZMQ = (4, 3, 5)
_FILES = 1024
_COLOURS: dict[str, say.Colour] = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Row:
    """One check."""

    check: str
    #: ok, warn or fail.
    verdict: str
    found: str
    #: What to do about it.
    remedy: str = ""


@click.command()
@json_option
@directory_option
def doctor(json_form: bool, directory: str | None) -> None:
    """
    Check the environment, the run directory and the running mesh.

    Each row is ok, warn or fail, with what to do. Changes nothing. Exit code 1 when a row fails.

    \b
    Example:
      mesh doctor
      mesh doctor --json
    """  # noqa: D301
    place = Place.find(directory)
    rows = [
        *_software(),
        *_settings(place.rundir),
        *_project(place),
        *_directory(place.rundir),
        *_locks(place.rundir),
        *asyncio.run(_journal(place)),
        *asyncio.run(_answers(place.rundir)),
        *_topics(place),
    ]
    failed = any(row.verdict == "fail" for row in rows)
    if json_form:
        say.as_json({"well": not failed, "rows": [asdict(row) for row in rows]})
    else:
        say.table(
            ("check", "verdict", "found", "what to do"),
            [(row.check, row.verdict, row.found, row.remedy) for row in rows],
            [_COLOURS[row.verdict] for row in rows],
        )
    sys.exit(EXIT_WRONG if failed else 0)


def _software() -> Iterator[Row]:
    version = platform.python_version()
    if sys.version_info[:2] >= _PYTHON:
        yield Row("python", "ok", f"{version} {sys.executable}")
    else:
        yield Row("python", "fail", version, "use Python 3.11 or newer")
    if sys.platform != "linux":
        yield Row("system", "fail", sys.platform, "the mesh needs Linux")
    for name in _PACKAGES:
        try:
            yield Row(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Row(name, "fail", "not installed", f"pip install {name}")
    for name in _OPTIONAL:
        try:
            yield Row(name, "ok", f"{importlib.metadata.version(name)} (optional)")
        except importlib.metadata.PackageNotFoundError:
            yield Row(name, "ok", "not installed (optional)")
    yield _libzmq()
    limit = os.sysconf("SC_OPEN_MAX")
    verdict = "ok" if limit >= _FILES else "warn"
    yield Row("open files", verdict, str(limit), "" if verdict == "ok" else "raise `ulimit -n`")


def _libzmq() -> Row:
    try:
        # Loaded by name: what is asked is whether it can be, and which one it is
        found: tuple[int, ...] = importlib.import_module("zmq").zmq_version_info()
    except (ImportError, AttributeError):
        return Row("libzmq", "fail", "pyzmq cannot be imported", "pip install --force pyzmq")
    text = ".".join(map(str, found))
    if found < _LIBZMQ:
        return Row("libzmq", "fail", text, "use pyzmq 27, which brings 4.3.5 (security fixes)")
    return Row("libzmq", "ok", text)


def _settings(rundir: RunDir) -> Iterator[Row]:
    try:
        config = settings_of(rundir)
        fabric = "redis, the mesh's own server" if has_own_redis(rundir) else config.broker_type
    except ConfigurationError as error:
        for problem in error.problems:
            yield Row("settings", "fail", problem, "correct the variable, or unset it")
        return
    yield Row("settings", "ok", f"fabric {fabric}, log level {config.log_level}")
    if config.broker_type == "memory":
        yield Row("fabric", "warn", "memory joins no processes", "set LEGION_BROKER_TYPE=zmq")


def _project(place: Place) -> Iterator[Row]:
    try:
        names = programs_of(place.project)
    except ConfigurationError as error:
        yield Row("project", "warn", str(error), "go to a folder with agents/ and supervisord.conf")
        return
    yield Row("project", "ok", f"{place.project / CONF}: {say.counted(len(names), 'program')}")
    unreadable = unreadable_paths(place.project, place.rundir)
    for problem in unreadable:
        yield Row("paths", "fail", problem, "see there")
    if not unreadable:
        yield from _reading(place.project)
    for name in REQUIRED:
        if name not in names:
            yield Row("project", "fail", f"no [program:{name}]", "copy it from the documentation")
    for name in names:
        script = script_of(place.project, name)
        if script is not None and not (place.project / script).is_file():
            yield Row("project", "fail", f"[program:{name}] runs {script}", "there is no such file")
    for name in unlisted_of(place.project):
        yield Row(
            "project", "warn", f"agents/{name}.py is no program", f"`mesh new {name}` adds it"
        )


def _reading(project: Path) -> Iterator[Row]:
    """Check what `mesh up` checks: whether supervisord can read its file."""
    try:
        check_conf(project)
    except ConfigurationError as error:
        for problem in error.problems:
            yield Row(CONF, "fail", problem, "correct it; `mesh up` refuses to start")
    except OSError as error:
        yield Row(CONF, "warn", f"cannot be checked: {error}", "see there")


def _directory(rundir: RunDir) -> Iterator[Row]:
    longest = len(os.fsencode(rundir.socket("supervisor"))) + len(".99999999")
    if longest > MAX_SOCKET_PATH:
        over = say.counted(longest - MAX_SOCKET_PATH, "byte")
        words = f"{rundir.path} is {over} too long for Unix sockets"
        yield Row("MESH_DIR", "fail", words, "set MESH_DIR to a shorter path, such as under /tmp")
        return
    if not os.path.lexists(rundir.path):
        yield Row("MESH_DIR", "ok", f"{rundir.path} (not there yet; `mesh up` makes it)")
        return
    try:
        rundir.ensure()
    except ConfigurationError as error:
        yield Row("MESH_DIR", "fail", str(error), "see there, or set MESH_DIR to another path")
        return
    mode = rundir.path.stat().st_mode & 0o777
    yield Row("MESH_DIR", "ok", f"{rundir.path} mode {mode:04o}")
    free = os.statvfs(rundir.path)
    if free.f_bavail * free.f_frsize < 100 * 1024 * 1024:
        yield Row("disk", "warn", "less than 100 MB free", "make room: logs and ledgers live here")


def _locks(rundir: RunDir) -> Iterator[Row]:
    folder = rundir.path / "run"
    for path in sorted(folder.glob("*.lock")) if folder.is_dir() else []:
        try:
            owner = rundir.holder(path)
        except OSError as error:
            yield Row(f"lock {path.stem}", "fail", str(error), "look at the file's owner and mode")
            continue
        if owner is not None:
            note = rundir.note(path)
            yield Row(f"lock {path.stem}", "ok", f"held by {owner} {note}".rstrip())


async def _journal(place: Place) -> list[Row]:
    """Check what `mesh up` checks: whether the journal keeps what agents hear durably."""
    rundir = place.rundir
    try:
        config = settings_of(rundir)
        programs_of(place.project)
    except ConfigurationError:
        return []  # said already
    # A server of the mesh's own is down with it, and a file is made by the first who needs it
    if config.broker_type == "memory" or own_redis_is_down(rundir):
        return []
    if config.broker_type == "zmq" and not rundir.journal().is_file():
        return []
    try:
        wanted = await check_journal(place.project, rundir, config)
    except ConfigurationError as error:
        parts = [problem.partition("; ") for problem in error.problems]
        return [Row("journal", "fail", what, remedy or "see there") for what, _, remedy in parts]
    except MeshError as error:
        return [Row("journal", "fail", str(error), "`mesh up` starts, and waits for it")]
    return [Row("journal", "ok", f"{config.broker_type}: keeps durable events")] if wanted else []


async def _answers(rundir: RunDir) -> list[Row]:
    """Ask supervisord and the fabric, where they should be there."""
    client = SupervisorClient(rundir.socket("supervisor"))
    try:
        pid = await client.pid()
        programs = await client.processes()
    except SupervisorSilentError as error:
        return [Row("supervisord", "fail", str(error), "see there")]
    except MeshError as error:
        held = [name for name in INFRASTRUCTURE if rundir.holder(rundir.lock(name))]
        if not held:
            return [Row("mesh", "ok", "none runs here")]
        return [
            Row(
                "mesh",
                "warn",
                f"no supervisord, but {', '.join(held)} lives ({error})",
                "scripts without supervisord brought it up; else end it and `mesh up`",
            )
        ]
    rows = [Row("supervisord", "ok", f"answers, pid {pid}")]
    rows += [
        Row(f"program {each.name}", "fail", each.state, f"mesh logs {each.name}")
        for each in programs
        if each.state in ("FATAL", "BACKOFF", "UNKNOWN")
        or (each.state == "EXITED" and each.exit_status)
    ]
    rows.append(await _fabric(rundir))
    rows.append(_socket(rundir, "monitor"))
    return rows


async def _fabric(rundir: RunDir) -> Row:
    from mesh.factory import make_broker

    remedy = "mesh logs forwarder; mesh restart forwarder"
    try:
        config = settings_of(rundir)
        if config.broker_type == "redis":
            remedy = "start Redis, or correct REDIS_* and LEGION_REDIS_*"
        async with make_broker(config, rundir.path):
            return Row("fabric", "ok", f"{config.broker_type}: answers")
    except MeshError as error:
        return Row("fabric", "fail", str(error), remedy)


def _socket(rundir: RunDir, name: str) -> Row:
    path = rundir.socket(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            words = f"{path.name}: {error.strerror}"
            return Row(f"{name} socket", "fail", words, f"mesh restart {name}")
    return Row(f"{name} socket", "ok", str(path))


def _topics(place: Place) -> Iterator[Row]:
    try:
        load_schemas(place.project)
        topics = topics_in(place)
    except ConfigurationError:
        return  # said already
    for name, topic in topics.items():
        if topic.disagreement is not None:
            remedy = "import one declaration; the same LEGION_DURABLE_EVENTS for all; mesh restart"
            yield Row("topic", "fail", f"{name} is {topic.disagreement}", remedy)
        if topic.orphan is None:
            continue
        who = ", ".join(topic.said_by or topic.heard_by)
        remedy = "nobody needs it?" if topic.said_by else "a misspelt type, or nothing said it yet"
        # Whoever declares a type has not misspelt it: eyes may be all that is to see it
        verdict, remedy = ("ok", "") if is_declared(name) else ("warn", remedy)
        yield Row("topic", verdict, f"{name} ({who}): {topic.orphan}", remedy)
