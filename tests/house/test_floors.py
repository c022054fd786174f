"""The floors of mesh/: imports only go down, and each third-party package has one door."""

from __future__ import annotations

import sys

from tests.plumbing.sources import files_under, imports_of, modules_of_mesh, name_of

# From the roof to the ground. A floor may have steps: within it, too, imports only go down a step.
# `package.*` stands for a package and all in it, whose modules may know each other.
FLOORS: list[tuple[str, list[set[str]]]] = [
    ("12 faces", [{"cli.*", "dashboard.*", "testing.*"}]),
    (
        "11 process",
        [{"launch", "survey"}, {"origins"}, {"runtime", "inprocess"}, {"agent_process", "loading"}],
    ),
    ("10 agent", [{"agent"}, {"marks"}]),
    ("9 supervision", [{"supervision.*"}]),
    ("8 assembly", [{"factory"}]),
    ("7 settings", [{"config"}, {"config_values"}]),
    (
        "6 ends",
        [
            {"own_work", "requests", "dead_letter_queue"},
            {"publisher", "consumer", "workers"},
            {"live_intake"},
            {"durable_intake", "gaps", "outbox", "sharing", "slots"},
            {"handler_watch"},
            {"tries"},
            {"committer", "consumer_config", "kept", "replay", "replay_bell", "routes"},
        ],
    ),
    ("5 middleware", [{"middleware.*", "inbox"}]),
    # A broker brings the journal of its fabric along
    ("4 members", [{"brokers.*"}, {"journals.*"}, {"redis_link.*"}]),
    ("3 contracts", [{"broker", "context", "handlers"}, {"journal"}]),
    (
        "2 pure tools",
        [
            {
                "account",
                "codec",
                "filters",
                "retry",
                "signatures",
                "telemetry",
                "topic_map",
            },
            {"batch", "columns", "ledger_views"},
            {"payloads"},
            {"batch", "beats", "card", "causality", "deadletters", "ledger", "process", "rosters"},
        ],
    ),
    ("1 words", [{"events", "logs", "rundir"}, {"replicas", "schemas", "topics"}]),
    (
        "0 ground",
        [{"cancelling", "clock", "env", "errors", "files", "outcomes", "params", "values"}],
    ),
]

# The shop window names everything and is imported by nobody inside
WINDOW = "mesh"

# The contract's `from mesh.broker import RedisMessageBroker` is answered by loading the member when
# somebody asks; the contract itself knows none
LAZY = {"mesh.broker": ("mesh.brokers.",)}

# Modules of agents/ that hold no agent
NO_AGENTS = {"agents", "feed", "payloads", "settings"}

DOORS = {
    "aiomultiprocess": {"workers"},
    "click": {"cli.*"},
    "hiredis": {"redis_link.resp"},
    # The language of values here; still, who needs bytes from values asks the codec
    "msgspec": {
        "batch", "beats", "card", "codec", "columns", "context", "dead_letter_queue", "deadletters",
        "events", "handlers", "journals.*", "payloads", "publisher", "replay", "rosters", "schemas",
        "slots", "supervision.*", "survey", "telemetry", "values",
    },
    "opentelemetry": {"telemetry"},
    "pytest": {"testing.*"},
    "pytest_asyncio": {"testing.*"},
    "redis": {"redis_link.nodes"},
    "rich": {"cli.*"},
    "supervisor": {"supervision.conf_check", "supervision.full_disk"},
    "zmq": {"brokers.zeromq", "brokers.forwarder"},
}  # fmt: skip

_STEPS = [step for _, steps in FLOORS for step in steps]


def test_every_module_has_a_floor() -> None:
    homeless = [name for name in modules_of_mesh() if name != WINDOW and _height(name) is None]

    assert homeless == [], "give them a place in FLOORS, and in docs/architecture.md"


def test_imports_only_go_down() -> None:
    """Also those under TYPE_CHECKING: who needs a type knows its owner."""
    wrong = []
    for name, file in modules_of_mesh().items():
        for found in imports_of(file):
            if name != WINDOW and _is_ours(found.target) and not _may(name, found.target):
                wrong.append(f"{file.name}:{found.line}: {name} imports {found.target}")

    assert not wrong, "\n" + "\n".join(wrong)


def test_each_package_has_one_door() -> None:
    wrong = []
    for name, file in modules_of_mesh().items():
        for found in imports_of(file):
            package = found.target.partition(".")[0]
            if _is_foreign(package) and not _is_in(name, DOORS.get(package, set())):
                wrong.append(f"{file.name}:{found.line}: {name} imports {found.target}")

    assert not wrong, "\n" + "\n".join(wrong)


def test_agents_do_not_know_each_other() -> None:
    """What they share are the payloads, and tools that are no agents."""
    agents = {name_of(file).removeprefix("agents.") for file in files_under("agents")}
    wrong = []
    for file in files_under("agents"):
        for found in imports_of(file):
            words = found.target.removeprefix("agents.").split(".")
            if words[0] in agents - NO_AGENTS:
                wrong.append(f"{file.name}:{found.line}: imports {found.target}")
            elif _is_foreign(words[0]) and words[0] not in agents | {"msgspec", "agents"}:
                wrong.append(f"{file.name}:{found.line}: imports {found.target}")

    assert not wrong, "\n" + "\n".join(wrong)


def _height(name: str) -> int | None:
    """Give the step a module stands on, the ground highest in number."""
    return next((at for at, step in enumerate(_STEPS) if _is_in(name, step)), None)


def _may(importer: str, target: str) -> bool:
    if importer.startswith(f"{target}."):
        return False  # a package's own front from inside it: a circle
    if _package(importer) == _package(target) is not None:
        return True
    if target.startswith(LAZY.get(importer, ("-",))):
        return True
    above, below = _height(importer), _height(target)
    return above is not None and below is not None and above < below


def _package(name: str) -> str | None:
    words = name.split(".")
    is_package = f"{words[1]}.*" in set().union(*_STEPS)
    return words[1] if is_package else None


def _is_in(name: str, places: set[str]) -> bool:
    short = name.removeprefix("mesh.")
    return short in places or f"{short.partition('.')[0]}.*" in places


def _is_ours(target: str) -> bool:
    return target.partition(".")[0] == "mesh"


def _is_foreign(package: str) -> bool:
    # The standard library of a younger Python is no package of others
    return package not in sys.stdlib_module_names | {"annotationlib"} and package != "mesh"
