"""Distributed tracing: the spans of two agent processes form one trace."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mesh import launch
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

# Each agent brings a provider that keeps its spans, and writes them down when it ends
_KEEPING = """
import json
from pathlib import Path
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from mesh import Agent, Event, on, run, source

kept = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
trace.set_tracer_provider(provider)


class Keeping(Agent):
    async def teardown(self):
        spans = [json.loads(span.to_json()) for span in kept.get_finished_spans()]
        Path(self.params["out"], self.name + ".spans").write_text(json.dumps(spans))

"""
_ASKING = (
    _KEEPING
    + """
class Asking(Keeping):
    @source
    async def ask(self):
        await self.publish("trace.asked", {"n": 1})
        print("asked")


del Keeping
if __name__ == "__main__":
    run(Asking)
"""
)
_ANSWERING = (
    _KEEPING
    + """
class Answering(Keeping):
    @on("trace.asked")
    async def answer(self, event: Event):
        await self.publish("trace.answered", {"traceparent": event.traceparent})


del Keeping
if __name__ == "__main__":
    run(Answering)
"""
)


async def test_a_trace_goes_from_process_to_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEGION_TRACING", "on")
    scripts = {"asking": _ASKING, "answering": _ANSWERING}
    for name, code in scripts.items():
        (tmp_path / f"{name}.py").write_text(code)

    async with launch(
        [tmp_path / "answering.py", tmp_path / "asking.py"], params={"out": str(tmp_path)}
    ) as mesh:
        await mesh.sources_done()
        await eventually(lambda: mesh.account().published.get("trace.answered") == 1)

    sent, said = (spans(tmp_path, name) for name in scripts)
    asked = sent["publish trace.asked"]
    processed, answered = said["process trace.asked"], said["publish trace.answered"]
    assert processed["parent_id"] == asked["context"]["span_id"]
    assert answered["parent_id"] == processed["context"]["span_id"]
    traces = {span["context"]["trace_id"] for span in (asked, processed, answered)}
    assert len(traces) == 1
    assert (asked["kind"], processed["kind"]) == ("SpanKind.PRODUCER", "SpanKind.CONSUMER")
    assert processed["attributes"] == {
        "messaging.system": "legion_mesh",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "trace.asked",
        "messaging.message.id": asked["attributes"]["messaging.message.id"],
        "messaging.message.conversation_id": asked["attributes"]["messaging.message.id"],
        "messaging.client.id": "answering",
    }


def spans(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Read an agent's spans by their names."""
    kept = json.loads((folder / f"{name}.spans").read_text())
    return {span["name"]: span for span in kept if "agent." not in span["name"]}
