"""`mesh logs`: what stands where, whom it names, and what following does."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from mesh.cli.logbook import Followed, warnings_since
from mesh.cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def test_logs_merge_by_time(rundir: Path) -> None:
    folder = rundir / "log"
    folder.mkdir()
    for name, second in (("one", "01"), ("two", "00")):
        text = f"2026-01-01T00:00:{second}.000Z INFO agent={name} x: hi\n    more of {name}\n"
        (folder / f"{name}.log").write_text(text)

    shown = call("logs").output.splitlines()

    assert [line.split("agent=")[-1][:3] for line in shown[::2]] == ["two", "one"]
    assert shown[1] == "two:     more of two"
    assert call("logs", "nobody").exit_code == 2


def test_what_a_log_has_warned_of_is_given_from_a_moment_on(rundir: Path) -> None:
    folder = rundir / "log"
    folder.mkdir()
    lines = [
        f"2026-01-01T00:00:0{second}.000Z {level} agent=one x: hi\n    and more\n"
        for second, level in enumerate(("WARNING", "INFO", "WARNING", "ERROR", "WARNING"))
    ]
    (folder / "one.log.1").write_text("".join(lines[:3]))
    (folder / "one.log").write_text("".join(lines[3:]))
    begun_s = datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC).timestamp()

    assert warnings_since(folder / "one.log", begun_s) == [
        lines[2].split("\n")[0], lines[4].split("\n")[0]
    ]  # fmt: skip
    assert warnings_since(folder / "two.log", begun_s) == []


def test_a_printed_line_is_counted_and_named_by_itself(rundir: Path) -> None:
    folder = rundir / "log"
    folder.mkdir()
    (folder / "one.out").write_text("a\nb\n  c\n")
    os.utime(folder / "one.out", (1767225602, 1767225602))
    (folder / "one.out.1").write_text("older\n")
    os.utime(folder / "one.out.1", (1767225600, 1767225600))
    (folder / "two.log").write_text("2026-01-01T00:00:01.000Z INFO agent=two x: hi\n")

    # As late as the file they stand in
    record = "2026-01-01T00:00:01.000Z INFO agent=two x: hi"
    assert call("logs").output.splitlines() == [
        "one: older", record, "one: a", "one: b", "one:   c"
    ]  # fmt: skip
    assert call("logs", "-n", "2").output.splitlines() == ["one: b", "one:   c"]


def test_printed_lines_keep_their_place_among_those_with_a_time(rundir: Path) -> None:
    folder = rundir / "log"
    folder.mkdir()
    record = "2026-01-01T00:00:01.000Z ERROR it broke"
    (folder / "one.out").write_text(f"first\n{record}\n  File x\nlast\n")
    (folder / "two.log").write_text("2026-01-01T00:00:02.000Z INFO agent=two x: hi\n")

    assert call("logs", "-n", "3").output.splitlines() == [
        f"one: {record}",
        "one:   File x",
        "one: last",
        "2026-01-01T00:00:02.000Z INFO agent=two x: hi",
    ]
    assert call("logs", "one").output.splitlines()[0] == "one: first"


def test_a_printed_line_that_a_rotation_cut_is_whole_again(tmp_path: Path) -> None:
    (tmp_path / "a.out.1").write_text("one\ntw")
    (tmp_path / "a.out").write_text("o\nthree\n")

    followed = Followed(tmp_path / "a.out")

    assert [entry.text for entry in followed.history()] == ["one", "two", "three"]
    followed.close()


@pytest.fixture
def five_hours_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "EST5")  # in a form that needs no files
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("five_hours_behind")
def test_logs_show_one_clock_wherever_supervisord_lives(own_mesh_dir: Path) -> None:
    folder = own_mesh_dir / "log"
    folder.mkdir(parents=True)
    (folder / "supervisord.log").write_text("2026-01-01 07:00:02,500 INFO spawned: 'a'\n")
    (folder / "a.log").write_text("2026-01-01T12:00:01.000Z INFO agent=a x: 2026-01-01 1:2:3\n")

    assert call("logs").output.splitlines() == [
        "2026-01-01T12:00:01.000Z INFO agent=a x: 2026-01-01 1:2:3",
        "supervisord: 2026-01-01T12:00:02.500Z INFO spawned: 'a'",
    ]


def test_following_goes_on_over_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("2026-01-01T00:00:00.000Z one\n")
    followed = Followed(path)
    assert [entry.text[25:] for entry in followed.history()] == ["one"]

    with path.open("a") as file:
        file.write("2026-01-01T00:00:01.000Z two\n2026-01-01T00:00:02.000Z ha")
        file.flush()
        assert [entry.text[25:] for entry in followed.new()] == ["two"]
        file.write("lf\n")
    os.replace(path, tmp_path / "a.log.1")
    path.write_text("2026-01-01T00:00:03.000Z three\n")

    assert [entry.text[25:] for entry in followed.new()] == ["half", "three"]
    followed.close()
