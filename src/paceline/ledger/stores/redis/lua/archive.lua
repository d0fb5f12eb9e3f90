-- The archive of steps and samples that no recovery can need. A block is a packed list of steps, kept under
-- its first one: {step, rev, {{place, id, ordinal or false, finished}, ...}}.

local UNKNOWN_PLACE = -1 -- of a planned sample that was never committed

-- A planned step, with what is known of its samples. A sample may come twice: its last visit finishes it.
local function trained_step(step, plan)
  local visits, last_visits = {}, {}
  for visit, id in ipairs(plan.sample_ids) do
    last_visits[id] = visit
  end
  samples:load(plan.sample_ids)
  for visit, id in ipairs(plan.sample_ids) do
    local sample = samples:get(id)
    local finished = sample and sample.acked > 0 and sample.step == step and last_visits[id] == visit
    visits[visit] = {
      sample and sample.place or UNKNOWN_PLACE, id, sample and sample.ordinal or false, finished or false,
    }
  end
  return {step, plan.rev, visits}
end

-- Planned steps after one and through another, in order.
local function planned_after(after, through)
  local steps = plans:numbers_from(after + 1)
  while #steps > 0 and steps[#steps] > through do
    steps[#steps] = nil
  end
  return steps
end

-- Those of the samples that an archived step finished, as a set. In ordinal order it searches the whole archive,
-- once for all of them; that order asks only about calls that are wrong or come twice, and at rolling forward.
function archived_among(sample_ids)
  local found, wanted = {}, is_member(sample_ids)
  if run.place_order ~= 'ordinal' then
    for _, id in ipairs(sample_ids) do
      found[id] = redis.call('SISMEMBER', KEY.archived_ids, id) == 1
    end
    return found
  end
  local blocks = next(wanted) and redis.call('ZRANGE', KEY.blocks, 0, -1) or {}
  for _, first in ipairs(blocks) do
    for _, trained in ipairs(cmsgpack.unpack(redis.call('HGET', KEY.archive, first))) do
      for _, visit in ipairs(trained[3]) do
        if visit[4] and wanted[visit[2]] then
          found[visit[2]] = true
        end
      end
    end
  end
  return found
end
