"""A project of a few agents of this folder: its supervisord.conf and its agents/."""

from __future__ import annotations

import configparser
import shutil
from pathlib import Path

from mesh.supervision.conf import INFRASTRUCTURE
from tests.plumbing.processes import ROOT

_HERE = Path(__file__).parent
#: The program whose settings the others get.
_MODEL = "risk"


def write_project(project: Path, *scripts: str, folder: Path = _HERE) -> None:
    """
    Write a supervisord.conf with the mesh's own programs and these agents, in this order.

    Args:
        project: Where to.
        scripts: Their names.
        folder: Where the scripts are.
    """
    parser = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    parser.read(ROOT / "supervisord.conf")
    own = {f"program:{name}" for name in INFRASTRUCTURE}
    model = dict(parser[f"program:{_MODEL}"])
    for section in parser.sections():
        if section.startswith("program:") and section not in own:
            parser.remove_section(section)
    (project / "agents").mkdir()
    (project / "agents" / "__init__.py").touch()
    for name in scripts:
        parser[f"program:{name}"] = {key: text.replace(_MODEL, name) for key, text in model.items()}
        shutil.copy(folder / f"{name}.py", project / "agents")
    with (project / "supervisord.conf").open("w") as file:
        parser.write(file)
