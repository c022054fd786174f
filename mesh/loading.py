"""Find the agent class in a script, with an answer for everything that can be wrong with it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from mesh.agent import Agent
from mesh.errors import MeshError

if TYPE_CHECKING:
    from types import ModuleType


class AgentScriptError(MeshError):
    """
    A script that holds no agent that can run; the last line of the message says why.

    Args:
        script: Its path.
        words: What is wrong with it.
    """

    def __init__(self, script: Path, words: str) -> None:
        """Keep which script it is."""
        self.script = script
        super().__init__(words)


def load_agent(script: str | Path) -> type[Agent]:
    """
    Import a script and give its one agent class.

    Args:
        script: The path of a Python file.

    Raises:
        AgentScriptError: It is missing, does not compile, raises, or holds none or several agents.
    """
    path = Path(script)
    if not path.is_file():
        raise AgentScriptError(path, f"{path}: no such file")
    try:
        module = _import(path)
    except (Exception, SystemExit) as error:
        words = f"{path} cannot be imported:\n{words_with_place(error)}"
        raise AgentScriptError(path, words) from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Agent)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    if not found:
        kind = path.stem.title().replace("_", "")
        raise AgentScriptError(path, f"{path}: no agent class; write `class {kind}(Agent):`")
    # A base class beside its only child is a common way to write agents
    leaves = [one for one in found if not any(one in other.__mro__[1:] for other in found)]
    if len(leaves) > 1:
        names = ", ".join(one.__name__ for one in leaves)
        words = f"{path}: {len(leaves)} agent classes ({names}); one a script"
        raise AgentScriptError(path, words)
    return leaves[0]


def _import(path: Path) -> ModuleType:
    """
    Import by the dotted name when the script lies under the current directory.

    So it is the same module that others import by name, and its schemas are the same classes.
    """
    root = Path.cwd()
    try:
        relative = path.resolve().relative_to(root)
    except ValueError:
        relative = None
    if relative is not None and all(part.isidentifier() for part in relative.with_suffix("").parts):
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
        name = ".".join(relative.with_suffix("").parts)
        if _is_found_at(name, path):
            return importlib.import_module(name)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    # Siblings of the script can be imported, after everything else
    sys.path.append(str(path.resolve().parent))
    specification.loader.exec_module(module)
    return module


def _is_found_at(name: str, path: Path) -> bool:
    """Say whether a dotted name means this file, and not one of an installed package."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return True  # the import says why
    return found is not None and found.origin is not None and path.samefile(found.origin)


def words_with_place(error: BaseException) -> str:
    """Give an error in words; its place ends the last line, which is all that some faces show."""
    words = "".join(traceback.format_exception_only(error)).strip()
    return f"{words} ({_place_of(error)})"


def _place_of(error: BaseException) -> str:
    """Name the innermost line of the project's own code that an error went through."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        places = [(Path(error.filename), error.lineno)]
    else:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(Path(frame.filename), frame.lineno) for frame in frames]
    root = Path.cwd()
    path, line = ([each for each in places if _is_own(each[0], root)] or places)[-1]
    return f"{path.relative_to(root) if path.is_relative_to(root) else path}, line {line}"


def _is_own(path: Path, root: Path) -> bool:
    """Say whether a file is the project's, and neither installed nor of the mesh itself."""
    return (
        path.is_relative_to(root)
        and "site-packages" not in path.parts
        and not path.is_relative_to(Path(__file__).parent)
    )
