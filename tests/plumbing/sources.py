"""Reads the project's own Python: which modules there are and what each imports."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.plumbing.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_A_MODULE_OF_OURS = re.compile(r"mesh(\.[a-z_0-9]+)+")


@dataclass(frozen=True, slots=True)
class Import:
    """One import, wherever it stands: on top, inside a function, under TYPE_CHECKING."""

    target: str
    line: int


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def files_under(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def name_of(file: Path) -> str:
    """Give a module's dotted name; a package has the name of its folder."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules_of_mesh() -> dict[str, Path]:
    return {name_of(file): file for file in files_under("mesh")}


def imports_of(file: Path) -> Iterator[Import]:
    """Give all imports of a file; `from mesh import codec` counts as one of `mesh.codec`."""
    tree = tree_of(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            yield from _from(node)
    if any(
        isinstance(node, ast.Attribute) and node.attr == "import_module" for node in ast.walk(tree)
    ):
        yield from _by_name(tree)


def _from(node: ast.ImportFrom) -> Iterator[Import]:
    module = node.module or ""
    inside = [alias.name for alias in node.names if f"{module}.{alias.name}" in modules_of_mesh()]
    yield from (Import(f"{module}.{name}", node.lineno) for name in inside)
    if len(inside) < len(node.names):
        yield Import(module, node.lineno)


def _by_name(tree: ast.Module) -> Iterator[Import]:
    """Where modules are loaded by name, a string that names one of ours is an import."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and _A_MODULE_OF_OURS.fullmatch(node.value)
            and node.value in modules_of_mesh()
        ):
            yield Import(node.value, node.lineno)
