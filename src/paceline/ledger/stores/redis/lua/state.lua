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

local prompts = rows_in(KEY.prompts, {'state', 'again', 'worker', 'attempt', 'deaths', 'reason'}, {
  {'pending', function(prompt, ordinal)
    return prompt.state == 'pending' and ordinal
  end},
  {'leases', function(prompt)
    return prompt.state == 'leased' and prompt.worker
  end, true},
  {'failed', function(prompt, ordinal)
    return prompt.state == 'failed' and ordinal
  end},
  {'again', function(prompt, ordinal)
    return prompt.state ~= 'failed' and prompt.again and ordinal
  end},
  {'open', function(prompt, ordinal)
    return prompt.state ~= 'failed' and not prompt.again and ordinal
  end},
}, {})

local samples = rows_in(KEY.samples, {
  'place', 'ordinal', 'state', 'resident', 'bytes', 'generation', 'acked', 'step', 'reason', 'is_bare',
}, {
  {'log', function(sample)
    return sample.place
  end},
  {'durable', function(sample) -- and resident: its features may be freed
    return sample.acked == 2 and sample.resident and sample.state ~= 'quarantined' and sample.place
  end},
  {'kept', function(sample) -- in quarantine, and resident
    return sample.state == 'quarantined' and sample.resident and sample.place
  end},
  {'provisional', function(sample)
    return sample.acked == 1 and (sample.step or math.huge)
  end},
  {'lost', function(sample)
    return sample.state == 'lost' and sample.place
  end},
  {'quarantined', function(sample)
    return sample.state == 'quarantined' and sample.place
  end},
}, {
  {'resident_samples', function(sample)
    return sample.resident and 1 or 0
  end},
  {'resident_bytes', function(sample)
    return sample.resident and sample.bytes or 0
  end},
  {'provisional_samples', function(sample)
    return sample.resident and sample.acked == 1 and 1 or 0
  end},
  {'waiting_samples', function(sample)
    return sample.acked == 0 and (sample.state == 'present' or sample.state == 'lost') and 1 or 0
  end},
  {'displaced_samples', function(sample) -- lost ones whose prompt's ordinal is not their place
    return sample.state == 'lost' and sample.ordinal and sample.ordinal ~= sample.place and 1 or 0
  end},
})

local intents = rows_in(KEY.intents, {'sample_id', 'bytes', 'ordinal', 'worker', 'revoked'}, {}, {
  {'reserved_bytes', function(intent)
    return intent.bytes
  end},
})
local plans = rows_in(KEY.plans, {'rev', 'sample_ids', 'deaths', 'digest'}, {}, {})
local checkpoints = rows_in(
  KEY.checkpoints, {'step', 'name', 'manifest_digest', 'chain', 'first_place'}, {}, {})
prompts.numbered, intents.numbered, plans.numbered, checkpoints.numbered = true, true, true, true

-- A prompt that is leased for the first time has no row: the index of leases says all of it.
local function first_lease(holder)
  return {state = 'leased', again = false, worker = holder, attempt = 0, deaths = 0, reason = ''}
end

function prompts.is_told_elsewhere(prompt)
  return prompt.state == 'leased' and not prompt.again and prompt.attempt + prompt.deaths == 0
end

local read_packed = prompts.read
function prompts.read(ordinals)
  read_packed(ordinals)
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

-- Those of the samples that have no rows.
local function without_rows(sample_ids)
  local found = {}
  samples.load(sample_ids)
  for _, id in ipairs(sample_ids) do
    if not samples.get(id) then
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
