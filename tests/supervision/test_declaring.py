"""What agents hear durably is kept for them before they start, however their scripts look."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mesh.config import MessageBusConfig
from mesh.journal import Record
from mesh.journals.sqlite import SQLiteJournal
from mesh.rundir import RunDir
from mesh.supervision.declaring import declare_groups
from tests.plumbing.processes import ROOT, run_python

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
from mesh import Agent, Event, EventType, on, run

print("a script may print")


class Good(Agent):
    start = "earliest"

    @on(EventType.ORDER_EXECUTED, EventType.MARKET_DATA_RECEIVED)
    async def on_fill(self, event: Event) -> None:
        pass
"""
SCRIPTS = {
    "good": f"{GOOD}\n\nif __name__ == '__main__':\n    run(Good)\n",
    "unguarded": f"{GOOD}\n\nrun(Good)\n",
    "raises": "raise OSError('no luck')",
    "exits": "import sys; sys.exit('gone')",
    "vanishes": "import os; os._exit(3)",
    "hangs": "import time; time.sleep(3600)",
    "meddles": f"import mesh.events; mesh.events.is_durable = None\n{GOOD}",
    "empty": "",
}


def write(folder: Path) -> dict[str, Path]:
    paths = {name: folder / f"{name}_script.py" for name in SCRIPTS}
    for name, path in paths.items():
        path.write_text(SCRIPTS[name])
    return paths


def test_each_script_answers_for_itself(tmp_path: Path) -> None:
    paths = write(tmp_path)
    code = (
        "import sys, msgspec; from mesh.survey import survey;"
        "print(msgspec.json.encode(survey(sys.argv[1:], limit_s=10)).decode())"
    )

    ended = run_python(code, *map(str, paths.values()), timeout_s=40)

    assert ended.code == 0, ended
    found = {each["script"]: each for each in json.loads(ended.out)}
    sound = {name for name, path in paths.items() if not found[str(path)]["problem"]}
    assert sound == {"good", "unguarded", "meddles"}
    assert found[str(paths["good"])]["durable"] == ["order.executed"]
    assert found[str(paths["good"])]["start"] == "earliest"
    assert "no luck" in found[str(paths["raises"])]["problem"]


async def test_what_is_said_before_the_first_start_is_kept(tmp_path: Path, rundir: Path) -> None:
    text = (ROOT / "supervisord.conf").read_text()
    head = text[: text.index("[program:portfolio]")]
    section = text[text.index("[program:risk]") : text.index("[program:signals]")]
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").touch()
    for name in ("late", "broken"):
        head += section.replace("risk", name)
    (tmp_path / "supervisord.conf").write_text(head)
    (tmp_path / "agents" / "late.py").write_text(GOOD)
    (tmp_path / "agents" / "broken.py").write_text("1 +")
    home = RunDir(rundir).ensure()

    for _ in range(2):
        unknown = await declare_groups(tmp_path, home, MessageBusConfig())
        assert unknown == ["broken"]

    async with SQLiteJournal(home.journal()) as journal:
        await journal.append([Record("order.executed", "a", b"")])
        assert [each.id for each in await journal.read("late", "late")] == ["a"]
        assert {view.group for view in await journal.groups()} == {"late"}
