"""`mesh init` and `mesh new`: a project; an agent, its test, its place in supervisord.conf."""

from __future__ import annotations

import contextlib
import difflib
import keyword
import re
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

import click

from mesh.cli import say
from mesh.cli.place import CONF, Place
from mesh.cli.publish import PAYLOADS, load_schemas
from mesh.cli.templates import (
    GITIGNORE,
    PACKAGE,
    PYTEST,
    agent_script,
    agent_section,
    agent_test,
    class_name,
    configuration,
    sample_of,
)
from mesh.errors import ConfigurationError, TopicError
from mesh.events import declaration_of, declarations, is_durable
from mesh.files import replace_file, write_new
from mesh.rundir import RunDir
from mesh.supervision.conf import INFRASTRUCTURE, programs_of, runs_an_agent, script_of
from mesh.topics import PRIVATE_PREFIX, check_topic

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}", re.ASCII)
#: Names of the mesh's own processes, locks and logs, and of the file with the payloads.
RESERVED = (
    *INFRASTRUCTURE,
    "mesh",
    "supervisor",
    "supervisord",
    "launch",
    "run",
    "payloads",
    "test",
)
#: Where pytest reads its settings; of several it takes one.
_PYTEST_FILES = (
    "pytest.ini",
    ".pytest.ini",
    "pytest.toml",
    "pyproject.toml",
    "tox.ini",
    "setup.cfg",
)


@click.command()
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(path_type=Path))
def init(folder: Path) -> None:
    """
    Begin a project: a supervisord.conf to which `mesh new` adds agents.

    Beside it, where they are missing: agents/__init__.py, so that agents can import each other's
    types, a .gitignore, and pytest's settings in pyproject.toml. Nothing that is there is touched.
    supervisord.conf names the Python that runs this command: that of the project's .venv, where it
    has one.

    \b
    Example:
      mesh init shop && cd shop
      mesh new till --says order.requested
      mesh up -d
    """  # noqa: D301
    folder.mkdir(parents=True, exist_ok=True)
    conf = folder / CONF
    try:
        write_new(conf, configuration(_python_for(folder.resolve())))
    except FileExistsError:
        raise click.UsageError(f"{conf} exists already; it is left as it is") from None
    _write_missing(folder / "agents" / "__init__.py", PACKAGE)
    _write_missing(folder / ".gitignore", GITIGNORE)
    if any((folder / name).exists() for name in _PYTEST_FILES):
        say.note(f"pytest's settings are left as they are; they need:\n{PYTEST}")
    else:
        _write_missing(folder / "pyproject.toml", PYTEST)
    # Plain `supervisord -c supervisord.conf` makes none
    try:
        RunDir(folder / ".mesh").ensure()
    except ConfigurationError as error:
        say.note(str(error), "yellow")  # such as a path too long; MESH_DIR can name another
    say.line(f"wrote {conf}; `mesh new NAME` adds an agent, `mesh up` starts them")


@click.command()
@click.argument("name")
@click.option("--hears", metavar="TYPE", default="market.data.received", show_default=True)
@click.option("--says", metavar="TYPE", help="[default: NAME.said]")
def new(name: str, hears: str, says: str | None) -> None:
    """
    Write a new agent: script, test, and its place in supervisord.conf.

    The script works as it stands. `mesh reload` lets it join a running mesh; nobody else's process
    is touched. Where agents/NAME.py is there already it is left as it is, and gets its place. A
    test that is there stays as it is, too.

    \b
    Example:
      mesh new hello
      mesh new hedger --hears position.changed --says order.requested
      python -m pytest tests/test_hello.py && mesh reload
    """  # noqa: D301
    project = Place.find(None).project
    problem = _problem_of(name, project)
    if problem:
        raise click.UsageError(problem)
    topics = [_checked(hears), _checked(says or f"{name}.said")]
    if topics[0] == topics[1]:
        raise click.UsageError(f"an agent that hears what it says, {hears}, would never rest")
    script, test = project / "agents" / f"{name}.py", project / "tests" / f"test_{name}.py"
    conf = project / CONF
    package = project / "agents" / "__init__.py"
    # Without it another package of this name, wherever it is installed, would be taken for it
    files = {} if package.exists() else {package: PACKAGE}
    if script.exists():
        _write({**files, conf: conf.read_text() + _section(project, name)})
        say.line(f"{script.relative_to(project)} is there already and is left as it is")
        say.line(f"added [program:{name}] to {CONF}; `mesh reload` starts it in a running mesh")
        return
    hears_sample, says_sample = _samples(project, topics)
    declares = (project / PAYLOADS).is_file() and any(
        declaration_of(topic).schema is not None or is_durable(topic) for topic in topics
    )
    files[script] = agent_script(name, *topics, payload=says_sample, declares=declares)
    is_tested = test.exists()
    if not is_tested:
        payload: dict[str, object] = {"value": 1} if hears_sample is None else hears_sample
        files[test] = agent_test(name, *topics, payload=payload)
    _write({**files, conf: conf.read_text() + _section(project, name)})
    say.line(f"wrote {script.relative_to(project)}: hears {topics[0]}, says {topics[1]}")
    shown = test.relative_to(project)
    told = f"{shown} is there already and is left as it is" if is_tested else f"wrote {shown}"
    say.line(f"{told}: run it with `python -m pytest {shown}`")
    say.line(f"added [program:{name}] to {CONF}; `mesh reload` starts it in a running mesh")
    for topic in topics:
        _ask_about(topic)


def _ask_about(topic: str) -> None:
    """Say so when a type that nobody has declared looks like one that is."""
    known = [each.topic for each in declarations()]
    close = difflib.get_close_matches(topic, known, 1, cutoff=0.85)
    if close and topic not in known:
        say.note(f"{topic} is a new type; did you mean {close[0]}?", "yellow")


def _python_for(project: Path) -> str:
    """Name the interpreter as supervisord.conf does; one of the project's own moves with it."""
    own = project / ".venv" / "bin" / "python"
    if own.exists() and own.parent == Path(sys.executable).parent:
        return f"%(here)s/.venv/bin/{own.name}"
    return sys.executable.replace("%", "%%")


def _checked(topic: str) -> str:
    checked = check_topic(topic)
    if checked.startswith(PRIVATE_PREFIX):
        raise TopicError(
            f"{topic!r} starts with {PRIVATE_PREFIX!r}: such topics are the mesh's own"
        )
    return checked


def _problem_of(name: str, project: Path) -> str | None:
    """Say why an agent cannot be called so; None when it can."""
    if _NAME.fullmatch(name) is None:
        return f"{name!r} is no name for an agent: a-z, 0-9 and _, a letter first, at most 40"
    if keyword.iskeyword(name) or name in sys.stdlib_module_names:
        return f"{name!r} is Python's own: a script of that name would hide it"
    if name in RESERVED:
        return f"{name!r} is reserved for the mesh itself"
    if (where := _installed(name, project)) is not None:
        return f"{name!r} is an installed package ({where}): a script of that name would hide it"
    # Before looking for files, so that a missing supervisord.conf is told first
    if name in programs_of(project):
        return f"[program:{name}] is in {project / CONF} already"
    script = project / "agents" / f"{name}.py"
    return _how_it_would_run(script) if script.exists() and not runs_an_agent(script) else None


def _installed(name: str, project: Path) -> Path | None:
    """Say where Python finds a module of some name that is not the project's; None: nowhere."""
    own = (project, project / "agents")
    spec = PathFinder.find_spec(
        name, [path for path in sys.path if Path(path).resolve() not in own]
    )
    if spec is None:
        return None
    if spec.origin is not None:
        return Path(spec.origin)
    # Any folder looks like a namespace package; a real one is where packages are
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    folders = map(Path, spec.submodule_search_locations or ())
    return next((each for each in folders if str(each.parent) in places), None)


def _how_it_would_run(script: Path) -> str:
    found = re.search(r"^class (\w+)\(", script.read_text(errors="replace"), re.MULTILINE)
    kind = class_name(script.stem) if found is None else found[1]
    return (
        f"{script} exists already, and runs no agent; end it with\n"
        f'if __name__ == "__main__":\n    run({kind})'
    )


def _write_missing(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        write_new(path, text)


def _write(files: dict[Path, str]) -> None:
    """Write all files, the last in one step; when that fails, none stays."""
    made: list[Path] = []
    try:
        *fresh, (conf, text) = files.items()
        for path, content in fresh:
            path.parent.mkdir(exist_ok=True)
            write_new(path, content)
            made.append(path)
        replace_file(conf, text)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def _section(project: Path, name: str) -> str:
    """Give the program's section, in the form that the project's other agents have."""
    text = (project / CONF).read_text()
    gap = "\n" if text.endswith("\n") else "\n\n"
    for other in reversed(programs_of(project)):
        if script_of(project, other) == f"agents/{other}.py":
            found = re.search(
                rf"^\[program:{re.escape(other)}\]\n(?:(?!\[).*\n?)*", text, re.MULTILINE
            )
            if found:
                lines = [each for each in found[0].splitlines() if not each.startswith(";")]
                section = "\n".join(lines).rstrip() + "\n"
                return gap + _named(section, other, name)
    return gap + agent_section(name, _python_in(text) or "%(here)s/.venv/bin/python")


def _named(section: str, other: str, name: str) -> str:
    """Give another program's section a name; the same word may stand in it for something else."""
    word = re.escape(other)
    places = (
        rf"(?<=\[program:){word}(?=\])",
        rf"(?<=agents/){word}(?=\.py\b)",
        rf"(?<=/){word}(?=\.(?:out|err|log)\b)",
        rf'(?<=MESH_AGENT="){word}(?=")',
        rf"(?<=MESH_AGENT=){word}\b",
        rf"(?<=--name[ =]){word}\b",
    )
    return re.sub("|".join(places), name, section)


def _python_in(text: str) -> str | None:
    """Give the interpreter that the mesh's own programs are run with."""
    found = re.search(r"^command=(.+) -m mesh\.supervision\.monitor$", text, re.MULTILINE)
    return None if found is None else found[1]


def _samples(project: Path, topics: list[str]) -> list[dict[str, object] | None]:
    """Invent payloads that the project's schemas of some types take; None where there is none."""
    load_schemas(project)
    schemas = [declaration_of(topic).schema for topic in topics]
    return [None if schema is None else sample_of(schema) for schema in schemas]
