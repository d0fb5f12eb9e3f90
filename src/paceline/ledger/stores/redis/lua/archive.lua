-- The archive of steps and samples that no recovery can need. A block is a packed list of steps, kept under
-- its first one: {step, rev, {{place, id, ordinal or false, finished}, ...}}.

local UNKNOWN_PLACE = -1 -- of a planned sample that was never committed

-- A planned step, with what is known of its samples. A sample may come twice: its last visit finishes it.
local function trained_step(step, plan)
  local visits, last_visits = {}, {}
  for visit, id in ipairs(plan.sample_ids) do
    last_visits[id] = visit
  end
  samples.load(plan.sample_ids)
  for visit, id in ipairs(plan.sample_ids) do
    local sample = samples.get(id)
    local finished = sample and sample.acked > 0 and sample.step == step and last_visits[id] == visit
    visits[visit] = {
      sample and sample.place or UNKNOWN_PLACE, id, sample and sample.ordinal or false, finished or false,
    }
  end
  return {step, plan.rev, visits}
end

-- Whether an archived step finished the sample. In ordinal order it searches the whole archive; that order
-- asks only about a call that is wrong or comes twice.
function archived_id(sample_id)
  if run.place_order ~= 'ordinal' then
    return redis.call('SISMEMBER', KEY.archived_ids, sample_id) == 1
  end
  for _, first in ipairs(redis.call('ZRANGE', KEY.blocks, 0, -1)) do
    local packed = redis.call('HGET', KEY.archive, first)
    if string.find(packed, sample_id, 1, true) then
      for _, trained in ipairs(cmsgpack.unpack(packed)) do
        for _, visit in ipairs(trained[3]) do
          if visit[2] == sample_id and visit[4] then
            return true
          end
        end
      end
    end
  end
  return false
end
