"""The mesh that chaos is done to: its fabric, its programs, the ledgers of each of its lives."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Self

from mesh.config import MessageBusConfig
from mesh.factory import make_broker
from mesh.ledger_views import LedgerView, read_ledgers
from mesh.supervision import boot
from mesh.supervision.conf import INFRASTRUCTURE
from mesh.supervision.supervisord import ProcessInfo, SupervisorClient, SupervisorError
from tests.chaos.words import AGENTS, HEARS, TILLS
from tests.plumbing.processes import ROOT
from tests.plumbing.redis_cluster import Cluster
from tests.plumbing.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from mesh.journal import Journal
    from mesh.rundir import RunDir

SCRIPTS = ROOT / "tests" / "chaos" / "agents"
_LOOK_S = 0.2


class Fabric:
    """
    What the mesh is joined by.

    Args:
        name: ``zmq``, ``redis`` (a server with an append-only file) or ``cluster`` (three of them).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.servers: list[RedisServer] = []

    async def start(self) -> dict[str, str]:
        """Start the servers it needs; give the settings of those who join."""
        if self.name == "zmq":
            return {"LEGION_BROKER_TYPE": "zmq"}
        if self.name == "redis":
            self.servers = [RedisServer(append_only=True).start()]
            return {"LEGION_BROKER_TYPE": "redis", "REDIS_URL": self.servers[0].url}
        cluster = Cluster(append_only=True)
        self.servers = cluster.servers
        cluster.start()
        await cluster.join()
        return {
            "LEGION_BROKER_TYPE": "redis",
            "REDIS_URL": f"redis://127.0.0.1:{cluster.ports[0]}",
            "LEGION_REDIS_CLUSTER": "true",
        }

    def close(self) -> None:
        for server in self.servers:
            server.close()


class Stage:
    """
    A supervised mesh, in one life after the other.

    Args:
        rundir: Where it runs.
        project: A folder for its supervisord.conf.
        fabric: What it is joined by.
        params: For its agents.
    """

    def __init__(
        self, rundir: RunDir, project: Path, fabric: Fabric, params: Mapping[str, str]
    ) -> None:
        self.rundir = rundir
        self.fabric = fabric
        self.client = SupervisorClient(rundir.socket("supervisor"))
        self.journal: Journal
        #: How long nothing moved while it was drained.
        self.longest_still_s = 0.0
        #: What went wrong with starting it again.
        self.problems: list[str] = []
        self._project = project
        self._params = params
        self._settings: dict[str, str] = {}
        self._lives = 0
        self._supervisor = 0

    async def __aenter__(self) -> Self:
        write_project(self._project)
        self.rundir.ensure()
        async with contextlib.AsyncExitStack() as exits:
            exits.callback(self.fabric.close)
            self._settings = await self.fabric.start()
            config = MessageBusConfig.from_env(self._settings)
            self.journal = make_broker(config, self.rundir.path).make_journal()
            await self.journal.connect()
            exits.push_async_callback(self.journal.close)
            exits.push_async_callback(self._end)
            await self._up()
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._exits.aclose()

    # -- lives ---------------------------------------------------------------------------------

    async def pids(self) -> dict[str, int]:
        """Give the living programs' pids, supervisord's too; empty when it does not answer."""
        try:
            found = {each.name: each.pid for each in await self.client.processes() if each.pid}
        except SupervisorError:
            return {}
        return {**found, "supervisord": self._supervisor}

    async def programs(self) -> list[ProcessInfo]:
        try:
            return await self.client.processes()
        except SupervisorError:
            return []

    async def kill_supervisord(self, *others: int) -> None:
        """End it, and others with it, as `kill -9` does; then bring the mesh up again."""
        for pid in (self._supervisor, *others):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            await asyncio.to_thread(os.waitpid, self._supervisor, 0)
        await self._up()

    async def _up(self) -> None:
        self._keep("ledger", "*")
        self._keep("log", "*.out")
        self._lives += 1
        self._supervisor = await boot.up(
            self._project,
            self.rundir,
            params=self._params,
            broker_type="zmq" if self.fabric.name == "zmq" else "redis",
            environment=self._settings,
        )
        try:
            states = await boot.wait_ready(self.rundir, timeout_s=60)
        except boot.BootError as error:
            self.problems.append(f"after `mesh up`: {error}")
            return
        self.problems += [
            f"after `mesh up` {state.name} has failed: {state.last_words}"
            for state in states
            if state.verdict == "failed"
        ]

    async def _end(self) -> None:
        with contextlib.suppress(SupervisorError):
            await boot.down(self.rundir)
        with contextlib.suppress(ChildProcessError):
            await asyncio.to_thread(os.waitpid, self._supervisor, 0)

    # -- what is known of it -------------------------------------------------------------------

    def views(self) -> dict[str, LedgerView]:
        """Give the counters of this life."""
        return read_ledgers(self.rundir.ledgers)

    def lives(self) -> list[dict[str, LedgerView]]:
        """Give the counters of all lives, this one too."""
        kept = sorted(self.rundir.path.glob("ledger-*"))
        return [*map(read_ledgers, kept), self.views()]

    def sources_are_done(self) -> bool:
        views = self.views()
        return all(name in views and views[name].sources == "done" for name in TILLS)

    async def pending(self) -> int:
        """Count what the journal still has for the links."""
        return sum(view.pending for view in await self.journal.groups() if view.group in HEARS)

    async def drained(self, still_s: float) -> bool:
        """Return when nothing is left; False when nothing moved for so long."""
        loop = asyncio.get_running_loop()
        before, moved_s = -1, loop.time()
        while True:
            left = await self.pending() + (0 if self.sources_are_done() else 1)
            self.longest_still_s = max(self.longest_still_s, loop.time() - moved_s)
            if not left:
                return True
            if left != before:
                before, moved_s = left, loop.time()
            elif loop.time() - moved_s > still_s:
                return False
            # Counting a backlog costs the mesh something
            await asyncio.sleep(_LOOK_S)

    def own_ends(self) -> list[str]:
        """List what supervisord says of programs that ended by themselves, and not well."""
        said = []
        for path in sorted((self.rundir.path / "log").glob("supervisord.log*")):
            for line in path.read_text(errors="replace").splitlines():
                if "exited:" in line and "(exit status" in line and "(exit status 0" not in line:
                    said.append(line.partition("exited: ")[2])
        return said

    def replaced(self) -> list[str]:
        """List whom the monitor replaced, and why."""
        path = self.rundir.path / "log" / "restarts.jsonl"
        with contextlib.suppress(FileNotFoundError):
            return path.read_text().splitlines()
        return []

    def _keep(self, folder: str, pattern: str) -> None:
        """A start clears what those who are dying write into until they are dead."""
        kept = self.rundir.path / f"{folder}-{self._lives:04}"
        for path in (self.rundir.path / folder).glob(pattern):
            kept.mkdir(exist_ok=True)
            os.link(path, kept / path.name)


def write_project(project: Path) -> None:
    """Write a supervisord.conf with the mesh's own programs and the chain's."""
    parser = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    parser.read(ROOT / "supervisord.conf")
    own = {f"program:{name}" for name in INFRASTRUCTURE}
    model = dict(parser["program:risk"])
    for section in parser.sections():
        if section.startswith("program:") and section not in own:
            parser.remove_section(section)
    for name in reversed(AGENTS):
        script = SCRIPTS / ("till.py" if name in TILLS else f"{name}.py")
        parser[f"program:{name}"] = {
            key: text.replace("agents/risk.py", str(script)).replace("risk", name)
            for key, text in model.items()
        }
    with (project / "supervisord.conf").open("w") as file:
        parser.write(file)
