-- Forgetting checkpoints, and archiving what no recovery can need without them.

local function retire_checkpoints(keep)
  local steps = {}
  for step in pairs(checkpoints:load_all()) do
    steps[#steps + 1] = step
  end
  table.sort(steps)
  local retired = #steps - math.max(1, keep)
  for at = 1, retired do
    checkpoints:drop(steps[at])
  end
  return retired > 0, checkpoints:get(steps[math.max(1, retired + 1)] or 0)
end

-- Trained samples up to `step` whose places lie below `first_place`.
local function trained_samples(step, first_place)
  local found, ids = {}, redis.call('ZRANGEBYSCORE', KEY.log, '-inf', '(' .. string.format('%.0f', first_place))
  samples:load(ids)
  for _, id in ipairs(ids) do
    local sample = samples:get(id)
    if sample.state == 'released' and sample.acked == 2 and sample.step and sample.step <= step then
      found[#found + 1] = id
    end
  end
  return found
end

local function archive_steps(steps, block_size)
  local block, size = {}, 0
  for at, step in ipairs(steps) do
    local trained = trained_step(step, plans:get(step))
    block[#block + 1], size = trained, size + #trained[3] + 1
    if size >= block_size or at == #steps then
      later('HSET', KEY.archive, block[1][1], cmsgpack.pack(block))
      later('ZADD', KEY.blocks, step, block[1][1])
      block, size = {}, 0
    end
    plans:drop(step)
  end
end

function change.retire(keep, archive_from, block_size)
  local retired, oldest = retire_checkpoints(keep)
  if not oldest or oldest.step <= run.archived_step and oldest.first_place <= run.archived_place then
    if retired then
      return 0
    end
    return UNCHANGED, 0
  end
  local steps = planned_after(-math.huge, oldest.step)
  local below = string.format('(%.0f', oldest.first_place)
  run.archived_step = math.max(run.archived_step, oldest.step)
  if math.max(#steps, redis.call('ZCOUNT', KEY.log, '-inf', below)) < archive_from then
    return 0
  end
  local done = trained_samples(oldest.step, oldest.first_place)
  if math.max(#steps, #done) < archive_from then
    return 0
  end
  archive_steps(steps, block_size)
  run.archived_place = math.max(run.archived_place, oldest.first_place)
  run.archived = run.archived + #done
  for _, id in ipairs(done) do
    samples:drop(id)
    later('HDEL', KEY.refs, id)
    if run.place_order ~= 'ordinal' then
      later('SADD', KEY.archived_ids, id)
    end
  end
  return #done
end
