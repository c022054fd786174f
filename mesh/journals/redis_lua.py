"""
What the Redis journal's scripts share; each of them is one transaction inside Redis.

A script gets its keys, one msgpack map (the plan), and whatever bytes the plan speaks of, because
Redis's msgpack knows texts only; keys and bytes go by their numbers. On a cluster the keys of one
call lie in one slot. All can be run a second time, when nobody knows whether the first was heard:
what they write is absolute, and ids are remembered.

What writes comes last, and XACK after all else: Redis undoes nothing when a script fails midway.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Script:
    """One script, known to Redis by its hash."""

    name: str
    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        """Hash it as Redis does."""
        digest = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


#: For scripts that must run when Redis is full, or nobody could empty it.
EVEN_FULL = "#!lua flags=allow-oom\n"

#: What every script begins with.
HEAD = """
local plan = cmsgpack.unpack(ARGV[1])
local call, pcall = redis.call, redis.pcall
local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function text(number) return string.format('%.0f', number) end
-- Redis's flat lists as tables
local function map(list)
  local made = {}
  for at = 1, #list, 2 do made[list[at]] = list[at + 1] end
  return made
end
local function wake()
  for _, channel in ipairs(plan.wakes or {}) do call(plan.verb, channel, '') end
end
-- Lua hands over so many values at once
local function in_parts(list, act)
  for first = 1, #list, 4000 do act(first, math.min(first + 3999, #list)) end
end
-- Streams of this plan whose group is another's by now
local function lost()
  local found = {}
  for _, fence in ipairs(plan.fences or {}) do
    local owner = call('HGET', KEYS[fence[1]] .. ':owners', plan.group)
    -- What is decided already may also be settled while nobody owns the stream
    if owner ~= fence[2] and (owner or not plan.step) then found[#found + 1] = fence[1] end
  end
  return found
end
-- What has been handed out, and what of it is settled, are two groups of the stream
local function groups_of(key)
  local groups, handed, settled = pcall('XINFO', 'GROUPS', key), nil, nil
  for _, each in ipairs(groups.err and {} or groups) do
    local group = map(each)
    if group.name == plan.group then handed = group end
    if group.name == plan.group .. ':settled' then settled = group end
  end
  return handed, settled
end
local function move(key, group, position, read)
  if read < 0 then return pcall('XGROUP', 'SETID', key, group, position) end
  return pcall('XGROUP', 'SETID', key, group, position, 'ENTRIESREAD', read)
end
-- Whether an error says that the group was destroyed, or the stream deleted
local function is_missing(reply)
  return reply.err and (string.find(reply.err, 'NOGROUP', 1, true)
    or string.find(reply.err, 'requires the key to exist', 1, true))
end
local function claim(key, ids, ...)
  local words = {key, plan.group, plan.consumer, 0}
  for _, id in ipairs(ids) do words[#words + 1] = id end
  for _, word in ipairs({...}) do words[#words + 1] = word end
  return pcall('XCLAIM', unpack(words))
end
"""

#: For scripts that compare positions.
ORDER = """
local function before(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if a_ms ~= b_ms then return tonumber(a_ms) < tonumber(b_ms) end
  return tonumber(a_seq) < tonumber(b_seq)
end
"""

#: For scripts that change the state of a group. A call that a dying connection delivers late, after
#: the next ones, would change the state back; it is known by its number.
STATE = """
local function is_known()
  if not plan.number then return false end
  local last = call('HGET', KEYS[plan.steps], plan.consumer) or ''
  local incarnation, number = string.match(last, '^(%S+) (%d+)$')
  return incarnation == plan.incarnation and tonumber(number) >= plan.number
end
local function note_number()
  if plan.number then
    call('HSET', KEYS[plan.steps], plan.consumer, plan.incarnation .. ' ' .. text(plan.number))
  end
end
local function change_state()
  for _, set in ipairs(plan.sets or {}) do
    call('HSET', KEYS[plan.state], set[1], ARGV[set[2]])
  end
  if plan.unsets then call('HDEL', KEYS[plan.state], unpack(plan.unsets)) end
end
"""

#: For scripts that look at the consumers of a group and their leases.
MEMBERS = """
local function members_of(key)
  local made = {}
  for name, value in pairs(map(call('HGETALL', key))) do
    local incarnation, ends, lease = string.match(value, '^(%S+) (%d+) (%d+)$')
    made[name] = {incarnation = incarnation, ends = tonumber(ends), lease = tonumber(lease)}
  end
  return made
end
local function lease(key, name, incarnation, ends, length)
  call('HSET', key, name, incarnation .. ' ' .. text(ends) .. ' ' .. text(length))
end
-- Whether the consumer should look anew at its group: it has changed, or a lease has ended
local function has_changed(numbers, members)
  if call('HGET', KEYS[numbers], 'version') ~= plan.version then return true end
  local now, me = now_ms(), nil
  for name, each in pairs(members_of(KEYS[members])) do
    if name == plan.consumer then
      me = each
    elseif each.ends < now or each.ends > now + each.lease then
      return true
    end
  end
  if not me or me.incarnation ~= plan.incarnation then return true end
  if me.ends - now < plan.lease / 2 then
    lease(KEYS[members], plan.consumer, plan.incarnation, now + plan.lease, plan.lease)
  end
  return false
end
"""
