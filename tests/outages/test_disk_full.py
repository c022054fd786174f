"""The disk under SQLite is full, or takes no larger files; then there is room again."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mesh.rundir import RunDir
from mesh.supervision import boot
from mesh.supervision.supervisord import SupervisorClient
from tests.outages.pair import AGENTS, launched
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.fault

_CHATTERER = """
from mesh import Agent, every


class Chatterer(Agent):
    @every(0.01)
    async def chatter(self) -> None:
        print("and so on" * 200, flush=True)
"""


@contextlib.contextmanager
def small_disk(disk: Path) -> Iterator[Path]:
    """Mount a file system of 8 MiB there for a while."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    disk.mkdir(mode=0o700, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, check=False, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        # Lazily: a test that failed may have left somebody there
        subprocess.run(["umount", "--lazy", disk], check=True)


def fill_up(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.fixture
def journal_disk(rundir: Path) -> Iterator[Path]:
    """Keep the journal on a small file system of its own."""
    with small_disk(RunDir(rundir).ensure().journal().parent) as disk:
        yield disk


async def test_a_full_disk_is_waited_out(journal_disk: Path, own_mesh_dir: Path) -> None:
    """The real thing: ENOSPC, which SQLite tells as SQLITE_FULL."""
    ballast = journal_disk / "ballast"

    async def fill() -> None:
        fill_up(ballast)

    async def free() -> None:
        ballast.unlink()

    async with launched(own_mesh_dir) as pair:
        for _ in range(2):
            await pair.weathers(fill, free, "BackpressureError", "the disk is full", "for 1 s")


async def test_a_limit_of_file_sizes_is_waited_out(own_mesh_dir: Path) -> None:
    """What a quota does as well, without root: EFBIG, "disk I/O error" to SQLite."""
    journal = RunDir(own_mesh_dir).journal()
    log = journal.with_name(f"{journal.name}-wal")

    async with launched(own_mesh_dir) as pair:
        pids = [pair.pid(name) for name in AGENTS]

        hard = resource.prlimit(pids[0], resource.RLIMIT_FSIZE)[1]

        def limit(size: int) -> None:
            for pid in pids:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))

        async def fill() -> None:
            limit(log.stat().st_size)

        async def free() -> None:
            limit(hard)

        for _ in range(2):
            await pair.weathers(fill, free, "BrokerUnavailableError", "limit of file sizes")


async def test_a_mesh_lives_on_when_all_its_files_are_on_a_full_disk(
    project: Path, own_mesh_dir: Path
) -> None:
    """Also supervisord's logs and its stderr."""
    with small_disk(own_mesh_dir) as disk:
        ballast = disk / "ballast"
        async with chattering(project, RunDir(disk)) as chatter:
            for _ in range(2):
                fill_up(ballast)
                await chatter.is_not_logged()
                ballast.unlink()
                await chatter.goes_on()


async def test_supervisord_lives_on_with_a_limit_of_file_sizes(
    project: Path, own_mesh_dir: Path
) -> None:
    """Without root: EFBIG for each byte of its logs and its stderr."""
    async with chattering(project, RunDir(own_mesh_dir)) as chatter:
        hard = resource.prlimit(chatter.supervisord, resource.RLIMIT_FSIZE)[1]
        for number in (1, 2):
            resource.prlimit(chatter.supervisord, resource.RLIMIT_FSIZE, (0, hard))
            await chatter.is_not_logged()
            resource.prlimit(chatter.supervisord, resource.RLIMIT_FSIZE, (hard, hard))
            await chatter.goes_on()
            assert chatter.told() == number


class Chatter:
    """A mesh with an agent that prints without end."""

    def __init__(self, home: RunDir, supervisord: int) -> None:
        self.supervisord = supervisord
        self._home = home
        self._client = SupervisorClient(home.socket("supervisor"))

    def told(self) -> int:
        """Say how often supervisord has told of a gap in its own log."""
        text = (self._home.path / "log" / "supervisord.log").read_text()
        return text.count("supervisord.log can be written again")

    async def is_not_logged(self) -> None:
        """Return when supervisord could log neither what is printed nor a restart."""
        before, read = await self._pids(), self._bytes_read()
        await eventually(lambda: self._bytes_read() > read + 100_000, what="it goes on reading")
        assert await self._pids() == before

        await boot.restart(self._home, ["chatterer"])

        async def is_over() -> bool:
            return not any(each.state == "STARTING" for each in await self._client.processes())

        await eventually(is_over)
        after = await self._pids()
        assert {name for name in before if after[name] != before[name]} == {"chatterer"}

    async def goes_on(self) -> None:
        """Check that the agent starts anew and is logged."""
        await boot.restart(self._home, ["chatterer"])
        states = await boot.wait_ready(self._home)
        assert all(each.verdict == "ready" for each in states), states
        output = self._home.output("chatterer")
        size = output.stat().st_size
        await eventually(lambda: output.stat().st_size > size)
        assert await self._client.pid() == self.supervisord

    async def _pids(self) -> dict[str, int]:
        return {each.name: each.pid for each in await self._client.processes()}

    def _bytes_read(self) -> int:
        facts = Path(f"/proc/{self.supervisord}/io").read_text()
        return int(facts.partition("rchar:")[2].split()[0])


@contextlib.asynccontextmanager
async def chattering(project: Path, home: RunDir) -> AsyncIterator[Chatter]:
    (project / "agents" / "chatterer.py").write_text(_CHATTERER)
    conf = project / "supervisord.conf"
    conf.write_text(conf.read_text().replace("risk", "chatterer"))
    pid = await boot.up(project, home, agents=["chatterer", "portfolio"])
    try:
        states = await boot.wait_ready(home)
        assert all(each.verdict == "ready" for each in states), states
        yield Chatter(home, pid)
    finally:
        await boot.down(home)
