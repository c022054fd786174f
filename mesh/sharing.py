"""What a replica does with live events that are another one's: it leaves them alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.events import key_of
from mesh.replicas import slot_of

if TYPE_CHECKING:
    from collections.abc import Set

    from mesh.batch import Batch


def leave_to_others(batch: Batch, mine: Set[int]) -> int:
    """
    Take out of a batch what lies in no slot of ours.

    Args:
        batch: All replicas get the same.
        mine: Our slots.

    Returns:
        How many events are another's.
    """
    came = len(batch.events) + len(batch.rejected or ())
    batch.events = [event for event in batch.events if slot_of(key_of(event)) in mine]
    if batch.rejected:
        # Its key cannot be read; all the same it is put aside once
        batch.rejected = [each for each in batch.rejected if slot_of(each[2]) in mine]
    return came - len(batch.events) - len(batch.rejected or ())
