"""`mesh doctor`: is this machine, this directory and this mesh in order?"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import shutil
import sys
from typing import TYPE_CHECKING

import click

from mesh.card import read_cards
from mesh.cli.common import echo_json, print_table, project, rundir
from mesh.cli.look import orphans, says_of
from mesh.config import MessageBusConfig
from mesh.errors import ConfigurationError
from mesh.supervision.boot import programs_of
from mesh.supervision.supervisord import SupervisorClient

if TYPE_CHECKING:
    from mesh.rundir import RunDir

Row = tuple[str, str, str]
_PACKAGES = ("legion-mesh", "pyzmq", "msgspec", "supervisor", "aiomultiprocess", "redis", "click")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(*, as_json: bool) -> int:
    """Check environment, versions, paths, sockets and topics; exits 1 when something fails."""
    where = rundir()
    rows = [*_machine(), *_settings(), *_project(), *_directory(where), *_life(where)]
    rows += _topics(where)
    if as_json:
        echo_json([{"what": what, "state": state, "words": words} for what, state, words in rows])
    else:
        print_table(["what", "state", ""], [list(row) for row in rows])
    return 1 if any(state == "fail" for _, state, _ in rows) else 0


def _machine() -> list[Row]:
    python = platform.python_version()
    rows: list[Row] = [("python", "ok" if sys.version_info >= (3, 11) else "fail", python)]
    for package in _PACKAGES:
        try:
            rows.append((package, "ok", importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "fail", f"not installed; `pip install {package}`"))
    from mesh.brokers.zeromq import library_version

    rows.append(("libzmq", "ok", library_version()))
    if os.geteuid() == 0:
        rows.append(("user", "warn", "root: agents need no privileges"))
    free_mib = shutil.disk_usage(os.getcwd()).free // 2**20
    rows.append(("disk", "ok" if free_mib > 256 else "warn", f"{free_mib} MiB free"))
    return rows


def _settings() -> list[Row]:
    try:
        config = MessageBusConfig.from_env()
    except ConfigurationError as error:
        return [("settings", "fail", problem) for problem in error.problems]
    return [("settings", "ok", f"broker_type={config.broker_type}")]


def _project() -> list[Row]:
    try:
        names = programs_of(project())
    except ConfigurationError as error:
        return [("project", "fail", str(error))]
    return [("project", "ok", f"{project()}: {len(names)} programs")]


def _directory(where: RunDir) -> list[Row]:
    try:
        where.ensure()
    except ConfigurationError as error:
        return [("MESH_DIR", "fail", str(error))]
    longest = max(len(os.fsencode(where.socket(name))) for name in ("supervisor", "monitor"))
    return [("MESH_DIR", "ok", f"{where.path}, mode 0700, sockets of {longest} bytes of 107")]


def _life(where: RunDir) -> list[Row]:
    rows: list[Row] = []
    up = asyncio.run(SupervisorClient(where.socket("supervisor")).is_up())
    rows.append(("supervisord", "ok" if up else "warn", "answers" if up else "no mesh runs here"))
    for name in ("forwarder", "monitor"):
        pid = where.holder(where.lock(name))
        state = "ok" if pid or not up else "fail"
        rows.append((name, state, f"pid {pid}" if pid else "nobody holds its lock"))
    return rows


def _topics(where: RunDir) -> list[Row]:
    cards = read_cards(where)
    unheard, unsaid = orphans(cards, says_of(where, cards))
    rows: list[Row] = []
    if unheard:
        rows.append(("topics", "warn", "said but never heard: " + " ".join(unheard)))
    if unsaid:
        rows.append(("topics", "warn", "heard but never said: " + " ".join(unsaid)))
    return rows
