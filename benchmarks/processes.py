"""Start processes for a measurement, wait for what they say, end them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """Give a short private directory, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="lg-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def process(
    *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``python ARGUMENTS``; ended by SIGTERM, then SIGKILL, when the block is left."""
    with program(sys.executable, *arguments, environment=environment, **options) as child:
        yield child


@contextlib.contextmanager
def program(
    *command: str, environment: Mapping[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program; ended by SIGTERM, then SIGKILL, when the block is left."""
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        **options,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_for(path: Path, timeout_s: float = 120.0) -> Any:
    """Give a file's JSON once it is there."""
    give_up = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{path.name} did not come within {timeout_s:g} s")
        time.sleep(0.01)
    return json.loads(path.read_text())


def wait_state(directory: Path, name: str, state: str, timeout_s: float = 30.0) -> None:
    """Return when an agent's card shows a state."""
    card = directory / "agents" / f"{name}.json"
    give_up = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(card.read_text())["state"] == state:
                return
        if time.monotonic() > give_up:
            raise TimeoutError(f"{name} was not {state} within {timeout_s:g} s")
        time.sleep(0.005)
