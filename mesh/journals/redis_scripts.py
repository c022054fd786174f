"""
What the Redis journal does inside Redis, in Lua: each script is one transaction.

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


_HEAD = """
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
    if call('HGET', KEYS[fence[1]] .. ':owners', plan.group) ~= fence[2] then
      found[#found + 1] = fence[1]
    end
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

# KEYS from plan.members on: the members of a group, in order of name
_MEMBERS = """
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

#: Keep events, letters and state, and settle; all of it, or nothing when a stream is another's.
COMMIT = Script(
    "commit",
    _HEAD
    + """
local gone = lost()
if #gone > 0 then return {1, gone} end

local function keep_records()
  local ids, known, seen = plan.ids, {}, {}
  for _, key in ipairs({KEYS[plan.memory], KEYS[plan.memory + 1]}) do
    in_parts(ids, function(first, last)
      for at, found in ipairs(call('SMISMEMBER', key, unpack(ids, first, last))) do
        if found == 1 then seen[ids[first + at - 1]] = true end
      end
    end)
  end
  -- Only what is kept is known: an id without its event would be an event lost
  local new = {}
  local function remember()
    in_parts(new, function(first, last)
      call('SADD', KEYS[plan.memory], unpack(new, first, last))
    end)
  end
  -- One order over streams; never behind what was given out, whatever the clock does
  local ms, seq, now = 0, -1, now_ms()
  local last = call('GET', KEYS[plan.clock])
  if last then
    ms, seq = string.match(last, '^(%d+)-(%d+)$')
    ms, seq = tonumber(ms), tonumber(seq)
  end
  if now > ms and not plan.ms then ms, seq = now, -1 end
  local prefix, begin = text(ms) .. '-', 1
  for at, id in ipairs(ids) do
    local ends = begin + plan.lengths[at]
    if seen[id] then
      known[#known + 1] = at - 1
    else
      seen[id] = true
      seq = seq + 1
      local proposed = plan.seqs and plan.seqs[at]
      if proposed and (plan.ms > ms or (plan.ms == ms and proposed > seq)) then
        ms, seq, prefix = plan.ms, proposed, text(plan.ms) .. '-'
      end
      local key, frame = KEYS[plan.streams[at]], string.sub(ARGV[2], begin, ends - 1)
      local added = pcall('XADD', key, prefix .. seq, 'id', id, 'event', frame)
      if type(added) == 'table' and added.err then
        if not string.find(added.err, 'equal or smaller', 1, true) then
          remember()
          error(added.err)
        end
        -- A stranger has added here in this very millisecond
        local top = map(call('XINFO', 'STREAM', key))['last-generated-id']
        ms, seq = string.match(top, '^(%d+)-(%d+)$')
        prefix, ms, seq = ms .. '-', tonumber(ms), tonumber(seq) + 1
        call('XADD', key, prefix .. seq, 'id', id, 'event', frame)
      end
      new[#new + 1] = id
    end
    begin = ends
  end
  if #new == 0 then return known end
  remember()
  call('SET', KEYS[plan.clock], prefix .. seq)
  -- Two generations of ids: the older one is forgotten when the newer one is full
  if call('SCARD', KEYS[plan.memory]) >= plan.remember then
    call('UNLINK', KEYS[plan.memory + 1])
    call('RENAME', KEYS[plan.memory], KEYS[plan.memory + 1])
  end
  return known
end

local known = plan.ids and keep_records() or {}
if plan.topics then call('SADD', KEYS[plan.topics], unpack(plan.names)) end
for _, letter in ipairs(plan.letters or {}) do
  local number = call('INCR', KEYS[plan.dead + 2])
  call('HSET', KEYS[plan.dead], letter[1], text(number) .. ' ' .. ARGV[letter[3]])
  call('ZADD', KEYS[plan.dead + 1], letter[2], letter[1])
end
for _, set in ipairs(plan.sets or {}) do
  call('HSET', KEYS[plan.state], set[1], ARGV[set[2]])
end
if plan.unsets then call('HDEL', KEYS[plan.state], unpack(plan.unsets)) end
for _, mark in ipairs(plan.marks or {}) do
  call('HSET', KEYS[mark[1]] .. ':done:' .. plan.group, mark[2], '')
end
for _, mark in ipairs(plan.unmarks or {}) do
  call('HDEL', KEYS[mark[1]] .. ':done:' .. plan.group, mark[2])
end
-- What is overtaken by younger ones goes on the pending list, before the younger ones are settled
for _, pins in ipairs(plan.pins or {}) do
  local done = claim(KEYS[pins[1]], pins[2], 'FORCE', 'JUSTID', 'RETRYCOUNT', 1)
  if is_missing(done) then return {1, {pins[1]}} end
  if done.err then return done end
end
for _, acks in ipairs(plan.acks or {}) do
  call('XACK', KEYS[acks[1]], plan.group, unpack(acks[2]))
end
for _, each in ipairs(plan.settled or {}) do
  local moved = move(KEYS[each[1]], plan.group .. ':settled', each[2], each[3])
  if is_missing(moved) then return {1, {each[1]}} end
  if moved.err then return moved end
end
wake()
return {0, known, plan.ms and text(now_ms()), plan.ms and call('GET', KEYS[plan.clock])}
""",
)

#: Make the groups of each stream, at its end or its beginning.
DECLARE = Script(
    "declare",
    _HEAD
    + """
for _, key in ipairs(KEYS) do
  local read, place = '0', '0'
  if plan.start == 'now' and call('EXISTS', key) == 1 then
    read, place = map(call('XINFO', 'STREAM', key))['entries-added'], '$'
  end
  for _, group in ipairs({plan.group, plan.group .. ':settled'}) do
    local made = pcall('XGROUP', 'CREATE', key, group, place, 'MKSTREAM', 'ENTRIESREAD', read)
    if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then return made end
  end
end
""",
)

#: Note the topics of a group. KEYS: its numbers, its topics.
ENROLL = Script(
    "enroll",
    _HEAD
    + """
if call('SADD', KEYS[2], unpack(plan.topics)) > 0 then call('HINCRBY', KEYS[1], 'version', 1) end
""",
)

#: Join a group, or look again at what is one's own. KEYS: numbers, topics, members, owners.
JOIN = Script(
    "join",
    _HEAD
    + _MEMBERS
    + """
local topics, me = call('SMEMBERS', KEYS[2]), plan.consumer
if #topics == 0 then return {1} end
local now, members, changed = now_ms(), members_of(KEYS[3]), false
local mine = members[me]
if mine and mine.incarnation ~= plan.incarnation then
  if plan.was_member then return {2} end
  mine = nil
end
for name, each in pairs(members) do
  if name ~= me then
    if each.ends < now then
      call('HDEL', KEYS[3], name)
      members[name], changed = nil, true
    elseif each.ends > now + each.lease then
      -- The clock has gone back; a whole lease from now does no harm
      lease(KEYS[3], name, each.incarnation, now + each.lease, each.lease)
    end
  end
end
lease(KEYS[3], me, plan.incarnation, now + plan.lease, plan.lease)
members[me] = members[me] or {}
-- No token is given out twice, not even after all of this was flushed
call('HSETNX', KEYS[1], 'epoch', text(now * 1000))

local names, fair, busy, owners = {}, {}, {}, {}
for name in pairs(members) do names[#names + 1] = name end
table.sort(names)
for partition = 0, plan.partitions - 1 do
  if names[partition % #names + 1] == me then fair[partition] = true end
end
for _, partition in ipairs(plan.busy) do busy[partition] = true end
local owned, given = {}, {}
for field, value in pairs(map(call('HGETALL', KEYS[4]))) do
  local partition, token, name = tonumber(field), string.match(value, '^(%d+) (.*)$')
  if not members[name] or (name == me and not mine) then
    call('HDEL', KEYS[4], field)
    changed = true
  elseif name == me and not fair[partition] and not busy[partition] then
    call('HDEL', KEYS[4], field)
    given[#given + 1], changed = {partition, token}, true
  else
    owners[partition] = name
    if name == me then owned[#owned + 1] = {partition, token} end
  end
end
for partition in pairs(fair) do
  if not owners[partition] then
    local token = text(call('HINCRBY', KEYS[1], 'epoch', 1))
    call('HSET', KEYS[4], partition, token .. ' ' .. me)
    owned[#owned + 1], changed = {partition, token}, true
  end
end
if changed or not mine then call('HINCRBY', KEYS[1], 'version', 1) end
local right = {}
for partition in pairs(fair) do right[#right + 1] = partition end
return {0, call('HGET', KEYS[1], 'version'), topics, owned, right, given}
""",
)

#: Say whether a consumer should join anew; prolongs its lease. KEYS: numbers, members.
PEEK = Script("peek", _HEAD + _MEMBERS + "return has_changed(1, 2) and 1 or 0")

#: Prolong a lease. KEYS: members.
RENEW = Script(
    "renew",
    _HEAD
    + _MEMBERS
    + """
local me = members_of(KEYS[1])[plan.consumer]
if not me or me.incarnation ~= plan.incarnation then return 0 end
lease(KEYS[1], plan.consumer, plan.incarnation, now_ms() + plan.lease, plan.lease)
return 1
""",
)

#: End a membership. KEYS: numbers, topics, members, owners.
EVICT = Script(
    "evict",
    _HEAD
    + _MEMBERS
    + """
local me = members_of(KEYS[3])[plan.consumer]
if not me or (plan.incarnation and me.incarnation ~= plan.incarnation) then return {{}, {}} end
local owned = {}
for partition, value in pairs(map(call('HGETALL', KEYS[4]))) do
  local token, name = string.match(value, '^(%d+) (.*)$')
  if name == plan.consumer then
    call('HDEL', KEYS[4], partition)
    owned[#owned + 1] = {tonumber(partition), token}
  end
end
call('HDEL', KEYS[3], plan.consumer)
call('HINCRBY', KEYS[1], 'version', 1)
return {call('SMEMBERS', KEYS[2]), owned}
""",
)

#: Take over streams: from now on others' steps are refused there. Tells what was handed out before.
TAKE = Script(
    "take",
    _HEAD
    + """
local taken = {}
for at, key in ipairs(KEYS) do
  local token = plan.tokens[at]
  local before = call('HGET', key .. ':owners', plan.group)
  if before and tonumber(before) > tonumber(token) then
    taken[at] = {1}
  else
    local healed, handed, settled = 0, groups_of(key)
    if not handed or not settled then
      for _, group in ipairs({plan.group, plan.group .. ':settled'}) do
        pcall('XGROUP', 'CREATE', key, group, '0', 'MKSTREAM', 'ENTRIESREAD', 0)
        call('XGROUP', 'SETID', key, group, '0', 'ENTRIESREAD', 0)
      end
      healed, handed, settled = 1, groups_of(key)
    end
    call('HSET', key .. ':owners', plan.group, token)
    local pending, listed = {}, {}
    for _, each in ipairs(call('XPENDING', key, plan.group, '-', '+', 10000)) do
      pending[#pending + 1] = {each[1], each[4]}
      listed[each[1]] = true
    end
    -- Between the two: what the owner before had in hand, and nobody gave back
    local last, from = handed['last-delivered-id'], settled['last-delivered-id']
    while from ~= last do
      local page = call('XRANGE', key, '(' .. from, last, 'COUNT', 50)
      for _, entry in ipairs(page) do
        if not listed[entry[1]] then
          claim(key, {entry[1]}, 'FORCE', 'JUSTID', 'RETRYCOUNT', 1)
          pending[#pending + 1] = {entry[1], 1}
        end
      end
      from = #page == 50 and page[50][1] or last
    end
    local read = tonumber(handed['entries-read'] or -1)
    move(key, plan.group .. ':settled', last, read)
    for _, each in ipairs(call('XINFO', 'CONSUMERS', key, plan.group)) do
      local other = map(each)
      if other.pending == 0 and other.name ~= plan.consumer then
        call('XGROUP', 'DELCONSUMER', key, plan.group, other.name)
      end
    end
    taken[at] = {
      0, last, read, pending,
      call('HKEYS', key .. ':done:' .. plan.group), healed,
      map(call('XINFO', 'STREAM', key))['last-generated-id'],
    }
  end
end
return taken
""",
)

#: Hand events out: the stream says so before anybody gets them.
MARK = Script(
    "mark",
    _HEAD
    + _MEMBERS
    + """
if plan.numbers and has_changed(plan.numbers, plan.numbers + 1) then return {2} end
local gone = lost()
if #gone > 0 then return {1, gone} end
local claimed = {}
for _, hand in ipairs(plan.hands or {}) do
  local moved = move(KEYS[hand[1]], plan.group, hand[2], hand[3])
  if is_missing(moved) then return {3, hand[1]} end
  if moved.err then return moved end
end
for at, each in ipairs(plan.claims or {}) do
  local found = claim(KEYS[each[1]], {each[2]}, 'RETRYCOUNT', each[3])
  if is_missing(found) then return {3, each[1]} end
  if found.err then return found end
  claimed[at] = found
end
return {0, claimed}
""",
)

#: Take events back as if they had not been handed out; with `unfence`, let go of the streams.
RELEASE = Script(
    "release",
    _HEAD
    + """
for _, each in ipairs(plan.streams) do
  local key = KEYS[each[1]]
  if call('HGET', key .. ':owners', plan.group) == each[2] then
    for _, back in ipairs(each[3]) do
      claim(key, {back[1]}, 'FORCE', 'JUSTID', 'RETRYCOUNT', back[2])
    end
    if plan.unfence then call('HDEL', key .. ':owners', plan.group) end
  end
end
wake()
""",
)

#: Count what a group has not settled, by stream: how many, the oldest; and what time it is.
COUNT = Script(
    "count",
    _HEAD
    + """
local found = {}
for at, key in ipairs(KEYS) do
  local handed, settled = groups_of(key)
  if handed and settled then
    local from = settled['last-delivered-id']
    local next = call('XRANGE', key, '(' .. from, '+', 'COUNT', 1)
    local count, oldest = 0, next[1] and next[1][1] or ''
    if handed.pending > 0 then
      oldest = call('XPENDING', key, plan.group)[2]
      -- Others on the list were given back, and lie behind the place of the settled ones
      count = #call('XPENDING', key, plan.group, '-', from, 10000)
    end
    if settled.lag then
      count = count + settled.lag
    else
      -- Redis has lost count, because somebody has deleted entries by hand
      repeat
        local page = call('XRANGE', key, '(' .. from, '+', 'COUNT', 500)
        count, from = count + #page, page[#page] and page[#page][1]
      until #page < 500
    end
    found[at] = {count, oldest}
  else
    found[at] = {0, ''}
  end
end
return {text(now_ms()), found}
""",
)

#: Remove the oldest entries that every group has settled. KEYS: one stream.
TRIM = Script(
    "trim",
    _HEAD
    + """
local key = KEYS[1]
if call('EXISTS', key) == 0 then return {0, 0, ''} end
local function before(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if a_ms ~= b_ms then return tonumber(a_ms) < tonumber(b_ms) end
  return tonumber(a_seq) < tonumber(b_seq)
end
-- Also groups of strangers: what they have not acknowledged stays
local floors = {}
for _, each in ipairs(call('XINFO', 'GROUPS', key)) do
  local group = map(each)
  floors[#floors + 1] = {group['last-delivered-id'], true}
  if group.pending > 0 then floors[#floors + 1] = {call('XPENDING', key, group.name)[2], false} end
end
local gone, bytes, last, upto = 0, 0, nil, nil
for _, entry in ipairs(call('XRANGE', key, '-', '+', 'COUNT', plan.count + 1)) do
  local free = gone < plan.count and (not plan.before or before(entry[1], plan.before))
  for _, floor in ipairs(floors) do
    free = free and (before(entry[1], floor[1]) or (floor[2] and entry[1] == floor[1]))
  end
  if not free then upto = entry[1] break end
  gone, last = gone + 1, entry[1]
  for _, value in ipairs(entry[2]) do bytes = bytes + #value end
  if plan.bytes and bytes >= plan.bytes then break end
end
if gone > 0 then
  local ms, seq = string.match(last, '^(%d+)-(%d+)$')
  call('XTRIM', key, 'MINID', '=', upto or (ms .. '-' .. text(tonumber(seq) + 1)))
end
local head = call('XRANGE', key, '-', '+', 'COUNT', 1)
return {gone, bytes, head[1] and head[1][1] or ''}
""",
)

#: Remove dead letters. KEYS: the letters, their times.
EXHUME = Script(
    "exhume",
    _HEAD
    + """
local gone = 0
in_parts(plan.ids, function(first, last)
  gone = gone + call('HDEL', KEYS[1], unpack(plan.ids, first, last))
  call('ZREM', KEYS[2], unpack(plan.ids, first, last))
end)
return gone
""",
)
