-- The ledger as rows, a page at a time: {rows, after which one the next page begins; NULL at the end}. See
-- ledger/image.py. Yes and no are 1 and 0 there, nothing is NULL.

local function bit_of(value)
  return value and 1 or 0
end

-- The next rows of a table with numbered rows, each shown by `show(row, number)`. `elsewhere`: the numbers of
-- those that have no row in the hash.
local function numbered(rows, after, show, elsewhere)
  local numbers, page, found = rows:numbers_from(after + 1), {}, {}
  local packed = is_member(numbers)
  for _, number in ipairs(elsewhere or {}) do
    if number > after and not packed[number] then
      numbers[#numbers + 1] = number
    end
  end
  table.sort(numbers)
  for at = 1, math.min(#numbers, PAGE) do
    page[at] = numbers[at]
  end
  rows:load(page)
  for at, number in ipairs(page) do
    found[at] = show(rows:get(number), number)
  end
  return {found, #numbers > PAGE and page[PAGE] or NULL}
end

local DUMP = {}

function DUMP.run()
  return {{{
    run.lsn, run.place_order or NULL, run.num_prompts, run.next_ordinal, run.closed, run.committed,
    run.next_generation, run.trained_step, run.started_step or NULL, run.archived_step, run.archived_place,
    run.archived,
  }}, NULL}
end

function DUMP.fact()
  local found = pairs_in(KEY.facts)
  table.sort(found, by_first)
  return {found, NULL}
end

function DUMP.role()
  local found = pairs_in(KEY.epochs)
  table.sort(found, by_first)
  for at, pair in ipairs(found) do
    found[at] = {pair[1], tonumber(pair[2]), redis.call('HGET', KEY.holders, pair[1])}
  end
  return {found, NULL}
end

function DUMP.source(after)
  local found = {}
  local texts_found = redis.call(
    'ZRANGEBYSCORE', KEY.source, string.format('(%.0f', after), '+inf', 'LIMIT', 0, PAGE)
  local last = after
  for _, text in ipairs(texts_found) do
    local block = cmsgpack.unpack(text)
    last = block[1]
    if block[2] > 0 then
      found[#found + 1] = block
    end
  end
  return {found, #texts_found == PAGE and last or NULL}
end

function DUMP.prompt(after)
  local leased = {}
  for at, pair in ipairs(pairs_in(KEY.leases)) do
    leased[at] = tonumber(pair[1])
  end
  return numbered(prompts, after, function(prompt, ordinal)
    return {
      ordinal, prompt.state, bit_of(prompt.again), prompt.worker, prompt.attempt, prompt.deaths, prompt.reason,
    }
  end, leased)
end

function DUMP.intent(after)
  return numbered(intents, after, function(intent, generation)
    return {
      generation, intent.sample_id, intent.bytes, intent.ordinal or NULL, intent.worker, bit_of(intent.revoked),
    }
  end)
end

-- A sample's row ends with whether its ref is to be compacted, which the caller does.
function DUMP.sample(after)
  local ids = redis.call('ZRANGEBYSCORE', KEY.log, string.format('(%.0f', after), '+inf', 'LIMIT', 0, PAGE)
  local found = {}
  samples:load(ids)
  for at, text in ipairs(hmget(KEY.refs, ids)) do
    local sample = samples:get(ids[at])
    found[at] = {
      sample.place, ids[at], sample.ordinal or NULL, sample.state, bit_of(sample.resident), sample.bytes,
      sample.generation, sample.acked, sample.step or NULL, sample.reason, text, sample.is_bare,
    }
  end
  return {found, #ids == PAGE and found[#found][1] or NULL}
end

function DUMP.plan(after)
  return numbered(plans, after, function(plan, step)
    return {step, plan.rev, plan.sample_ids, plan.deaths}
  end)
end

function DUMP.checkpoint(after)
  return numbered(checkpoints, after, function(checkpoint, step)
    return {step, checkpoint.name, checkpoint.manifest_digest, checkpoint.chain, checkpoint.first_place}
  end)
end

-- One block a page, its visits as they are stored.
function DUMP.archive(after)
  local first, last = block_after(after)
  return {first and {cmsgpack.unpack(first)} or {}, first and last or NULL}
end

function ask.dump(name, after)
  return DUMP[name](after)
end
