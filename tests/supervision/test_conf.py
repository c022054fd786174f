"""The supervisord.conf of a run directory: replicas are programs of their own."""

from __future__ import annotations

import configparser
import re
from typing import TYPE_CHECKING

import pytest

from mesh.cli.templates import configuration
from mesh.errors import ConfigurationError
from mesh.rundir import RunDir
from mesh.supervision import conf
from tests.plumbing.processes import ROOT

if TYPE_CHECKING:
    from pathlib import Path

ODD = """
[program:odd]
command=python -m mesh.runtime agents/odd.py --name odd
environment=COLOUR="red, not blue",MESH_AGENT="odd",MESH_GROUP='odd',LEVEL=3
stdout_logfile=/var/log/anything.log
stderr_logfile=NONE

[program:plain]
command=python agents/plain.py
stdout_logfile=%(here)s/.mesh/log/%(program_name)s.out
"""


@pytest.fixture
def home(rundir: Path) -> RunDir:
    return RunDir(rundir).ensure()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "supervisord.conf").write_text((ROOT / "supervisord.conf").read_text() + ODD)
    return tmp_path


def rendered(
    project: Path, home: RunDir, replicas: dict[str, int], agents: list[str] | None = None
) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read(conf.render(project, home, agents, replicas=replicas))
    return parser


def test_a_replica_is_its_agent_under_another_name(project: Path, home: RunDir) -> None:
    parser = rendered(project, home, {"features": 3})
    first, third = parser["program:features"], parser["program:features@3"]

    assert third["environment"] == 'MESH_AGENT="features@3",MESH_GROUP="features"'
    assert third["stdout_logfile"] == str(home.output("features@3"))
    differing = {key for key in first if first[key] != third[key]}
    assert differing == {"environment", "stdout_logfile"}
    assert "program:features@2" in parser
    assert "program:features@4" not in parser


def test_the_agent_itself_and_the_projects_file_stay_as_they_are(
    project: Path, home: RunDir
) -> None:
    text = (project / "supervisord.conf").read_text()
    alone = dict(rendered(project, home, {})["program:features"])

    shared = dict(rendered(project, home, {"features": 2})["program:features"])

    assert shared == alone
    assert (project / "supervisord.conf").read_text() == text


def test_odd_sections_keep_what_is_theirs(project: Path, home: RunDir) -> None:
    parser = rendered(project, home, {"odd": 2, "plain": 2})
    odd, plain = parser["program:odd@2"], parser["program:plain@2"]

    assert odd["command"].endswith("agents/odd.py --name odd@2")
    assert odd["environment"] == (
        'MESH_AGENT="odd@2",MESH_GROUP="odd",COLOUR="red, not blue",LEVEL=3'
    )
    assert odd["stdout_logfile"] == "/var/log/anything@2.log"
    assert odd["stderr_logfile"] == "NONE"
    assert plain["environment"] == 'MESH_AGENT="plain@2",MESH_GROUP="plain"'
    assert plain["stdout_logfile"].endswith("%(program_name)s.out")


def test_supervisord_is_kept_alive_on_a_full_disk_whatever_the_file_says(
    tmp_path: Path, home: RunDir
) -> None:
    """A project's file may be older than the plug-in."""
    files = [(ROOT / "supervisord.conf").read_text(), configuration("python")]
    files += [re.sub(r"\[rpcinterface:full_disk\]\n.*\n", "", text) for text in files]
    for number, text in enumerate(files):
        assert ("full_disk" in text) == (number < 2)
        (tmp_path / "supervisord.conf").write_text(text)

        assert rendered(tmp_path, home, {})["rpcinterface:full_disk"] == {
            "supervisor.rpcinterface_factory": "mesh.supervision.full_disk:make_rpcinterface"
        }


def test_only_agents_that_are_there_get_replicas(project: Path, home: RunDir) -> None:
    parser = rendered(project, home, {"risk": 2, "gone": 2, "features": 2}, ["features"])

    assert [name for name in parser.sections() if "@" in name] == ["program:features@2"]


@pytest.mark.parametrize("sign", [" #", " ;", "\t;", '"', "\n"])
def test_a_path_that_supervisord_would_read_otherwise_is_refused(
    project: Path, home: RunDir, sign: str
) -> None:
    odd = project.with_name(f"shop{sign}1")
    project.rename(odd)
    inside, elsewhere = RunDir(odd / ".mesh"), RunDir(home.path / f"a{sign}b")

    with pytest.raises(ConfigurationError) as both:
        conf.render(odd, elsewhere)
    with pytest.raises(ConfigurationError) as one:
        conf.render(odd, inside)

    (told,) = one.value.problems
    assert told.startswith(f"{odd}: supervisord does not read {sign!r}")
    assert ["move or rename it", "use another one"] == [
        words.rpartition(": ")[2] for words in both.value.problems
    ]
    assert str(elsewhere.path) in both.value.problems[1]


def test_no_agent_of_a_users_can_be_called_like_a_replica(project: Path, home: RunDir) -> None:
    with (project / "supervisord.conf").open("a") as file:
        file.write("\n[program:features@2]\ncommand=true\n")

    with pytest.raises(ConfigurationError, match="features@2"):
        conf.render(project, home)


def test_wishes_are_kept_and_nonsense_is_not_believed(home: RunDir) -> None:
    assert conf.read_replicas(home) == {}
    conf.write_replicas(home, "features", 3)
    assert conf.write_replicas(home, "risk", 2) == {"features": 3, "risk": 2}
    assert conf.write_replicas(home, "features", 1) == {"risk": 2}
    assert conf.read_replicas(home) == {"risk": 2}

    for text in ("", "[]", '{"a": "2", "b": 17, "c@2": 2, "d": 0}'):
        (home.path / "conf" / "replicas.json").write_text(text)
        assert conf.read_replicas(home) == {}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("[program:foo]", "[program:foo]: program section program:foo does not specify a command"),
        (
            "[program:foo]\ncommand=true\nstopwaitsecs=abc",
            "[program:foo]: invalid literal for int() with base 10: 'abc'",
        ),
        (
            '[program:foo]\ncommand=true\nenvironment=MESH_AGENT="fooo"',
            "[program:foo] runs an agent that is called 'fooo' (MESH_AGENT=fooo): both need one",
        ),
        (
            "[program:foo]\ncommand=python -m mesh.runtime agents/foo.py --name bar",
            "[program:foo] runs an agent that is called 'bar' (--name bar): both need one name",
        ),
        (
            "[program:foo]\ncommand=python %(ENV_NOWHERE)s",
            "Format string 'python %(ENV_NOWHERE)s' for 'program:foo.command' contains names",
        ),
        ("[rpcinterface:foo]", "section [rpcinterface:foo] does not specify a supervisor.rpc"),
    ],
)
def test_what_supervisord_cannot_read_is_told_of_the_file_that_people_write(
    project: Path, home: RunDir, section: str, words: str
) -> None:
    before = conf.render(project, home).read_text()
    with (project / "supervisord.conf").open("a") as file:
        file.write(f"\n{section}\n")

    for refuse in (lambda: conf.render(project, home), lambda: conf.check_conf(project)):
        with pytest.raises(ConfigurationError) as refused:
            refuse()
        (told,) = refused.value.problems
        assert told.startswith(str(project / "supervisord.conf"))
        assert words in told
        assert str(home.path) not in told
    assert (home.path / "conf" / "supervisord.conf").read_text() == before


@pytest.mark.parametrize(
    "command",
    [
        "python -m mesh.runtime agents/foo.py --name foo",
        "python -m mesh.runtime agents/foo.py --name=foo",
        """python -m mesh.runtime agents/foo.py --name "foo" """,
        "python -m mesh.runtime --name 'foo' agents/foo.py",
        """/bin/sh -c "exec python -m mesh.runtime agents/foo.py --name foo" """,
        "python -m mesh.runtime",
        "python -m mesh.runtime agents/foo.py --name",
    ],
)
def test_a_command_that_names_its_agent_right_or_not_at_all_is_taken(
    project: Path, home: RunDir, command: str
) -> None:
    with (project / "supervisord.conf").open("a") as file:
        file.write(f"\n[program:foo]\ncommand={command}\n")

    conf.check_conf(project)
    replica = rendered(project, home, {"foo": 2})["program:foo@2"]

    assert ("foo@2" in replica["command"]) == ("foo" in command.partition("--name")[2])
    assert conf.script_of(project, "foo") != ""


def test_a_file_without_supervisords_own_section_is_refused(project: Path, home: RunDir) -> None:
    (project / "supervisord.conf").write_text(ODD)

    with pytest.raises(ConfigurationError, match="does not include supervisord section"):
        conf.render(project, home)


def test_names_are_read_as_supervisord_reads_them(project: Path, home: RunDir) -> None:
    with (project / "supervisord.conf").open("a") as file:
        file.write(
            "\n[program:a]\ncommand=true %(ENV_WORD)s\nenvironment=MESH_AGENT=%(program_name)s\n"
            "\n[program:b]\ncommand=true\nprocess_name=%(program_name)s_%(process_num)d\n"
            "numprocs=2\nenvironment=MESH_AGENT='b_%(process_num)d'\n"
        )

    conf.render(project, home, replicas={"a": 2}, environ={"WORD": "x"})
