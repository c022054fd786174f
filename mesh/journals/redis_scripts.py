"""The scripts of the Redis journal's events: kept, handed out, settled, counted, forgotten."""

from __future__ import annotations

from mesh.journals.redis_lua import EVEN_FULL, HEAD, MEMBERS, ORDER, STATE, Script

_COMMIT = (
    HEAD
    + STATE
    + """
if is_known() then return {0, {}} end
-- A decision stands, whoever settles it; at most once, and before the next owner reads
local step = plan.step and plan.group .. ' step'
if step and call('HGET', KEYS[1] .. ':owners', step) == plan.step then return {0, {}} end
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
          return nil, added
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

local known, refusal = {}, nil
if plan.ids then known, refusal = keep_records() end
if refusal then return refusal end
if plan.topics then call('SADD', KEYS[plan.topics], unpack(plan.names)) end
for _, letter in ipairs(plan.letters or {}) do
  local number = call('INCR', KEYS[plan.dead + 2])
  call('HSET', KEYS[plan.dead], letter[1], text(number) .. ' ' .. ARGV[letter[3]])
  call('ZADD', KEYS[plan.dead + 1], letter[2], letter[1])
end
change_state()
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
if step then call('HSET', KEYS[1] .. ':owners', step, plan.step) end
note_number()
wake()
return {0, known, plan.ms and text(now_ms()), plan.ms and call('GET', KEYS[plan.clock])}
"""
)
#: Keep events, letters and state, and settle; all of it, or nothing when a stream is another's.
COMMIT = Script("commit", _COMMIT)
#: The same for what settles something.
SETTLE = Script("settle", EVEN_FULL + _COMMIT)

#: On a cluster: change the state and decide what is settled, where both and the owners of the group
#: lie. The streams learn of it later, if need be from the heir.
DECIDE = Script(
    "decide",
    EVEN_FULL
    + HEAD
    + STATE
    + """
if is_known() then return {0, {}} end
local gone = {}
for _, each in ipairs(plan.decided) do
  if call('HGET', KEYS[plan.owners], each[1]) ~= each[2] .. ' ' .. plan.consumer then
    gone[#gone + 1] = each[1]
  end
end
if #gone > 0 then return {1, gone} end
change_state()
for _, each in ipairs(plan.decided) do
  call('HSET', KEYS[plan.decisions], each[1], ARGV[each[3]])
end
note_number()
return {0, {}}
""",
)

#: Hand events out: the stream says so before anybody gets them.
MARK = Script(
    "mark",
    EVEN_FULL
    + HEAD
    + MEMBERS
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

#: Take events back as if they had not been handed out; with `unfence`, let go of the streams. What
#: is settled stays so: a commit of which the consumer never heard may have come before.
RELEASE = Script(
    "release",
    EVEN_FULL
    + HEAD
    + ORDER
    + """
for _, each in ipairs(plan.streams) do
  local key = KEYS[each[1]]
  if call('HGET', key .. ':owners', plan.group) == each[2] then
    local _, settled = groups_of(key)
    for _, back in ipairs(each[3]) do
      local is_listed = #call('XPENDING', key, plan.group, back[1], back[1], 1) > 0
      if is_listed or not settled or before(settled['last-delivered-id'], back[1]) then
        claim(key, {back[1]}, 'FORCE', 'JUSTID', 'RETRYCOUNT', back[2])
      end
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
    HEAD
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
    EVEN_FULL
    + HEAD
    + ORDER
    + """
local key = KEYS[1]
if call('EXISTS', key) == 0 then return {0, 0, ''} end
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

#: Remove dead letters, those that have not failed anew. KEYS: the letters, their times.
EXHUME = Script(
    "exhume",
    EVEN_FULL
    + HEAD
    + """
local gone = 0
for _, letter in ipairs(plan.letters) do
  if tonumber(call('ZSCORE', KEYS[2], letter[1])) == tonumber(letter[2]) then
    gone = gone + call('HDEL', KEYS[1], letter[1])
    call('ZREM', KEYS[2], letter[1])
  end
end
return gone
""",
)
