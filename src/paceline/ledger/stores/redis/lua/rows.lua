-- Reading and writing hashes of packed rows.

local CHUNK, NULL = 4000, cjson.null -- Lua's stack takes 8,000 values
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

local BY_VALUE = {leases = true} -- an index that is a hash

-- The rows of one hash, packed as arrays of `fields`. `marks(row, id)` names the indexes that hold the row,
-- each with its score (or, for an index that is a hash, its value); `amounts(row)` what it adds to the run's
-- counters. Both are compared before and after, so no change can forget an index.
local function rows_in(key, fields, marks, amounts)
  local rows, known, before, dirty = {}, {}, {}, {}

  local function parse(text)
    local values, row = cmsgpack.unpack(text), {}
    for at, field in ipairs(fields) do
      row[field] = values[at]
    end
    return row
  end

  local function packed(row)
    local values = {}
    for at, field in ipairs(fields) do
      local value = row[field]
      values[at] = value == nil and NULL or value
    end
    return cmsgpack.pack(values)
  end

  local function remember(id)
    if not dirty[id] then
      local row = known[id]
      before[id] = row and {marks = marks(row, id), amounts = amounts(row)} or {marks = {}, amounts = {}}
      dirty[id] = true
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
    for at, text in ipairs(hmget(key, missing)) do
      known[missing[at]] = text and parse(text)
    end
  end

  function rows.load_all()
    for _, pair in ipairs(pairs_in(key)) do
      local id = rows.numbered and tonumber(pair[1]) or pair[1]
      if known[id] == nil then
        known[id] = parse(pair[2])
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
    if known[id] == nil then
      known[id] = false
    end
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
    for id in pairs(dirty) do
      found[id] = known[id]
    end
    return found
  end

  function rows.write()
    local set, gone, enter, leave = {}, {}, {}, {}
    for id in pairs(dirty) do
      local row, was = known[id], before[id]
      local now = row and marks(row, id) or {}
      for index, score in pairs(now) do
        if was.marks[index] ~= score then
          enter[index] = enter[index] or {}
          local list, by_value = enter[index], BY_VALUE[index]
          list[#list + 1], list[#list + 2] = by_value and id or score, by_value and score or id
        end
      end
      for index in pairs(was.marks) do
        if now[index] == nil then
          leave[index] = leave[index] or {}
          table.insert(leave[index], id)
        end
      end
      for name, amount in pairs(was.amounts) do
        run[name] = run[name] - amount
      end
      for name, amount in pairs(row and amounts(row) or {}) do
        run[name] = run[name] + amount
      end
      if row then
        set[#set + 1], set[#set + 2] = id, packed(row)
      else
        gone[#gone + 1] = id
      end
    end
    in_chunks('HDEL', key, gone)
    in_chunks('HSET', key, set)
    for index, ids in pairs(leave) do
      in_chunks(BY_VALUE[index] and 'HDEL' or 'ZREM', KEY[index], ids)
    end
    for index, list in pairs(enter) do
      in_chunks(BY_VALUE[index] and 'HSET' or 'ZADD', KEY[index], list)
    end
  end

  return rows
end

