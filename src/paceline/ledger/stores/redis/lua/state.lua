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
  local found = {}
  for _, pair in ipairs(pairs_in(KEY.run)) do
    found[pair[1]] = TEXT[pair[1]] and pair[2] or tonumber(pair[2])
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

local function no_marks()
  return {}
end

local function marks_of_prompt(prompt, ordinal)
  return {
    pending = prompt.state == 'pending' and ordinal or nil,
    leases = prompt.state == 'leased' and prompt.worker or nil,
    failed = prompt.state == 'failed' and ordinal or nil,
    again = prompt.state ~= 'failed' and prompt.again and ordinal or nil,
    open = prompt.state ~= 'failed' and not prompt.again and ordinal or nil,
  }
end

local function marks_of_sample(sample)
  local in_quarantine = sample.state == 'quarantined'
  return {
    log = sample.place,
    resident = sample.resident and sample.place or nil,
    durable = sample.resident and not in_quarantine and sample.acked == 2 and sample.place or nil,
    kept = sample.resident and in_quarantine and sample.place or nil,
    provisional = sample.acked == 1 and (sample.step or math.huge) or nil,
    lost = sample.state == 'lost' and sample.place or nil,
    quarantined = in_quarantine and sample.place or nil,
  }
end

local function amounts_of_sample(sample)
  local lost = sample.state == 'lost'
  local waits = sample.acked == 0 and (sample.state == 'present' or lost)
  local displaced = lost and sample.ordinal ~= nil and sample.ordinal ~= sample.place
  return {
    resident_bytes = sample.resident and sample.bytes or 0,
    provisional_samples = sample.resident and sample.acked == 1 and 1 or 0,
    waiting_samples = waits and 1 or 0,
    displaced_samples = displaced and 1 or 0,
  }
end

local function amounts_of_intent(intent)
  return {reserved_bytes = intent.bytes}
end

local prompts = rows_in(
  KEY.prompts, {'state', 'again', 'worker', 'attempt', 'deaths', 'reason'}, marks_of_prompt, no_marks)
local samples = rows_in(
  KEY.samples,
  {'place', 'ordinal', 'state', 'resident', 'bytes', 'generation', 'acked', 'step', 'reason', 'is_bare'},
  marks_of_sample, amounts_of_sample)
local intents = rows_in(
  KEY.intents, {'sample_id', 'bytes', 'ordinal', 'worker', 'revoked'}, no_marks, amounts_of_intent)
local plans = rows_in(KEY.plans, {'rev', 'sample_ids', 'deaths', 'digest'}, no_marks, no_marks)
local checkpoints = rows_in(
  KEY.checkpoints, {'step', 'name', 'manifest_digest', 'chain', 'first_place'}, no_marks, no_marks)
prompts.numbered, intents.numbered, plans.numbered, checkpoints.numbered = true, true, true, true

local texts, written = {}, {} -- refs by sample id; other writes, in order

local function later(...)
  written[#written + 1] = {...}
end

local function write()
  for _, command in ipairs(written) do
    redis.call(unpack(command))
  end
  for _, rows in ipairs({prompts, samples, intents, plans, checkpoints}) do
    rows.write()
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
local placed = {}
local function sample_at(place)
  return placed[place] or redis.call('ZRANGEBYSCORE', KEY.log, place, place)[1]
end

local function head_checkpoint()
  local head
  for _, checkpoint in pairs(checkpoints.load_all()) do
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

local function by_first(a, b)
  return a[1] < b[1]
end

-- The blocks that hold the prompts from `first` on, at most `limit`.
local function blocks_from(first, limit)
  local before = redis.call('ZREVRANGEBYSCORE', KEY.source, first, '-inf', 'WITHSCORES', 'LIMIT', 0, 1)
  local found, from, page = {}, 0, math.min(limit, 500) + 1
  while #found < limit do
    local part = redis.call('ZRANGEBYSCORE', KEY.source, before[2] or '-inf', '+inf', 'LIMIT', from, page)
    for _, text in ipairs(part) do
      local block = cmsgpack.unpack(text)
      if block[1] + block[2] > first and #found < limit then
        found[#found + 1] = block
      end
    end
    if #part < page then
      break
    end
    from = from + page
  end
  return found
end
