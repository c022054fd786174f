"""What the documents show runs."""

from __future__ import annotations

import re

import pytest

from tests.plumbing.processes import ROOT, run_python

_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    for number, code in enumerate(_PYTHON.findall(path.read_text()), 1)
]


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs(code: str) -> None:
    # An agent's script would run until it is stopped; that it can be made is what is shown
    ended = run_python(code.replace('if __name__ == "__main__":', "if False:"))

    assert ended.code == 0, ended
