"""What the documents show runs."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from mesh.cli.templates import PYTEST
from tests.plumbing.processes import ROOT, environment, run_program, run_python

if TYPE_CHECKING:
    from pathlib import Path

_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TESTS = re.compile(r"^(async )?def test_", re.MULTILINE)
SNIPPETS = [
    pytest.param(
        code,
        id=f"{path.name}-{number}",
        marks=[pytest.mark.redis] if path.name == "redis.md" else [],
    )
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    for number, code in enumerate(_PYTHON.findall(path.read_text()), 1)
]


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs(code: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    needs_redis = request.node.get_closest_marker("redis") is not None
    url = request.getfixturevalue("redis_url") if needs_redis else None

    if _TESTS.search(code):
        (tmp_path / "pyproject.toml").write_text(PYTEST)
        (tmp_path / "test_snippet.py").write_text(code)
        ended = run_program(sys.executable, "-m", "pytest", "-q", "-W", "error", cwd=tmp_path)
    else:
        # An agent's script would run until it is stopped; that it can be made is what is shown
        ended = run_python(
            code.replace('if __name__ == "__main__":', "if False:"), env=environment(REDIS_URL=url)
        )

    assert ended.code == 0, ended
