"""The set-up: what is committed works on any machine, and names none."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

import pytest

from tests.plumbing.processes import ROOT, Finished, run_program, run_python

if TYPE_CHECKING:
    from pathlib import Path

SCRIPTS = [
    "scripts/run",
    "scripts/test",
    "scripts/check",
    "scripts/bench",
    "scripts/fuzz",
    "scripts/starts",
    "scripts/lock",
    ".ci/run",
]
OURS = {"forwarder": "mesh.brokers.forwarder", "monitor": "mesh.supervision.monitor"}

SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}"
    r"|\bxox[baprs]-[A-Za-z0-9-]{10,}|://[^/\s:@{}<>*\"']+:[^/\s:@{}<>*\"']+@(?!localhost|127\.)"
)
# A home directory is somebody's; an absolute file URL is some machine's
PATHS = re.compile(r"(?<![\w.])/(?:home|root|Users)/[\w.-]+|file:///[\w]")


@cache
def kept_files() -> tuple[Path, ...]:
    """Give what git keeps or would keep."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git work tree")
    named = (ROOT / name for name in listing.stdout.split("\0") if name)
    return tuple(file for file in named if file.is_file())


def test_the_lock_names_no_host_and_no_path() -> None:
    lock = (ROOT / "requirements.lock").read_text()

    assert (
        re.findall(r"\S*://\S*|--(?:index|extra|find|trusted)\S*|(?<!\S)/\S+|\S*@ \S*", lock) == []
    )


def test_the_lock_pins_and_hashes_everything() -> None:
    entries = re.split(r"\n(?=[a-z])", (ROOT / "requirements.lock").read_text())[1:]

    assert len(entries) > 20
    assert [entry for entry in entries if "==" not in entry or "--hash=sha256:" not in entry] == []


def test_the_lock_has_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
    locked = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.M))

    names = {re.match(r"[\w-]+", one)[0].lower().replace("_", "-") for one in wanted}  # type: ignore[index]

    assert names - locked == set()


@pytest.fixture
def locking(tmp_path: Path) -> Path:
    """Give a place with a lock of its own, and a `uv` that finds nothing to change."""
    for name in ("scripts/lock", "requirements.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text('#!/bin/sh\necho "$@" >"$(dirname "$0")/called"\n')
    uv.chmod(0o755)
    return tmp_path


def lock(place: Path, *words: str) -> Finished:
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return run_program(place / "scripts" / "lock", *words, env={**os.environ, "PATH": path})


@pytest.mark.parametrize(
    "words", [[], ["--upgrade"], ["--upgrade-package", "redis"], ["--upgrade-package=redis"]]
)
def test_a_lock_in_which_nothing_changes_stays_as_it_is(locking: Path, words: list[str]) -> None:
    ended = lock(locking, *words)

    assert ended.code == 0, ended
    assert (locking / "requirements.lock").read_bytes() == (ROOT / "requirements.lock").read_bytes()
    called = (locking / "bin" / "called").read_text().split()
    assert called[len(called) - len(words) :] == words


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["-h"], 0), (["--hlep"], 2), (["redis"], 2), (["--upgrade-package"], 2)],
)
def test_locking_teaches_itself_and_refuses_what_it_does_not_know(
    locking: Path, words: list[str], code: int
) -> None:
    ended = lock(locking, *words)

    assert ended.code == code, ended
    assert "--upgrade-package NAME" in ended.out or (code and "scripts/lock" in ended.err)
    assert not (locking / "bin" / "called").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_run_and_parsed(name: str) -> None:
    script = ROOT / name

    assert script.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in script.read_text()
    assert run_program("bash", "-n", script).code == 0


def test_set_up_is_quiet_and_quick_when_nothing_changed() -> None:
    if not (ROOT / ".venv" / ".set-up").exists():
        pytest.skip("this environment was made by hand")
    ended = run_program(
        "bash", "-c", "set -euo pipefail; source scripts/_setup.sh; set_up", timeout_s=20.0
    )

    assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_set_up_says_when_the_chosen_python_will_not_do() -> None:
    ended = run_program(
        "bash",
        "-c",
        "set -euo pipefail; source scripts/_setup.sh; set_up",
        env={**os.environ, "PYTHON": "/nowhere/python"},
    )

    assert ended.code == 78
    assert "PYTHON=/nowhere/python" in ended.err
    assert ended.out == ""


def test_every_program_has_its_agent() -> None:
    """One name everywhere: `agents/risk.py` is `[program:risk]`."""
    config = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    config.read(ROOT / "supervisord.conf")
    programs = {
        section.removeprefix("program:"): config[section]
        for section in config.sections()
        if section.startswith("program:")
    }
    tools = {"payloads", "settings", "feed", "__init__"}
    agents = {file.stem for file in (ROOT / "agents").glob("*.py")} - tools

    assert set(programs) == agents | set(OURS)
    for name, settings in programs.items():
        expected = OURS.get(name, f"agents/{name}.py")
        assert expected in settings["command"], f"[program:{name}] runs {settings['command']}"


def test_nothing_kept_holds_a_secret_or_a_path_of_some_machine() -> None:
    wrong = []
    for file in kept_files():
        text = file.read_bytes().decode(errors="ignore")
        for pattern in (SECRETS, PATHS):
            wrong += [f"{file.relative_to(ROOT)}: {found[0]}" for found in pattern.finditer(text)]

    assert not wrong, "\n" + "\n".join(wrong)


def test_importing_the_pytest_plugin_leaves_the_mesh_to_be_measured() -> None:
    """Pytest loads it before coverage begins; what it imports would count as never run."""
    ended = run_python(
        "import sys, mesh.testing.plugin\n"
        "print(*sorted(name for name in sys.modules if name.split('.')[0] == 'mesh'))"
    )

    assert ended.code == 0, ended
    assert set(ended.out.split()) <= {"mesh", "mesh.testing", "mesh.testing.plugin"}


def test_this_is_a_supported_python() -> None:
    assert (3, 11) <= sys.version_info[:2]
