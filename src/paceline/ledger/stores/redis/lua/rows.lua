-- Reading and writing hashes of packed rows.

local CHUNK, NULL = 4000, cjson.null -- Lua's stack takes 8,000 values
local PAGE = 500 -- members of a sorted set that are read at a time
local run -- the run's counters; see state.lua

local function in_chunks(command, key, values)
  for first = 1, #values, CHUNK do
    redis.call(command, key, unpack(values, first, math.min(first + CHUNK - 1, #values)))
  end
end

local function hmget(key, fields)
  if #fields > 0 and #fields <= CHUNK then
    return redis.call('HMGET', key, unpack(fields))
  end
  local found = {}
  for first = 1, #fields, CHUNK do
    local last = math.min(first + CHUNK - 1, #fields)
    for at, value in ipairs(redis.call('HMGET', key, unpack(fields, first, last))) do
      found[first + at - 1] = value
    end
  end
  return found
end

-- A hash as a list of {field, value}.
local function pairs_in(key)
  local flat, found = redis.call('HGETALL', key), {}
  for at = 1, #flat, 2 do
    found[#found + 1] = {flat[at], flat[at + 1]}
  end
  return found
end

-- The first `limit` values that `kept(member)` has for the members of a list; `part(from)` reads at most `page`
-- of them, counted from 0.
local function first_kept(limit, page, part, kept)
  local found, from = {}, 0
  while #found < limit do
    local members = part(from)
    for _, member in ipairs(members) do
      local value = #found < limit and kept(member)
      if value then
        found[#found + 1] = value
      end
    end
    if #members < page then
      break
    end
    from = from + page
  end
  return found
end

local NOTHING = {} -- of a row that is new

-- The rows of one hash, each packed as an array: `listed(row)` makes it, `named(values)` takes it apart.
-- `measured(row, id)` returns the row's score in each of the sorted sets `indexes` (a hash, if HASHES names it,
-- holds the value under the row's id), false if that does not hold the row; then what the row adds to the run's
-- counters `amounts`. All are compared before and after, so no change can forget one.
local Rows, HASHES = {}, {leases = true}
Rows.__index = Rows

local function rows_in(key, indexes, amounts, listed, named, measured)
  return setmetatable({
    key = key, indexes = indexes, amounts = amounts, listed = listed, named = named, measured = measured,
    known = {}, before = {}, -- id to row, or to false for none; id to what was measured before
  }, Rows)
end

function Rows:remember(id)
  if self.before[id] == nil then
    local row = self.known[id]
    self.before[id] = row and {self.measured(row, id)} or NOTHING
  end
end

-- The rows of `ids` where they are packed.
function Rows:read(ids)
  local texts, known = hmget(self.key, ids), self.known
  for at = 1, #ids do
    known[ids[at]] = texts[at] and self.named(cmsgpack.unpack(texts[at]))
  end
end

function Rows:load(ids)
  local missing, known = {}, self.known
  for _, id in ipairs(ids) do
    if known[id] == nil then
      missing[#missing + 1] = id
      known[id] = false
    end
  end
  if #missing > 0 then
    self:read(missing)
  end
end

-- The numbers of all rows from `first` on, in order.
function Rows:numbers_from(first)
  local found = {}
  for _, text in ipairs(redis.call('HKEYS', self.key)) do
    local number = tonumber(text)
    if number >= first then
      found[#found + 1] = number
    end
  end
  table.sort(found)
  return found
end

function Rows:load_all()
  local known = self.known
  for _, pair in ipairs(pairs_in(self.key)) do
    local id = self.numbered and tonumber(pair[1]) or pair[1]
    if known[id] == nil then
      known[id] = self.named(cmsgpack.unpack(pair[2]))
    end
  end
  return known
end

-- The row of `id` to look at; nil if it has none.
function Rows:get(id)
  if self.known[id] == nil then
    self:load({id})
  end
  return self.known[id] or nil
end

-- The row of `id` to change; nil if it has none.
function Rows:change(id)
  local row = self:get(id)
  if row then
    self:remember(id)
  end
  return row
end

function Rows:add(id, row)
  self:remember(id)
  self.known[id] = row
  return row
end

function Rows:drop(id)
  if self:get(id) then
    self:remember(id)
    self.known[id] = false
  end
end

-- What this change has touched so far: id to row, or to false if it was dropped.
function Rows:touched()
  local found = {}
  for id in pairs(self.before) do
    found[id] = self.known[id]
  end
  return found
end

-- Write the rows, and return what is measured of each now, by id.
function Rows:write_rows()
  local set, gone, after = {}, {}, {}
  for id, was in pairs(self.before) do
    local row = self.known[id]
    after[id] = row and {self.measured(row, id)} or NOTHING
    if row and not (self.is_told_elsewhere and self.is_told_elsewhere(row)) then
      set[#set + 1], set[#set + 2] = id, cmsgpack.pack(self.listed(row))
    elseif was ~= NOTHING then
      gone[#gone + 1] = id
    end
  end
  in_chunks('HDEL', self.key, gone)
  in_chunks('HSET', self.key, set)
  return after
end

function Rows:write_index(at, name, after)
  local enter, leave, is_hash = {}, {}, HASHES[name]
  for id, was in pairs(self.before) do
    local now = after[id][at]
    if now and now ~= was[at] then
      enter[#enter + 1], enter[#enter + 2] = is_hash and id or now, is_hash and now or id
    elseif was[at] and not now then
      leave[#leave + 1] = id
    end
  end
  in_chunks(is_hash and 'HDEL' or 'ZREM', KEY[name], leave)
  in_chunks(is_hash and 'HSET' or 'ZADD', KEY[name], enter)
end

function Rows:write()
  if next(self.before) == nil then
    return
  end
  local after = self:write_rows()
  for at, name in ipairs(self.indexes) do
    self:write_index(at, name, after)
  end
  for at, name in ipairs(self.amounts) do
    local measure = #self.indexes + at
    for id, was in pairs(self.before) do
      run[name] = run[name] - (was[measure] or 0) + (after[id][measure] or 0)
    end
  end
end
