"""Start a mesh and show how its programs become READY."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from mesh.card import read_cards
from mesh.cli import say
from mesh.errors import BrokerUnavailableError
from mesh.factory import make_broker
from mesh.supervision import boot
from mesh.supervision.boot import BootError
from mesh.supervision.conf import unlisted_of
from mesh.supervision.declaring import declare_groups

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path
    from types import TracebackType

    from mesh.cli.place import Place
    from mesh.config import MessageBusConfig
    from mesh.errors import MeshError
    from mesh.rundir import RunDir
    from mesh.supervision.boot import ProgramState

_COLOURS: dict[str, say.Colour] = {"ready": "green", "failed": "red", "starting": "yellow"}


class Progress:
    """
    Shows programs on their way to READY: a live table in a terminal, else a line a change.

    Use it as a context and hand `show` to `boot.wait_ready`.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Show nothing yet; with `quiet`, never."""
        self._quiet = quiet
        self._told: dict[str, str] = {}
        self._live: Any = None

    def __enter__(self) -> Self:
        """Begin."""
        self._live = None if self._quiet else say.begin_live()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End; what is left on the screen are the lines of `tell_outcome`."""
        if self._live is not None:
            self._live.stop()

    def show(self, states: list[ProgramState]) -> None:
        """Show how things stand."""
        if self._quiet:
            return
        if self._live is not None:
            rows = [(each.name, each.verdict, each.pid or None) for each in states]
            colours = [_COLOURS.get(each.verdict, "") for each in states]
            self._live.update(say.rich_table(("program", "state", "pid"), rows, colours))
            return
        for each in states:
            if each.verdict != "starting" and self._told.get(each.name) != each.verdict:
                pid = f" (pid {each.pid})" if each.pid else ""
                say.note(f"{each.name}: {each.verdict}{pid}")
            self._told[each.name] = each.verdict


def tell_failures(rundir: RunDir, states: Sequence[ProgramState]) -> list[str]:
    """Say on stderr which programs failed and why; give their names."""
    failed = [state for state in states if state.verdict == "failed"]
    for state in failed:
        say.note(f"{state.name} failed: {state.last_words}", "red")
    if failed:
        names = " ".join(state.name for state in failed)
        say.note(f"more: mesh logs {names}  ({rundir.path / 'log'})")
    return [state.name for state in failed]


def tell_unread(rundir: RunDir, params: Collection[str]) -> None:
    """Name parameters that no agent has read by the time it was READY."""
    read = {name for card in read_cards(rundir).values() for name in card.params_read}
    for name in sorted(set(params) - read):
        say.note(f"param {name}: no agent has asked for it so far; is it misspelt?", "yellow")


def tell_unlisted(project: Path) -> None:
    """Say which scripts of agents/ are no programs: nobody would see them missing."""
    for name in unlisted_of(project):
        say.note(
            f"agents/{name}.py is no program: `mesh new {name}` adds [program:{name}]", "yellow"
        )


async def declare_durable_groups(
    place: Place, config: MessageBusConfig, agents: Collection[str] | None = None
) -> None:
    """
    Let the journal keep what agents hear, before they start; see `mesh.supervision.declaring`.

    Raises:
        ConfigurationError: The journal cannot keep what it promises.
    """
    try:
        unknown = await declare_groups(place.project, place.rundir, config, agents)
    except BrokerUnavailableError as error:
        say.note(f"what agents hear is kept only from their start on: {error}", "yellow")
        return
    except NotImplementedError:
        return  # a fabric without a journal
    if unknown:
        names = ", ".join(unknown)
        say.note(f"what {names} hears is kept only from its start on: its script does not load")


async def left_running(rundir: RunDir, config: MessageBusConfig, late: BootError) -> MeshError:
    """Make the error for a mesh that is not READY in time and runs on; say what it waits for."""
    if config.broker_type == "redis":
        try:
            async with make_broker(config, rundir.path):
                pass
        except BrokerUnavailableError as error:
            return BrokerUnavailableError(
                f"{late}\n{error}\nthe mesh keeps running and waits for it; `mesh down` ends that"
            )
    return BootError(
        f"{late}\nthe mesh keeps running; `mesh status` tells more, `mesh down` ends it"
    )


async def ready(
    rundir: RunDir, *, until_begun: bool = False, quiet: bool = False
) -> list[ProgramState]:
    """
    Wait as `boot.wait_ready` does, showing it.

    Raises:
        BootError: Some are neither in time.
    """
    with Progress(quiet=quiet) as progress:
        return await boot.wait_ready(rundir, until_begun=until_begun, on_change=progress.show)
