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

-- The rows of one hash, packed as arrays of `fields`. `indexes` is a list of {name, score}: the sorted set
-- `name` holds the row if `score(row, id)` has a value ({name, value, true}: a hash does, under its id).
-- `amounts` is a list of {name, amount}: what the row adds to that counter of the run. Both are compared
-- before and after, so no change can forget one.
local function rows_in(key, fields, indexes, amounts)
  local rows, known, before = {}, {}, {}
  rows.known = known

  function rows.parse(text)
    local values, row = cmsgpack.unpack(text), {}
    for at = 1, #fields do
      row[fields[at]] = values[at]
    end
    return row
  end

  local function packed(row)
    local values = {}
    for at = 1, #fields do
      local value = row[fields[at]]
      values[at] = value == nil and NULL or value
    end
    return cmsgpack.pack(values)
  end

  -- The scores of the row in all indexes, then its amounts; false for none.
  local function measured(row, id)
    local found = {}
    for at = 1, #indexes do
      found[at] = indexes[at][2](row, id) or false
    end
    for at = 1, #amounts do
      found[#indexes + at] = amounts[at][2](row)
    end
    return found
  end

  local function remember(id)
    if before[id] == nil then
      local row = known[id]
      before[id] = row and measured(row, id) or NOTHING
    end
  end

  -- The rows of `ids` where they are packed.
  function rows.read(ids)
    local texts = hmget(key, ids)
    for at = 1, #ids do
      known[ids[at]] = texts[at] and rows.parse(texts[at])
    end
  end

  function rows.load(ids)
    local missing = {}
    for _, id in ipairs(ids) do
      if known[id] == nil then
        missing[#missing + 1] = id
        known[id] = false
      end
    end
    if #missing > 0 then
      rows.read(missing)
    end
  end

  function rows.load_all()
    for _, pair in ipairs(pairs_in(key)) do
      local id = rows.numbered and tonumber(pair[1]) or pair[1]
      if known[id] == nil then
        known[id] = rows.parse(pair[2])
      end
    end
    return known
  end

  -- The row of `id` to look at; nil if it has none.
  function rows.get(id)
    if known[id] == nil then
      rows.load({id})
    end
    return known[id] or nil
  end

  -- The row of `id` to change; nil if it has none.
  function rows.change(id)
    local row = rows.get(id)
    if row then
      remember(id)
    end
    return row
  end

  function rows.add(id, row)
    remember(id)
    known[id] = row
    return row
  end

  function rows.drop(id)
    if rows.get(id) then
      remember(id)
      known[id] = false
    end
  end

  -- What this change has touched so far: id to row, or to false if it was dropped.
  function rows.touched()
    local found = {}
    for id in pairs(before) do
      found[id] = known[id]
    end
    return found
  end

  local function write_index(at, name, score, is_hash)
    local enter, leave = {}, {}
    for id, was in pairs(before) do
      local row = known[id]
      local now = row and score(row, id) or false
      if now and now ~= was[at] then
        enter[#enter + 1], enter[#enter + 2] = is_hash and id or now, is_hash and now or id
      elseif was[at] and not now then
        leave[#leave + 1] = id
      end
    end
    in_chunks(is_hash and 'HDEL' or 'ZREM', KEY[name], leave)
    in_chunks(is_hash and 'HSET' or 'ZADD', KEY[name], enter)
  end

  local function write_amount(at, name, amount)
    local sum = run[name]
    for id, was in pairs(before) do
      sum = sum - (was[at] or 0) + (known[id] and amount(known[id]) or 0)
    end
    run[name] = sum
  end

  function rows.write()
    if next(before) == nil then
      return
    end
    local set, gone = {}, {}
    for id, was in pairs(before) do
      local row = known[id]
      if row and not (rows.is_told_elsewhere and rows.is_told_elsewhere(row)) then
        set[#set + 1], set[#set + 2] = id, packed(row)
      elseif was ~= NOTHING then
        gone[#gone + 1] = id
      end
    end
    in_chunks('HDEL', key, gone)
    in_chunks('HSET', key, set)
    for at = 1, #indexes do
      write_index(at, unpack(indexes[at]))
    end
    for at = 1, #amounts do
      write_amount(#indexes + at, unpack(amounts[at]))
    end
  end

  return rows
end
