"""The scripts of the Redis journal's groups: who hears what, who owns which streams."""

from __future__ import annotations

from mesh.journals.redis_lua import EVEN_FULL, HEAD, MEMBERS, Script

#: Make the groups of each stream, at its end or its beginning.
DECLARE = Script(
    "declare",
    HEAD
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
    HEAD
    + """
if call('SADD', KEYS[2], unpack(plan.topics)) > 0 then call('HINCRBY', KEYS[1], 'version', 1) end
""",
)

#: Join a group, or look again at what is one's own. KEYS: numbers, topics, members, owners,
#: decisions.
JOIN = Script(
    "join",
    EVEN_FULL
    + HEAD
    + MEMBERS
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
local version = call('HGET', KEYS[1], 'version')
return {0, version, topics, owned, right, given, call('HGETALL', KEYS[5])}
""",
)

#: Say whether a consumer should join anew; prolongs its lease. KEYS: numbers, members.
PEEK = Script("peek", EVEN_FULL + HEAD + MEMBERS + "return has_changed(1, 2) and 1 or 0")

#: Prolong a lease. KEYS: members.
RENEW = Script(
    "renew",
    EVEN_FULL
    + HEAD
    + MEMBERS
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
    EVEN_FULL
    + HEAD
    + MEMBERS
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

#: Say how far each stream was handed out, and how far it was settled.
HANDED = Script(
    "handed",
    EVEN_FULL
    + HEAD
    + """
local found = {}
for at, key in ipairs(KEYS) do
  local handed, settled = groups_of(key)
  found[at] = {
    handed and handed['last-delivered-id'] or '0-0',
    settled and settled['last-delivered-id'] or '0-0',
  }
end
return found
""",
)

#: Take over streams: from now on others' steps are refused there. Tells what was handed out before.
TAKE = Script(
    "take",
    EVEN_FULL
    + HEAD
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
    }
  end
end
return taken
""",
)
