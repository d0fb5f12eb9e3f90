-- Step plans, checkpoints and quarantine: they decide which weights survive.

local function take_ack(step, rev, finished)
  local plan = plans:change(step)
  if step ~= run.trained_step + 1 or not plan or plan.rev ~= rev then
    refuse('out_of_turn', run.trained_step, plan and plan.rev or NULL)
  end
  samples:load(finished)
  for _, id in ipairs(finished) do
    local sample = samples:get(id)
    if sample and sample.acked < 2 then
      sample = samples:change(id)
      sample.acked, sample.step = 1, step
    end
  end
  run.trained_step, plan.deaths = step, 0
end

-- `plan`: {step, rev, sample ids, digest}; `ack`: {step, rev, finished ids}.
function change.plan(plan, ack)
  if ack then
    take_ack(unpack(ack))
  end
  run.started_step = plan and plan[1]
  if not plan then
    return NULL
  end
  local step, rev, sample_ids, digest = unpack(plan)
  if step <= run.archived_step then
    refuse('history_is_archived', step, run.archived_step)
  end
  local stored = plans:get(step)
  if not stored or rev > stored.rev and step > run.trained_step then
    stored = plans:add(step, {rev = rev, sample_ids = sample_ids, deaths = 0, digest = digest})
  end
  return {step, stored.rev, stored.sample_ids, stored.deaths}
end

-- -- checkpoints ---------------------------------------------------------------------------------------

-- The caller read the head and the digests of plans, and hashed them; refuse if they are others by now.
local function check_basis(basis, head)
  if basis.head_chain ~= (head and head.chain or '') or basis.head_step ~= (head and head.step or 0) then
    refuse('moved')
  end
end

local function check_plans(checkpoint, basis, head)
  local first = head and head.step + 1 or 1
  for step = first, checkpoint.step do
    local plan = plans:get(step)
    if not plan then
      refuse('contradicts', 'its lineage is not that of the plans on record')
    end
    if plan.digest ~= basis.digests[step - first + 1] then
      refuse('moved')
    end
  end
  if basis.chain ~= checkpoint.chain then
    refuse('contradicts', 'its lineage is not that of the plans on record')
  end
end

-- `basis`: what the checkpoint's chain was compared with. `lineage`: see lineage.lua.
function change.head(record, basis, lineage)
  local checkpoint, head = {}, head_checkpoint()
  for at, name in ipairs({'step', 'name', 'manifest_digest', 'chain', 'first_place'}) do
    checkpoint[name] = record[at]
  end
  local is_known = head ~= nil
  for name, value in pairs(checkpoint) do
    is_known = is_known and head[name] == value
  end
  if is_known then
    return UNCHANGED, NULL
  end
  if head and checkpoint.step <= head.step then
    refuse('behind_head', head.step)
  end
  check_basis(basis, head)
  if lineage then
    adopt(checkpoint, basis, head, lineage)
    run.trained_step = checkpoint.step
  else
    check_plans(checkpoint, basis, head)
    run.trained_step = math.max(run.trained_step, checkpoint.step)
  end
  checkpoints:add(checkpoint.step, checkpoint)
  local acked = redis.call('ZRANGEBYSCORE', KEY.provisional, '-inf', checkpoint.step)
  samples:load(acked)
  for _, id in ipairs(acked) do
    local sample = samples:get(id)
    if sample.acked == 1 and sample.step <= checkpoint.step then
      samples:change(id).acked = 2
    end
  end
  return NULL
end

function change.fall_back(step)
  if step < run.archived_step then
    refuse('history_is_archived', step, run.archived_step)
  end
  for number, checkpoint in pairs(checkpoints:load_all()) do
    if checkpoint and number > step then
      checkpoints:drop(number)
    end
  end
  local lost, ids = {}, redis.call('ZRANGE', KEY.log, 0, -1)
  samples:load(ids)
  for _, id in ipairs(ids) do
    local sample = samples:get(id)
    if sample.step and sample.step > step and sample.acked > 0 then
      if sample.state == 'released' then
        lost[#lost + 1] = id
      end
      sample = samples:change(id)
      sample.acked, sample.step = 0, nil
    end
  end
  for _, id in ipairs(lost) do
    lose(id)
  end
  run.trained_step = math.min(run.trained_step, step)
  return lost
end

-- -- samples that cannot be trained --------------------------------------------------------------------

function change.quarantine(sample_ids, step, reason)
  samples:load(sample_ids)
  for _, id in ipairs(sample_ids) do
    local sample = samples:get(id)
    if sample and sample.acked < 2 and (sample.state == 'present' or sample.state == 'lost') then
      sample = samples:change(id)
      sample.state, sample.acked, sample.reason, sample.step = 'quarantined', 0, reason, step
      local prompt = sample.ordinal and prompts:get(sample.ordinal)
      if prompt and prompt.again and prompt.state == 'pending' then -- it is not captured again
        prompts:drop(sample.ordinal)
      end
    end
  end
  return NULL
end
