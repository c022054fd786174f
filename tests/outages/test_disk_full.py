"""The disk under SQLite is full, or takes no larger files; then there is room again."""

from __future__ import annotations

import os
import resource
import subprocess
from typing import TYPE_CHECKING

import pytest

from mesh.rundir import RunDir
from tests.outages.pair import AGENTS, launched

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.fault


@pytest.fixture
def journal_disk(rundir: Path) -> Iterator[Path]:
    """Keep the journal on a file system of its own, of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    disk = RunDir(rundir).ensure().journal().parent
    disk.mkdir(mode=0o700, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, check=False, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


async def test_a_full_disk_is_waited_out(journal_disk: Path, own_mesh_dir: Path) -> None:
    """The real thing: ENOSPC, which SQLite tells as SQLITE_FULL."""
    ballast = journal_disk / "ballast"

    async def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

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
