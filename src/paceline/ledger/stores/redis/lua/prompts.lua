-- Prompts. Only those that are leased, failed, or pending again have rows.

local function pending_prompt(again)
  return {state = 'pending', again = again, worker = '', attempt = 0, deaths = 0, reason = ''}
end

-- Count the prompt as leased once; earlier prompts that never were become pending.
local function pass_over(ordinal)
  for number = run.next_ordinal, ordinal - 1 do
    prompts:add(number, pending_prompt(false))
  end
  run.next_ordinal = math.max(run.next_ordinal, ordinal + 1)
end

-- The prompt's sample is committed.
local function finish_prompt(ordinal)
  if ordinal == nil then
    return
  end
  pass_over(ordinal)
  local prompt = prompts:get(ordinal)
  if prompt and prompt.state ~= 'failed' then
    prompts:drop(ordinal)
  end
end

-- The sample is lost: capture the prompt again, unless it is being captured or has failed.
local function reopen_prompt(ordinal)
  if ordinal == nil then
    return
  end
  pass_over(ordinal)
  local prompt = prompts:change(ordinal)
  if prompt then
    prompt.again = true
  else
    prompts:add(ordinal, pending_prompt(true))
  end
end

-- -- the source ----------------------------------------------------------------------------------------

function change.extend(blocks)
  local before, added = run.num_prompts, {}
  for _, block in ipairs(blocks) do
    local first, count, digest = unpack(block)
    if first == run.num_prompts then
      later('ZADD', KEY.source, first, cmsgpack.pack(block))
      added[first] = block
      run.num_prompts = run.num_prompts + count
      run.closed = count > 0 and 0 or run.closed
    else
      local known = added[first] or blocks_from(first, 1)[1] or {}
      if known[1] ~= first or known[2] ~= count or known[3] ~= digest then
        refuse('prompts_differ', first, before)
      end
    end
  end
  return run.num_prompts - before
end

function change.forget_prompts()
  local held = redis.call('ZCARD', KEY.failed) + redis.call('HLEN', KEY.leases)
  local covered = redis.call('HLEN', KEY.plans) + redis.call('HLEN', KEY.checkpoints)
  if held + covered + run.committed > 0 then
    return UNCHANGED, false
  end
  for _, intent in pairs(intents:load_all()) do
    if not intent.revoked then
      return UNCHANGED, false
    end
  end
  later('DEL', KEY.source, KEY.prompts, KEY.pending, KEY.open, KEY.again)
  run.num_prompts, run.next_ordinal, run.closed = 0, 0, 0
  return true
end

-- -- leases --------------------------------------------------------------------------------------------

-- The first `limit` prompts below `stop` that are pending again, outside the groups that others hold.
local function pending_again(limit, size, held, stop)
  return first_kept(limit, PAGE, function(from)
    return redis.call('ZRANGE', KEY.pending, from, from + PAGE - 1)
  end, function(text)
    local ordinal = tonumber(text)
    return ordinal < stop and not held[math.floor(ordinal / size)] and ordinal
  end)
end

function change.lease(limit, group_size, below)
  local size, held, stop = group_size or 1, {}, below or math.huge
  for _, pair in ipairs(pairs_in(KEY.leases)) do
    if pair[2] ~= worker then
      held[math.floor(tonumber(pair[1]) / size)] = true
    end
  end
  local ordinals = pending_again(limit, size, held, stop)
  prompts:load(ordinals)
  if not held[math.floor(run.next_ordinal / size)] then
    local last = math.min(run.num_prompts, stop, run.next_ordinal + limit - #ordinals) - 1
    for ordinal = run.next_ordinal, last do
      ordinals[#ordinals + 1] = ordinal
      prompts.known[ordinal] = false -- it was never leased
    end
  end
  if #ordinals == 0 then
    return UNCHANGED, {}
  end
  local leases = {}
  for _, ordinal in ipairs(ordinals) do
    if not group_size or math.floor(ordinal / size) == math.floor(ordinals[1] / size) then
      local prompt = prompts:change(ordinal) or prompts:add(ordinal, pending_prompt(false))
      prompt.state, prompt.worker = 'leased', worker
      leases[#leases + 1] = {ordinal, prompt.attempt, prompt.deaths}
      run.next_ordinal = math.max(run.next_ordinal, ordinal + 1)
    end
  end
  return leases
end

-- The lost samples of a prompt.
local function lost_samples_of(ordinal)
  local ids, found = {sample_at(ordinal)}, {}
  if run.displaced_samples > 0 then
    ids = redis.call('ZRANGE', KEY.lost, 0, -1)
  end
  samples:load(ids)
  for _, id in ipairs(ids) do
    local sample = samples:get(id)
    if sample and sample.state == 'lost' and sample.ordinal == ordinal then
      found[#found + 1] = id
    end
  end
  return found
end

-- The prompt will not be captured again. Quarantine its lost sample, unless durable weights came to contain
-- it: then the prompt is done; whether it is.
local function end_lost_sample(ordinal, reason)
  local ids, is_done = lost_samples_of(ordinal), false
  for _, id in ipairs(ids) do
    if samples:get(id).acked == 2 then
      samples:change(id).state = 'released'
      is_done = true
    end
  end
  if is_done then
    prompts:drop(ordinal)
    return true
  end
  for _, id in ipairs(ids) do
    local sample = samples:change(id)
    sample.state, sample.acked, sample.step, sample.reason = 'quarantined', 0, nil, reason
  end
  return false
end

local function revoke_intents(is_meant)
  for generation, intent in pairs(intents:load_all()) do
    if intent and is_meant(intent) then
      intents:change(generation).revoked = true
    end
  end
end

function change.give_back(ordinals, failure, attempt_max)
  local among, failed = is_member(ordinals), {}
  revoke_intents(function(intent)
    return intent.worker == worker and among[intent.ordinal]
  end)
  prompts:load(ordinals)
  for _, ordinal in ipairs(ordinals) do
    local prompt = prompts:change(ordinal)
    if prompt and prompt.state == 'leased' and prompt.worker == worker then
      prompt.state, prompt.worker = 'pending', ''
      if failure then
        prompt.attempt, prompt.reason = prompt.attempt + 1, failure
        if prompt.attempt >= (attempt_max or 0) then
          prompt.state = 'failed'
          if not end_lost_sample(ordinal, failure) then
            failed[#failed + 1] = ordinal
          end
        end
      end
    end
  end
  return failed
end

-- The worker died: its leases return, each with one more death, and its intents are revoked.
local function end_work_of(dead)
  revoke_intents(function(intent)
    return intent.worker == dead
  end)
  for _, pair in ipairs(pairs_in(KEY.leases)) do
    if pair[2] == dead then
      local prompt = prompts:change(tonumber(pair[1]))
      prompt.state, prompt.worker, prompt.deaths = 'pending', '', prompt.deaths + 1
    end
  end
end

function change.end_stream(ended)
  local open = redis.call('ZCARD', KEY.pending) + redis.call('HLEN', KEY.leases)
  local ends = ended and open == 0 and run.next_ordinal >= run.num_prompts
  if ends == (run.closed == 1) then
    return UNCHANGED, ends
  end
  run.closed = ends and 1 or 0
  return ends
end
