"""
What must not stand in mesh/ and agents/: ways for bytes from outside to become code, and a sum that
forgets what happens while it waits.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from tests.plumbing.processes import ROOT
from tests.plumbing.sources import files_under, imports_of, tree_of

if TYPE_CHECKING:
    from pathlib import Path

MODULES = {"cPickle", "cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "shelve", "yaml"}
CALLS = {
    "__import__", "asyncio.create_subprocess_shell", "compile", "eval", "exec", "os.popen",
    "os.system", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
FILES = files_under("mesh", "agents")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_turns_input_into_code(file: Path) -> None:
    """Never pickle, anywhere; no shell; no eval."""
    wrong = [
        f"line {found.line}: {found.target}"
        for found in imports_of(file)
        if found.target.partition(".")[0] in MODULES
    ]
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                wrong.append(f"line {node.lineno}: {ast.unparse(node.func)}")
            if any(word.arg == "shell" for word in node.keywords):
                wrong.append(f"line {node.lineno}: shell=")

    assert not wrong, "\n" + "\n".join(wrong)


def test_nothing_shared_is_added_to_across_an_await() -> None:
    """`me.stale |= await ...` reads first, then waits, then writes: others' changes are lost."""
    wrong = [
        f"{file.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)}"
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.AugAssign)
        and not isinstance(node.target, ast.Name)
        and any(isinstance(each, ast.Await) for each in ast.walk(node.value))
    ]

    assert not wrong, "\n" + "\n".join(wrong)
