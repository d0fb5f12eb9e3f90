-- Samples: their intents, commits and features.

function change.reserve(wanted, budget)
  local num_bytes = 0
  for _, sample in ipairs(wanted) do
    num_bytes = num_bytes + sample[3]
  end
  if budget then
    local count = run.resident_samples + redis.call('HLEN', KEY.intents) + #wanted
    local size = run.resident_bytes + run.reserved_bytes + num_bytes
    if size > budget[1] or budget[2] and count > budget[2] then
      return UNCHANGED, NULL
    end
  end
  local generations = {}
  for _, sample in ipairs(wanted) do
    local ordinal, sample_id, size = unpack(sample)
    intents:add(run.next_generation, {
      sample_id = sample_id, bytes = size, ordinal = ordinal, worker = worker, revoked = false,
    })
    generations[#generations + 1] = run.next_generation
    run.next_generation = run.next_generation + 1
  end
  return generations
end

function change.swept(generations, skip_through)
  intents:load(generations)
  for _, generation in ipairs(generations) do
    local intent = intents:get(generation)
    if intent and (intent.revoked or worker ~= '' and intent.worker == worker) then
      intents:drop(generation)
    end
  end
  run.next_generation = math.max(run.next_generation, skip_through + 1)
  return NULL
end

-- -- commits -------------------------------------------------------------------------------------------

-- Whether a sample that has no row is archived: durable weights contain it.
local function is_archived(sample_id, ordinal)
  if run.place_order == 'ordinal' then
    return ordinal ~= nil and ordinal < run.archived_place
  end
  return run.archived > 0 and not samples:get(sample_id) and archived_among({sample_id})[sample_id]
end

-- Whether the ref has an intent, or is on record already.
local function may_commit(sample_id, ordinal, generation)
  if generation == 0 and run.place_order == 'arrival' then
    return true
  end
  local intent, known = intents:get(generation), samples:get(sample_id)
  if intent and intent.sample_id == sample_id and intent.worker == worker and not intent.revoked then
    return true
  end
  if known and (known.generation == generation or known.state == 'released') then
    return true
  end
  return is_archived(sample_id, ordinal)
end

local function commit_known(sample_id, ordinal, generation, num_bytes, text)
  local sample = samples:get(sample_id)
  if run.place_order == 'ordinal' and ordinal ~= sample.ordinal then
    refuse('other_place', sample_id, ordinal or NULL, 'for_prompt', sample.ordinal or NULL)
  end
  if sample.state == 'lost' and sample.generation == generation and generation ~= 0 then
    return false -- these are the lost bytes themselves
  end
  finish_prompt(sample.ordinal)
  if sample.state ~= 'lost' then
    return false
  end
  sample = samples:change(sample_id)
  if sample.acked == 2 then -- by now durable weights contain it
    sample.state = 'released'
    return false
  end
  sample.state, sample.resident, sample.bytes, sample.generation = 'present', true, num_bytes, generation
  texts[sample_id] = text
  return true
end

local function commit_ref(sample_id, ordinal, generation, num_bytes, text)
  local intent = intents:get(generation)
  if intent and not intent.revoked then
    intents:drop(generation)
  end
  if samples:get(sample_id) then
    return commit_known(sample_id, ordinal, generation, num_bytes, text)
  end
  local prompt = ordinal and prompts:get(ordinal)
  local is_hole = run.place_order == 'ordinal' and prompt and prompt.state == 'failed'
  if is_hole or is_archived(sample_id, ordinal) then
    return false
  end
  local place = ordinal
  if run.place_order == 'arrival' then
    place = run.committed
  end
  if ordinal and ordinal >= run.num_prompts then
    refuse('other_place', sample_id, ordinal, 'too_far', run.num_prompts)
  end
  if place == nil then
    refuse('other_place', sample_id, NULL, 'no_prompt', NULL)
  end
  local there = sample_at(place)
  if there then
    refuse('other_place', sample_id, ordinal or NULL, 'taken', there)
  end
  finish_prompt(ordinal)
  samples:add(sample_id, {
    place = place, ordinal = ordinal, state = 'present', resident = true, bytes = num_bytes,
    generation = generation, acked = 0, reason = '', is_bare = false,
  })
  texts[sample_id], placed[place] = text, sample_id
  run.committed = run.committed + 1
  return true
end

function change.commit(refs)
  if #refs == 0 then
    return UNCHANGED, {}
  end
  settle_order('arrival') -- unless a producer settled it before
  local ids, ordinals, generations, gone, fresh = {}, {}, {}, {}, {}
  local first, last = math.huge, -1
  for at, ref in ipairs(refs) do
    ids[at], generations[at], ordinals[#ordinals + 1] = ref[1], ref[3], ref[2]
    first, last = math.min(first, ref[2] or first), math.max(last, ref[2] or last)
  end
  if run.place_order == 'arrival' then
    first, last = run.committed, run.committed + #refs
  end
  if last - first < 4 * #refs then
    look_at_places(first, last)
  end
  samples:load(ids)
  prompts:load(ordinals)
  intents:load(generations)
  for _, ref in ipairs(refs) do
    if not may_commit(ref[1], ref[2], ref[3]) then
      gone[#gone + 1] = ref[1]
    end
  end
  if #gone > 0 then
    refuse('intent_revoked', gone)
  end
  for at, ref in ipairs(refs) do
    fresh[at] = commit_ref(ref[1], ref[2], ref[3], ref[4], ref[5])
  end
  return fresh
end

-- -- features ------------------------------------------------------------------------------------------

local function is_covered(sample, head_step)
  if sample.state == 'quarantined' then
    return sample.step == nil or sample.step <= head_step
  end
  return sample.acked == 2
end

local function record_freed(sample_ids, head_step)
  local early, archived = {}, archived_among(without_rows(sample_ids))
  for _, id in ipairs(sample_ids) do
    local sample = samples:get(id)
    if sample and not is_covered(sample, head_step) or not sample and not archived[id] then
      early[#early + 1] = id
    end
  end
  if #early > 0 then
    refuse('not_covered', early)
  end
  for _, id in ipairs(sample_ids) do
    local sample = samples:change(id)
    if sample then
      sample.resident = false
      sample.state = sample.state == 'present' and 'released' or sample.state
      sample.is_bare = sample.is_bare or sample.state == 'quarantined' -- readers need only the ref's id
    end
  end
end

-- Up to `limit` resident samples of an index that are covered, as {place, id, generation}.
local function covered_in(index, limit, head_step)
  return first_kept(limit, PAGE, function(from)
    local ids = redis.call('ZRANGE', KEY[index], from, from + PAGE - 1)
    samples:load(ids)
    return ids
  end, function(id)
    local sample = samples:get(id)
    return sample.resident and is_covered(sample, head_step) and {sample.place, id, sample.generation}
  end)
end

function change.release(freed, limit)
  local head = head_checkpoint()
  local head_step = head and head.step or -1
  if #freed > 0 then
    record_freed(freed, head_step)
  end
  local covered, may_go = covered_in('durable', limit, head_step), {}
  for _, found in ipairs(covered_in('kept', limit, head_step)) do
    covered[#covered + 1] = found
  end
  table.sort(covered, by_first)
  for at = 1, math.min(limit, #covered) do
    may_go[at] = {covered[at][2], covered[at][3]}
  end
  if #freed == 0 then
    return UNCHANGED, may_go
  end
  return may_go
end

local function lose(sample_id)
  local sample = samples:change(sample_id)
  sample.resident = false
  if sample.state ~= 'quarantined' then
    sample.state = 'lost'
    reopen_prompt(sample.ordinal)
  end
end

function change.report_lost(sample_ids)
  samples:load(sample_ids)
  for _, id in ipairs(sample_ids) do
    local sample = samples:get(id)
    if sample and sample.acked < 2 then
      lose(id)
    end
  end
  return NULL
end
