"""
How the Redis journal forgets a group that is gone for good, or one topic of a group.

On one server that is one script: refused, it has changed nothing. On a cluster the group's own keys
go first, in one script that looks for living consumers, then what its streams know of it, and its
name last: what fails midway is done by forgetting once more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from mesh.journal import PARTITIONS
from mesh.journals.local import still_lives
from mesh.journals.redis_lua import EVEN_FULL, HEAD, MEMBERS, Script
from mesh.journals.redis_scripts import SETTLE
from mesh.journals.redis_steps import decode_decision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.journals.redis_keys import Keys
    from mesh.journals.redis_store import Store

#: Give the living consumers of a group, or remove what the plan names and say how much there was.
_FORGET = Script(
    "forget",
    EVEN_FULL
    + HEAD
    + MEMBERS
    + """
local now, living, gone = now_ms(), {}, 0
for name, each in pairs(plan.members and members_of(KEYS[plan.members]) or {}) do
  if each.ends >= now and each.ends <= now + each.lease then living[#living + 1] = name end
end
if #living > 0 then return {living, 0} end
for _, at in ipairs(plan.streams or {}) do
  for _, group in ipairs({plan.group, plan.group .. ':settled'}) do
    local destroyed = pcall('XGROUP', 'DESTROY', KEYS[at], group)
    if type(destroyed) == 'number' then gone = gone + destroyed end
  end
  call('HDEL', KEYS[at] .. ':owners', plan.group, plan.group .. ' step')
  call('UNLINK', KEYS[at] .. ':done:' .. plan.group)
end
for _, at in ipairs(plan.unlinks or {}) do
  local unlinked = call('UNLINK', KEYS[at])
  -- Of a topic they tell nothing
  if not plan.topic then gone = gone + unlinked end
end
if plan.topics then
  gone = gone + call('SREM', KEYS[plan.topics], plan.topic)
  call('HINCRBY', KEYS[plan.numbers], 'version', 1)
end
if plan.groups then gone = gone + call('SREM', KEYS[plan.groups], plan.group) end
return {living, gone}
""",
)


class _Call:
    """One call of the script: keys, and the plan that speaks of them by their numbers."""

    def __init__(self, group: str) -> None:
        self.keys: list[bytes] = []
        self.plan: dict[str, Any] = {"group": group}

    def name(self, role: str, key: bytes) -> None:
        self.plan[role] = self._number(key)

    def list(self, role: str, keys: Sequence[bytes]) -> None:
        self.plan[role] = [self._number(key) for key in keys]

    def _number(self, key: bytes) -> int:
        self.keys.append(key)
        return len(self.keys)


async def forget(store: Store, keys: Keys, group: str, topic: str | None) -> bool:
    """
    Forget a group, or what it hears of one topic; False when there is nothing of it.

    Raises:
        ConfigurationError: A consumer of it lives.
    """
    if topic is None:
        # All topics there are: what the group heard is not known any more the second time
        found = await store.call(keys.topics, "SMEMBERS", keys.topics)
        topics = [each.decode() for each in found]
    else:
        topics = [topic]
        await _settle_decided(store, keys, group)
    streams = [keys.stream(each, partition) for each in topics for partition in range(PARTITIONS)]
    first = _Call(group)
    first.name("members", keys.members(group))
    if topic is None:
        first.list("unlinks", keys.all_of(group))
    else:
        first.list("unlinks", [keys.decisions(group)])
        first.name("topics", keys.topics_of(group))
        first.name("numbers", keys.numbers(group))
        first.plan["topic"] = topic
    if not keys.cluster:
        first.list("streams", streams)
        if topic is None:
            first.name("groups", keys.groups)
        return await _run(store, first) > 0
    gone = await _run(store, first)
    parts = []
    for part in keys.parts(streams):
        parts.append(_Call(group))
        parts[-1].list("streams", part)
    gone += sum(await asyncio.gather(*(_run(store, each) for each in parts)))
    if topic is None:
        last = _Call(group)
        last.name("groups", keys.groups)
        gone += await _run(store, last)
    return gone > 0


async def _settle_decided(store: Store, keys: Keys, group: str) -> None:
    """Settle, on a cluster, what the dead had decided: of other topics it must not come again."""
    found = await store.call(keys.decisions(group), "HVALS", keys.decisions(group))
    plans = map(decode_decision, found)
    await asyncio.gather(*(store.run(SETTLE, part, plan) for part, plan in plans))


async def _run(store: Store, call: _Call) -> int:
    living, gone = await store.run(_FORGET, call.keys, call.plan)
    if living:
        group = call.plan["group"]
        raise still_lives(group, [name.decode() for name in living])
    return int(gone)
