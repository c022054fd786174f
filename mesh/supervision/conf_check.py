"""Asks supervisord's own reader what it would say of a supervisord.conf, before it is started."""

from __future__ import annotations

import configparser
import io
import itertools
import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: Where supervisord says what it is about.
_PLACE = re.compile(
    r"(?P<words>.*) in section '(?P<section>.*)' \(file: '(?P<file>.*)'\)", re.DOTALL
)
#: Takes ``--name`` over MESH_AGENT.
_RUNTIME = "mesh.runtime"


def complaints_of(
    text: str, rendered: Path, original: Path, environ: Mapping[str, str]
) -> list[str]:
    """
    Say why supervisord would not start with a configuration, or an agent would never be READY.

    Args:
        text: What supervisord would read.
        rendered: The file in which it would; the folders that it names must be there.
        original: The file that people write; the words name it.
        environ: What ``%(ENV_...)s`` would mean.
    """
    # Not above: most commands do not need it, and it takes its time
    from supervisor.options import ServerOptions

    source = io.StringIO(text)
    source.name = str(rendered)  # what it includes is found from there
    try:
        options = ServerOptions()
        options.environ_expansions = {f"ENV_{name}": value for name, value in environ.items()}
        options.configfile = str(rendered)
        options.here = str(rendered.parent)
        section = options.read_config(source)
    except (ValueError, configparser.Error) as error:
        return [_in_own_words(str(error), rendered, original)]
    except OSError:
        # A disk so full that it finds no temporary directory: who writes next says that better
        return []
    return [
        f"{original}: [program:{program.name}] runs an agent that is called {agent!r}"
        f" ({where}): both need one name"
        for group in section.process_group_configs
        for program in group.process_configs
        for agent, where in _agent_of(program.command, program.environment)
        if agent != program.name
    ]


def _in_own_words(said: str, rendered: Path, original: Path) -> str:
    """Give what supervisord said of a rendered file as words about the one that people write."""
    found = _PLACE.fullmatch(said)
    if found is None:
        return f"{original}: {said}"
    file = original if found["file"] == str(rendered) else found["file"]
    return f"{file}: [{found['section']}]: {found['words']}"


def _agent_of(command: str, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Give the name that an agent gets from its program, and where from; nothing without one."""
    try:
        words = shlex.split(command)
    except ValueError:  # supervisord says so when it starts it
        words = []
    option = _option_of(words[words.index(_RUNTIME) + 1 :]) if _RUNTIME in words else None
    if option is not None:
        return [(option, f"--name {option}")]
    name = environment.get("MESH_AGENT")
    return [(name, f"MESH_AGENT={name}")] if name else []


def _option_of(words: Sequence[str]) -> str | None:
    for word, following in itertools.zip_longest(words, words[1:]):
        if word == "--name":
            return following
        if word.startswith("--name="):
            return word.removeprefix("--name=")
    return None
