-- Questions: they write nothing, and each is answered from one state of the ledger.

local ask = {}
local PAGE, STEPS = 2000, 64

-- The first place that a sample may still take.
local function settled()
  if run.place_order == 'arrival' then
    return run.committed
  end
  return tonumber(redis.call('ZRANGE', KEY.open, 0, 0)[1] or run.next_ordinal)
end

function ask.position()
  return {run.identity, run.incarnation, run.lsn, run.server}
end

function ask.lsn()
  return run.lsn
end

function ask.facts()
  return pairs_in(KEY.facts)
end

function ask.snapshot()
  local kept, counts = {}, {}
  for _, checkpoint in pairs(checkpoints:load_all()) do
    kept[#kept + 1] = {
      checkpoint.step, checkpoint.name, checkpoint.manifest_digest, checkpoint.chain, checkpoint.first_place,
    }
  end
  table.sort(kept, by_first)
  for _, index in ipairs({'pending', 'failed', 'again', 'lost', 'quarantined'}) do
    counts[index] = redis.call('ZCARD', KEY[index])
  end
  counts.leased, counts.reserved = redis.call('HLEN', KEY.leases), redis.call('HLEN', KEY.intents)
  counts.settled = settled()
  return {run, counts, kept, pairs_in(KEY.epochs), pairs_in(KEY.facts)}
end

function ask.source_blocks(first, limit)
  return blocks_from(first, limit or math.huge)
end

function ask.failed(start, stop)
  local below = stop and string.format('(%.0f', stop) or '+inf'
  local ordinals = redis.call('ZRANGEBYSCORE', KEY.failed, start, below, 'LIMIT', 0, PAGE)
  local found = {}
  for at, text in ipairs(ordinals) do
    ordinals[at] = tonumber(text)
  end
  prompts:load(ordinals)
  for at, ordinal in ipairs(ordinals) do
    found[at] = {ordinal, prompts:get(ordinal).reason}
  end
  return found
end

function ask.ownership()
  local present, promised, revoked = {}, {}, {}
  local ids = redis.call('ZRANGE', KEY.log, 0, -1)
  samples:load(ids)
  for _, id in ipairs(ids) do
    local sample = samples:get(id)
    if sample.resident then
      present[#present + 1] = {id, sample.generation}
    end
  end
  for generation, intent in pairs(intents:load_all()) do
    table.insert(intent.revoked and revoked or promised, {generation, intent.sample_id})
  end
  table.sort(promised, by_first)
  table.sort(revoked, by_first)
  return {present, promised, revoked, run.next_generation}
end

-- -- samples -------------------------------------------------------------------------------------------

local function records(ids)
  local found = {}
  samples:load(ids)
  for at, text in ipairs(hmget(KEY.refs, ids)) do
    local id = ids[at]
    local sample = samples:get(id)
    if sample then
      found[#found + 1] = {
        sample.place, id, sample.state, text, sample.step or NULL, sample.acked, sample.reason,
        sample.resident, sample.is_bare,
      }
    end
  end
  return found
end

-- One page of the log, from place `start` on: {records, settled, closed, where the next page begins}.
function ask.read(start, stop)
  local last = math.min(stop, settled())
  local ids = redis.call(
    'ZRANGEBYSCORE', KEY.log, start, string.format('(%.0f', last), 'LIMIT', 0, PAGE)
  local found = records(ids)
  return {found, settled(), run.closed == 1, #ids == PAGE and found[#found][1] + 1 or NULL}
end

-- Records of these samples that are in `state` (any, without one).
function ask.find_among(ids, state)
  local found = {}
  for _, record in ipairs(records(ids)) do
    if not state or record[3] == state then
      found[#found + 1] = record
    end
  end
  return found
end

local INDEX = {lost = 'lost', quarantined = 'quarantined'}

-- One page of the samples in `state`, from place `start` on: {records, where the next page begins}.
function ask.find(state, start, limit)
  local page = math.min(PAGE, limit or PAGE)
  local ids = redis.call(
    'ZRANGEBYSCORE', KEY[INDEX[state] or 'log'], start, '+inf', 'LIMIT', 0, page)
  samples:load(ids)
  local next_start = #ids == page and samples:get(ids[#ids]).place + 1 or NULL
  return {ask.find_among(ids, state), next_start}
end

-- The ids of samples that are acked provisionally (1) or durably (2), each with its step.
function ask.acked(how)
  local ids, found = redis.call('ZRANGE', KEY.log, 0, -1), {}
  samples:load(ids)
  for _, id in ipairs(ids) do
    local sample = samples:get(id)
    if sample.acked == how then
      found[#found + 1] = {id, sample.step or NULL}
    end
  end
  return found
end

-- -- steps ---------------------------------------------------------------------------------------------

-- What a checkpoint at `last` is compared with: {the head's step, its chain, digests of the plans since}.
function ask.basis(last)
  local head, digests = head_checkpoint(), {}
  local first = head and head.step + 1 or 1
  for step = first, last do
    local plan = plans:get(step)
    if not plan then
      break
    end
    digests[#digests + 1] = plan.digest
  end
  return {head and head.step or 0, head and head.chain or '', digests}
end

-- The archived block that holds the first steps after `after`, and its last step.
local function block_after(after)
  local first = redis.call('ZRANGEBYSCORE', KEY.blocks, string.format('(%.0f', after), '+inf', 'LIMIT', 0, 1)[1]
  if first then
    return redis.call('HGET', KEY.archive, first), tonumber(redis.call('ZSCORE', KEY.blocks, first))
  end
end

-- Some steps after step `after`: {steps, the step up to which this page goes; NULL at the end}. Steps may be
-- archived between two pages, and are told once all the same.
function ask.history(after, through, sample_id)
  local packed, last = block_after(after)
  if packed and after < through then
    local is_told = not sample_id or string.find(packed, sample_id, 1, true)
    return {is_told and cmsgpack.unpack(packed) or {}, last}
  end
  local found, steps, page = {}, planned_after(after, through), {}
  for at = 1, math.min(#steps, STEPS) do
    page[at] = steps[at]
  end
  plans:load(page)
  for at, step in ipairs(page) do
    found[at] = trained_step(step, plans:get(step))
  end
  return {found, #steps > STEPS and page[STEPS] or NULL}
end
