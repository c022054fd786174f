"""The command line where no mesh runs: what it refuses, what it writes, what it says."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mesh.cli.main import COMMANDS, cli
from mesh.cli.say import clean, micros, table
from mesh.cli.templates import agent_script, sample_of
from mesh.rundir import RunDir
from tests.plumbing.processes import (
    MESH,
    ROOT,
    run_mesh,
    run_mesh_unread,
    run_mesh_without_room,
    run_program,
    run_python,
)
from tests.plumbing.projects import copy_example


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy_example(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_with_an_example(name: str) -> None:
    shown = call(name, "--help")

    assert shown.exit_code == 0
    assert "Example:" in shown.output
    assert f"mesh {name}" in shown.output


@pytest.mark.parametrize("name", ["run", "up"])
def test_help_tells_how_fast_a_market_goes_by_default(name: str) -> None:
    shown = " ".join(call(name, "--help").output.split())

    assert re.search(r"default: max with (--csv or --bars|csv), else 1", shown)


def test_help_loads_no_command() -> None:
    code = "import sys; from mesh.cli.main import cli; cli(['--help'], standalone_mode=False);"
    code += "print([n for n in sys.modules if n in ('rich', 'zmq', 'mesh.agent', 'mesh.consumer')])"

    assert run_python(code).out.splitlines()[-1] == "[]"


def test_help_tells_the_exit_codes() -> None:
    shown = call("--help").output

    assert "Exit codes:" in shown
    assert all(code in shown for code in ("3 ", "65", "70", "75", "78"))


def test_an_unknown_command_is_guessed() -> None:
    refused = call("statsu")

    assert refused.exit_code == 2
    assert "did you mean `mesh status`?" in refused.output


@pytest.mark.parametrize(
    "words", [["status"], ["down"], ["restart", "risk"], ["reload"], ["tail"], ["agents"], ["logs"],
              ["publish", "a", "{}"]],
)  # fmt: skip
def test_without_a_mesh_the_exit_code_is_3(project: Path, words: list[str]) -> None:
    refused = call(*words)

    assert refused.exit_code == 3, refused.output
    assert "mesh up" in refused.output


@pytest.mark.parametrize(
    ("topic", "data", "words"),
    [
        ("a b", "{}", "is not a topic"),
        ("_reply.x", "{}", "the mesh's own"),
        ("hello", "{", "cannot be read"),
        ("hello", "[1]", "must be an object"),
        ("hello", '{"x": NaN}', "NaN"),
        ("hello", '{"x": [-1e999]}', "-1e999 is too large for a number"),
    ],
)
def test_an_event_that_cannot_travel_is_refused(topic: str, data: str, words: str) -> None:
    refused = call("publish", topic, data)

    assert refused.exit_code == 65
    assert words in refused.output


def test_a_run_is_told_all_its_mistakes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGION_LOG_LEVEL", "LOUD")
    monkeypatch.setenv("MESH_JOURNAL", "../x")

    refused = call("run", "--csv", "/no/such.csv", "--speed", "-1")

    assert refused.exit_code == 78
    assert refused.stdout == ""
    for words in ("/no/such.csv", "--speed -1", "LEGION_LOG_LEVEL=LOUD", "MESH_JOURNAL=../x"):
        assert words in refused.stderr


def test_a_name_that_no_file_can_have_is_told(project: Path) -> None:
    refused = call("run", "--memory", "--csv", "a" * 300)

    assert refused.exit_code == 78
    assert "File name too long" in refused.stderr


def test_a_run_does_not_wait_for_a_pipe(project: Path) -> None:
    os.mkfifo(project / "pipe")

    refused = call("run", "--csv", "pipe")

    assert refused.exit_code == 78
    assert "pipe: is no regular file, and a pipe can be read only once" in refused.stderr


@pytest.mark.parametrize("command", ["up", "run", "status", "doctor"])
def test_a_directory_whose_name_is_no_text_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("MESH_DIR", str(project / "d\udcff"))

    refused = call(command)

    assert refused.exit_code == 78
    assert "d\\xff: is no UTF-8" in refused.output


@pytest.mark.parametrize("text", ["novalue", "=x", "a-b=1"])
def test_a_parameter_must_be_a_pair(text: str) -> None:
    assert call("run", "--param", text).exit_code == 2


@pytest.mark.parametrize("words", ["up -d", "run", "run --memory --bars 10"])
def test_a_start_without_a_project_leaves_nothing(
    tmp_path: Path, own_mesh_dir: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)

    refused = call(*words.split())

    assert refused.exit_code == 78
    assert "begin one: mesh init" in refused.output
    assert not own_mesh_dir.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_project_where_supervisord_cannot_read_its_paths_does_not_start(
    project: Path, own_mesh_dir: Path
) -> None:
    odd = project / "shop #1"
    copy_example(odd)

    refused = run_mesh("up", "-d", cwd=odd)

    assert refused.code == 78, refused
    assert refused.err == (
        f"{odd}: supervisord does not read ' #' in a path as it is; the project cannot be there:"
        " move or rename it\n"
    )
    assert refused.err.strip() in run_mesh("doctor", cwd=odd).out


@pytest.mark.parametrize("words", ["up -d", "run --bars 10"])
def test_a_file_that_supervisord_cannot_read_starts_nothing(
    project: Path, own_mesh_dir: Path, words: str
) -> None:
    with (project / "supervisord.conf").open("a") as file:
        file.write("\n[program:foo]\n")

    refused = call(*words.split())

    told = f"{project / 'supervisord.conf'}: [program:foo]: "
    assert refused.exit_code == 78, refused.output
    assert refused.stderr.startswith(told)
    assert not list(own_mesh_dir.glob("conf/*"))
    doctor = call("doctor")
    assert doctor.exit_code == 1
    assert told in doctor.output


def test_the_memory_fabric_joins_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGION_BROKER_TYPE", "memory")

    assert call("up", "-d").exit_code == 78


def test_a_run_in_memory_reports(project: Path) -> None:
    ended = run_mesh("run", "--bars", "500", "--memory", "--json", cwd=project)

    assert ended.code == 0, ended
    report = json.loads(ended.out)
    assert report["market_events"] == 500
    assert report["lost"] == 0
    assert set(report["agents"]) >= {"market_data", "portfolio"}


def test_a_run_counts_what_was_put_aside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGION_MAX_HOPS", "2")

    ended = run_mesh("run", "--bars", "2000", "--memory", "--json", cwd=project)

    report = json.loads(ended.out)
    assert report["dead_letters"] == {"hops": report["orders"]}
    assert report["orders"] > 0
    assert ended.code == 1
    assert "they are gone with this process" in ended.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("class (", "SyntaxError: invalid syntax (agents/broken.py, line 3)"),
        ("int('x')", "invalid literal for int() with base 10: 'x' (agents/broken.py, line 3)"),
        ("raise SystemExit(0)", "SystemExit: 0 (agents/broken.py, line 3)"),
        ("import decimal; decimal.Decimal(1) / 0", "DivisionByZero'>] (agents/broken.py, line 3)"),
        ("import agents.worse", "SyntaxError: invalid syntax (agents/worse.py, line 1)"),
    ],
)
def test_a_script_that_does_not_load_is_told_with_its_line(
    project: Path, line: str, words: str
) -> None:
    """The words end with it: of a failed program the last line is shown."""
    (project / "agents" / "broken.py").write_text(f"import json\n\n{line}\n")
    (project / "agents" / "worse.py").write_text("class (\n")
    command = f"{sys.executable} -m mesh.runtime agents/broken.py"
    (project / "supervisord.conf").write_text(f"[program:broken]\ncommand={command}\n")

    refused = run_mesh("run", "--memory", cwd=project)

    assert refused.code == 70
    told, given_up = refused.err.splitlines()
    assert told.startswith("broken: ")
    assert told.endswith(words)
    assert given_up == "the run was given up: not all agents started"


def test_a_run_names_parameters_that_no_agent_has_read(project: Path) -> None:
    given = ("--param", "symbl=USDJPY", "--param", "fee_bps=2")

    ended = run_mesh("run", "--bars", "10", "--memory", "--json", *given, cwd=project)

    assert json.loads(ended.out)["params_unread"] == ["symbl"]
    assert "param symbl: no agent has asked for it" in ended.err
    assert ended.code == 0


def test_a_run_can_name_the_symbol_of_its_market(project: Path) -> None:
    options = ("--bars", "5000", "--memory", "--json", "--param", "symbol=USDJPY")

    report = json.loads(run_mesh("run", *options, cwd=project).out)

    assert "--param symbol=USDJPY" in call("run", "--help").output
    assert set(report["positions"]) == {"USDJPY"}


def test_an_unknown_agent_is_refused(project: Path) -> None:
    refused = call("run", "--memory", "--agents", "nobody")

    assert refused.exit_code == 78
    assert "'nobody' is no agent" in refused.output


# -- new -------------------------------------------------------------------------------------------


def test_new_writes_script_test_and_program(project: Path) -> None:
    made = call("new", "hello", "--hears", "order.executed")

    assert made.exit_code == 0, made.output
    assert (project / "agents" / "hello.py").is_file()
    assert (project / "tests" / "test_hello.py").is_file()
    conf = (project / "supervisord.conf").read_text()
    theirs = conf.split("[program:market_data]\n")[1].split("\n\n[")[0].strip()
    ours = conf.split("[program:hello]\n")[1].strip()
    assert ours == theirs.replace("market_data", "hello")


@pytest.mark.parametrize(
    "other",
    ["log", "python", "command", "priority", "true", "runtime", "here", "out", "bin"],
)
def test_new_copies_a_section_whose_agent_is_called_as_something_else_in_it(
    project: Path, other: str
) -> None:
    assert call("new", other).exit_code == 0
    assert call("new", "second").exit_code == 0

    conf = (project / "supervisord.conf").read_text()
    expected = conf.split("[program:market_data]\n")[1].split("\n\n[")[0].strip()
    for name in (other, "second"):
        made = conf.split(f"[program:{name}]\n")[1].split("\n\n[")[0].strip()
        assert made == expected.replace("market_data", name)


@pytest.mark.parametrize(
    "name",
    ["", "a-b", "A", "1x", "../x", "class", "logging", "forwarder", "monitor", "mesh", "risk"],
)
def test_new_refuses_a_name(project: Path, name: str) -> None:
    before = (project / "supervisord.conf").read_text()

    assert call("new", name).exit_code == 2
    assert (project / "supervisord.conf").read_text() == before


@pytest.mark.parametrize(
    "name", ["msgspec", "zmq", "hiredis", "click", "rich", "pydantic", "opentelemetry"]
)
def test_new_refuses_what_would_hide_an_installed_package(project: Path, name: str) -> None:
    """`python agents/NAME.py` puts agents/ before all else that can be imported."""
    refused = call("new", name)

    assert refused.exit_code == 2
    assert f"'{name}' is an installed package (" in refused.output
    assert not (project / "agents" / f"{name}.py").exists()


def test_new_takes_a_name_that_only_the_project_has(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "wares").mkdir()
    (project / "shop.py").touch()
    (project / "elsewhere" / "stock").mkdir(parents=True)
    for path in (project, project / "elsewhere"):
        monkeypatch.syspath_prepend(path)

    assert [call("new", name).exit_code for name in ("wares", "shop", "stock")] == [0, 0, 0]


def test_new_leaves_files_that_exist(project: Path) -> None:
    (project / "agents" / "mine.py").write_text("x = 1\n")

    refused = call("new", "mine")

    assert refused.exit_code == 2
    assert (project / "agents" / "mine.py").read_text() == "x = 1\n"
    assert "[program:mine]" not in (project / "supervisord.conf").read_text()


@pytest.mark.parametrize(
    ("text", "kind"), [("x = 1\n", "MyOwn"), ("class Till(Agent):\n    ...\n", "Till")]
)
def test_new_says_what_a_script_lacks(project: Path, text: str, kind: str) -> None:
    (project / "agents" / "my_own.py").write_text(text)

    assert (
        f'end it with\nif __name__ == "__main__":\n    run({kind})' in call("new", "my_own").output
    )


def test_new_gives_a_script_that_was_written_by_hand_its_place(project: Path) -> None:
    script = project / "agents" / "mine.py"
    written = (
        "from mesh import Agent, run\nclass M(Agent): ...\nif __name__ == '__main__': run(M)\n"
    )
    script.write_text(written)
    before = call("doctor").output

    made = call("new", "mine")

    assert made.exit_code == 0, made.output
    assert script.read_text() == written
    assert not (project / "tests" / "test_mine.py").exists()
    assert "[program:mine]\ncommand=" in (project / "supervisord.conf").read_text()
    assert "agents/mine.py is no program" in before
    assert "is no program" not in call("doctor").output


def test_new_writes_what_is_missing_beside_a_test(project: Path) -> None:
    """Whoever writes the test first is not kept from the rest."""
    test = project / "tests" / "test_mine.py"
    test.parent.mkdir()
    test.write_text("x = 1\n")

    made = call("new", "mine")

    assert made.exit_code == 0, made.output
    assert test.read_text() == "x = 1\n"
    assert "tests/test_mine.py is there already and is left as it is" in made.output
    assert (project / "agents" / "mine.py").is_file()
    assert "[program:mine]\ncommand=" in (project / "supervisord.conf").read_text()


@pytest.mark.parametrize(
    "command", ["status", "doctor", "tail", "publish a.b {}", "dlq ls", "logs", "journal ls", "up"]
)
def test_a_run_directory_that_is_a_file_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("MESH_DIR", str(project / "supervisord.conf"))

    refused = call(*command.split())

    assert refused.exit_code == 78
    assert "supervisord.conf: is no directory" in refused.output


def test_a_journal_stays_in_the_run_directory(
    project: Path, own_mesh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_JOURNAL", "../mine")

    refused = call("dlq", "ls")

    assert refused.exit_code == 78
    assert "MESH_JOURNAL=../mine: must be 1 to 64 characters" in refused.output


def test_new_writes_what_the_projects_types_declare(project: Path) -> None:
    # In a process of its own: this one may have imported the payloads before
    made = run_mesh(
        "new", "seer", "--hears", "features.computed", "--says", "signal.generated", cwd=project
    )

    assert made.code == 0, made
    script = (project / "agents" / "seer.py").read_text()
    assert "import agents.payloads" in script
    assert '"target": 1' in script


def test_new_asks_about_a_type_that_looks_misspelt(project: Path) -> None:
    told = call("new", "ear", "--hears", "market.data.recieved", "--says", "something.else")

    assert told.exit_code == 0
    assert "market.data.recieved is a new type; did you mean market.data.received?" in told.output
    assert "something.else is" not in told.output


def test_what_cannot_be_written_is_named_and_nothing_of_it_stays(project: Path) -> None:
    before = set(project.rglob("*"))
    for words, file in (
        ("init other", Path("other") / "supervisord.conf"),
        ("new hello", project / "agents" / "hello.py"),
        ("up", RunDir.from_env().path / "run" / "mesh.lock"),
    ):
        refused = run_mesh_without_room(*words.split(), cwd=project)

        assert refused.code == 74, refused
        (told,) = refused.err.splitlines()
        assert told.startswith(f"{file}: File too large; raise the limit of file sizes")
    assert not any(path.is_file() for path in set(project.rglob("*")) - before)


def test_a_full_disk_is_told_by_its_words() -> None:
    told = run_program("bash", "-c", 'exec "$0" doctor > /dev/full', MESH)

    assert told.code == 74
    assert told.err.splitlines() == [
        "what this command writes: No space left on device; free some space, then try again"
    ]


def test_new_without_a_project_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert call("new", "hello").exit_code == 78
    assert list(tmp_path.iterdir()) == []


def test_a_new_script_speaks_of_built_in_types_by_name() -> None:
    script = agent_script("my_agent", "order.executed", "my.said", payload=None, declares=False)

    assert "class MyAgent(Agent)" in script
    assert "EventType.ORDER_EXECUTED" in script
    assert '"my.said"' in script


def test_a_sample_fills_nested_schemas() -> None:
    from agents.payloads import Features

    sample = sample_of(Features)

    assert sample["quote"] == {"symbol": "x", "number": 1, "time": "x", "bid": 1.0, "ask": 1.0}
    assert sample["slow_mean"] is None


# -- doctor ----------------------------------------------------------------------------------------


def test_the_doctor_finds_nothing_to_do(project: Path) -> None:
    told = call("doctor", "--json")

    report = json.loads(told.stdout)
    assert (told.exit_code, report["well"]) == (0, True), told.output
    assert {"python", "libzmq", "MESH_DIR", "settings"} <= {row["check"] for row in report["rows"]}


def test_the_doctor_names_what_is_wrong(rundir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir.chmod(0o755)
    monkeypatch.setenv("REDIS_PORT", "many")

    told = call("doctor", "--json")

    failed = [row["found"] for row in json.loads(told.stdout)["rows"] if row["verdict"] == "fail"]
    assert told.exit_code == 1
    assert any("REDIS_PORT=many" in words for words in failed)
    assert any("chmod 700" in words for words in failed)


def test_the_doctor_sees_a_path_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_DIR", "/tmp/" + "x" * 100)

    told = call("doctor")

    assert told.exit_code == 1
    assert "too long for Unix sockets" in told.output


# -- a project -------------------------------------------------------------------------------------


def test_a_project_begins_with_the_programs_of_our_own(tmp_path: Path) -> None:
    """The example's supervisord.conf is what `mesh init` writes, and the agents."""
    made = call("init", str(tmp_path / "shop"))
    again = call("init", str(tmp_path / "shop"))

    written = (tmp_path / "shop" / "supervisord.conf").read_text()
    ours = (ROOT / "supervisord.conf").read_text()
    python = "%(here)s/.venv/bin/python"
    assert made.exit_code == 0
    assert ours.startswith(written.replace(sys.executable, python))
    assert again.exit_code == 2
    assert "left as it is" in again.output


def test_a_project_has_a_run_directory_for_supervisord_alone(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        call("init", short)
        assert (Path(short) / ".mesh" / "log").is_dir()

    # Where sockets find no room the project is made all the same
    far = tmp_path / ("deep" * 25)
    told = call("init", str(far))

    assert told.exit_code == 0
    assert "MESH_DIR" in told.stderr
    assert (far / "pyproject.toml").is_file()


def test_a_project_begins_with_what_git_and_pytest_need(tmp_path: Path) -> None:
    call("init", str(tmp_path))

    for name in (".gitignore", "agents/__init__.py", "pyproject.toml", "supervisord.conf"):
        assert (tmp_path / name).is_file()
    assert ".mesh/" in (tmp_path / ".gitignore").read_text().splitlines()
    settings = tomllib.loads((tmp_path / "pyproject.toml").read_text())["tool"]["pytest"]
    assert settings["ini_options"]["pythonpath"] == ["."]


@pytest.mark.parametrize("name", ["pyproject.toml", "pytest.ini"])
def test_a_project_keeps_the_files_it_has(tmp_path: Path, name: str) -> None:
    kept = [tmp_path / each for each in (".gitignore", name)]
    for path in kept:
        path.write_text("# mine\n")

    told = call("init", str(tmp_path))

    assert told.exit_code == 0
    assert [path.read_text() for path in kept] == ["# mine\n", "# mine\n"]
    assert 'pythonpath = ["."]' in told.stderr
    assert name == "pyproject.toml" or not (tmp_path / "pyproject.toml").exists()


# -- text ------------------------------------------------------------------------------------------


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert clean("a\x1b[2Jb\x07\u202ec\td") == "a\\x1b[2Jb\\x07\\x202ec\td"


@pytest.mark.parametrize(
    ("us", "shown"),
    [
        (None, "-"),
        (0.4, "0us"),
        (999.4, "999us"),
        (999.6, "1.0ms"),
        (4871, "4.9ms"),
        (9960, "10ms"),
        (156_000, "156ms"),
        (999_600, "1.0s"),
        (67_000_000, "67.0s"),
    ],
)
def test_a_latency_is_shown_in_the_unit_it_fills(us: float | None, shown: str) -> None:
    assert micros(us) == shown


def test_a_narrow_terminal_cuts_nothing_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")

    table(("figure", "value"), [("digest", "0123456789" * 6)])

    shown = capsys.readouterr().out
    assert "".join(shown.split()).endswith("0123456789" * 6)


def test_a_closed_stdout_is_no_error() -> None:
    """`mesh doctor >&-` in somebody's script."""
    code = "import os, subprocess, sys; os.close(1); sys.exit(subprocess.call(sys.argv[1:]))"
    told = run_python(code, str(MESH), "doctor")

    assert told.code in {0, 1}
    assert "Traceback" not in told.err


@pytest.mark.parametrize("words", ["--help", "doctor", "doctor --json", "up --help", "dlq ls"])
def test_whoever_closes_the_pipe_early_gets_the_exit_code_for_that(words: str) -> None:
    """1 is for a mesh that is not well, and 0 for one that is."""
    told = run_mesh_unread(*words.split())

    assert told.code == 141, told
    assert told.err == ""


def test_words_about_errors_that_nobody_reads_change_no_exit_code() -> None:
    assert run_mesh_unread("status", errors=True).code == 3
