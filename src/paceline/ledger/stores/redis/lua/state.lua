-- One change's view of the ledger. Rows are read when asked for, changed in memory, and written by `write`
-- at the end. A refusal is raised before that, so it leaves no trace, as if it had been rolled back.

local SCHEMA = 1

local function refuse(kind, ...)
  error({refused = kind, detail = {...}})
end

-- -- the counters of the run ---------------------------------------------------------------------------

local TEXT = {identity = true, place_order = true, server = true}
local run_before = {} -- as they were read

local function read_run()
  local flat, found = redis.call('HGETALL', KEY.run), {}
  for at = 1, #flat, 2 do
    local name = flat[at]
    found[name] = TEXT[name] and flat[at + 1] or tonumber(flat[at + 1])
    run_before[name] = found[name]
  end
  return next(found) and found or nil
end

local function write_run()
  local set = {}
  for name, value in pairs(run) do
    if run_before[name] ~= value then
      set[#set + 1], set[#set + 2] = name, value
    end
  end
  for name in pairs(run_before) do
    if run[name] == nil then
      redis.call('HDEL', KEY.run, name)
    end
  end
  if #set > 0 then
    redis.call('HSET', KEY.run, unpack(set))
  end
end

local prompts = rows_in(KEY.prompts, {'pending', 'leases', 'failed', 'again', 'open'}, {}, function(row)
  return {row.state, row.again, row.worker, row.attempt, row.deaths, row.reason}
end, function(row)
  return {
    state = row[1], again = row[2], worker = row[3], attempt = row[4], deaths = row[5], reason = row[6],
  }
end, function(prompt, ordinal)
  local has_failed = prompt.state == 'failed'
  return
    prompt.state == 'pending' and ordinal,
    prompt.state == 'leased' and prompt.worker,
    has_failed and ordinal,
    not has_failed and prompt.again and ordinal,
    not has_failed and not prompt.again and ordinal
end)

-- Indexes of resident ones: those in `durable` may be freed, those in `kept` are in quarantine. Displaced are
-- lost ones whose prompt's ordinal is not their place.
local samples = rows_in(KEY.samples, {
  'log', 'durable', 'kept', 'provisional', 'lost', 'quarantined',
}, {
  'resident_samples', 'resident_bytes', 'provisional_samples', 'waiting_samples', 'displaced_samples',
}, function(row)
  return {
    row.place, row.ordinal or NULL, row.state, row.resident, row.bytes, row.generation, row.acked,
    row.step or NULL, row.reason, row.is_bare,
  }
end, function(row)
  return {
    place = row[1], ordinal = row[2], state = row[3], resident = row[4], bytes = row[5], generation = row[6],
    acked = row[7], step = row[8], reason = row[9], is_bare = row[10],
  }
end, function(sample)
  local place, acked, resident = sample.place, sample.acked, sample.resident
  local is_lost, is_quarantined = sample.state == 'lost', sample.state == 'quarantined'
  return
    place,
    acked == 2 and resident and not is_quarantined and place,
    is_quarantined and resident and place,
    acked == 1 and (sample.step or math.huge),
    is_lost and place,
    is_quarantined and place,
    resident and 1 or 0,
    resident and sample.bytes or 0,
    resident and acked == 1 and 1 or 0,
    acked == 0 and (is_lost or sample.state == 'present') and 1 or 0,
    is_lost and sample.ordinal and sample.ordinal ~= place and 1 or 0
end)

local intents = rows_in(KEY.intents, {}, {'reserved_bytes'}, function(row)
  return {row.sample_id, row.bytes, row.ordinal or NULL, row.worker, row.revoked}
end, function(row)
  return {sample_id = row[1], bytes = row[2], ordinal = row[3], worker = row[4], revoked = row[5]}
end, function(intent)
  return intent.bytes
end)

local function nothing_measured()
end

local plans = rows_in(KEY.plans, {}, {}, function(row)
  return {row.rev, row.sample_ids, row.deaths, row.digest}
end, function(row)
  return {rev = row[1], sample_ids = row[2], deaths = row[3], digest = row[4]}
end, nothing_measured)

local checkpoints = rows_in(KEY.checkpoints, {}, {}, function(row)
  return {row.step, row.name, row.manifest_digest, row.chain, row.first_place}
end, function(row)
  return {step = row[1], name = row[2], manifest_digest = row[3], chain = row[4], first_place = row[5]}
end, nothing_measured)
prompts.numbered, intents.numbered, plans.numbered, checkpoints.numbered = true, true, true, true

-- A prompt that is leased for the first time has no row: the index of leases says all of it.
local function first_lease(holder)
  return {state = 'leased', again = false, worker = holder, attempt = 0, deaths = 0, reason = ''}
end

function prompts.is_told_elsewhere(prompt)
  return prompt.state == 'leased' and not prompt.again and prompt.attempt + prompt.deaths == 0
end

function prompts:read(ordinals)
  Rows.read(self, ordinals)
  local missing = {}
  for _, ordinal in ipairs(ordinals) do
    if not prompts.known[ordinal] then
      missing[#missing + 1] = ordinal
    end
  end
  for at, holder in ipairs(hmget(KEY.leases, missing)) do
    prompts.known[missing[at]] = holder and first_lease(holder)
  end
end

local texts, written = {}, {} -- refs by sample id; other writes, in order

local function later(...)
  written[#written + 1] = {...}
end

local function write()
  for _, command in ipairs(written) do
    redis.call(unpack(command))
  end
  for _, rows in ipairs({prompts, samples, intents, plans, checkpoints}) do
    rows:write()
  end
  local set = {}
  for id, text in pairs(texts) do
    set[#set + 1], set[#set + 2] = id, text
  end
  in_chunks('HSET', KEY.refs, set)
  write_run()
end

-- -- what several operations ask -----------------------------------------------------------------------

-- The sample at a place, those that this change has entered included; nil if there is none.
local placed, looked_from, looked_to = {}, 1, 0
local function sample_at(place)
  if placed[place] or place >= looked_from and place <= looked_to then
    return placed[place]
  end
  return redis.call('ZRANGEBYSCORE', KEY.log, place, place)[1]
end

-- Look at all places from `first` to `last` at once, for `sample_at`.
local function look_at_places(first, last)
  looked_from, looked_to = first, last
  local found = redis.call('ZRANGEBYSCORE', KEY.log, first, last, 'WITHSCORES')
  for at = 1, #found, 2 do
    placed[tonumber(found[at + 1])] = found[at]
  end
end

local function head_checkpoint()
  local head
  for _, checkpoint in pairs(checkpoints:load_all()) do
    if checkpoint and (head == nil or checkpoint.step > head.step) then
      head = checkpoint
    end
  end
  return head
end

local function settle_order(order)
  run.place_order = run.place_order or order
  return run.place_order
end

local function is_member(list)
  local found = {}
  for _, value in ipairs(list) do
    found[value] = true
  end
  return found
end

-- Those of the samples that have no rows.
local function without_rows(sample_ids)
  local found = {}
  samples:load(sample_ids)
  for _, id in ipairs(sample_ids) do
    if not samples:get(id) then
      found[#found + 1] = id
    end
  end
  return found
end

local function by_first(a, b)
  return a[1] < b[1]
end

-- The blocks that hold the prompts from `first` on, at most `limit`.
local function blocks_from(first, limit)
  local before = redis.call('ZREVRANGEBYSCORE', KEY.source, first, '-inf', 'WITHSCORES', 'LIMIT', 0, 1)
  local page = math.min(limit, PAGE) + 1
  return first_kept(limit, page, function(from)
    return redis.call('ZRANGEBYSCORE', KEY.source, before[2] or '-inf', '+inf', 'LIMIT', from, page)
  end, function(text)
    local block = cmsgpack.unpack(text)
    return block[1] + block[2] > first and block
  end)
end
