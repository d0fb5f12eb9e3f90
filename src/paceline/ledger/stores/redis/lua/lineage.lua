-- Rolling forward: a checkpoint that the ledger does not know, with the steps since the head.
-- A lineage is a list of {step, rev, samples, digest of the plan, sample ids of the plan}, its samples
-- {place, id, ordinal, finished}. `basis`: see check_basis.

local PLACE, ID, ORDINAL, FINISHED = 1, 2, 3, 4

local function undo_provisional_acks()
  local ids = redis.call('ZRANGE', KEY.provisional, 0, -1)
  samples:load(ids)
  for _, id in ipairs(ids) do
    local sample = samples:change(id)
    sample.acked, sample.step = 0, nil
  end
end

-- Whether a place without a row is archived.
local function was_here(place)
  return place < (run.place_order == 'arrival' and run.committed or run.archived_place)
end

-- `archived`: of the samples of the lineage.
local function check_place(visit, is_planned, archived)
  local id, place = visit[ID], visit[PLACE]
  local sample, there = samples:get(id), sample_at(place)
  if sample and sample.place ~= place or there and there ~= id then
    refuse('contradicts', id .. ' has another place in the log')
  end
  if sample then
    if sample.state == 'quarantined' and not is_planned then
      refuse('contradicts', id .. ' is quarantined')
    end
    return
  end
  if was_here(place) or archived[id] then
    refuse('contradicts', id .. ' was trained for the last time before')
  end
  local prompt = run.place_order == 'ordinal' and prompts:get(place)
  if prompt and prompt.state == 'failed' then
    refuse('contradicts', string.format('prompt %.0f has failed', place))
  end
end

-- Refuse a lineage that trains a sample after its last visit, here or in an earlier lineage.
local function check_trained(lineage)
  local done, places, place_of = {}, {}, {}
  for _, trained in ipairs(lineage) do
    for _, visit in ipairs(trained[3]) do
      local id, place = visit[ID], visit[PLACE]
      local sample = samples:get(id)
      if done[id] or sample and sample.acked == 2 then
        refuse('contradicts', id .. ' was trained for the last time before')
      end
      if places[place] and places[place] ~= id then
        refuse('contradicts', id .. ' has another place in the log')
      end
      if place_of[id] and place_of[id] ~= place then
        refuse('contradicts', 'a sample has two places in the log')
      end
      places[place], place_of[id] = id, place
      done[id] = visit[FINISHED] or nil
    end
  end
end

-- Those samples of the lineage that are archived, as a set.
local function archived_in(lineage)
  local ids = {}
  for _, trained in ipairs(lineage) do
    for _, visit in ipairs(trained[3]) do
      ids[#ids + 1] = visit[ID]
    end
  end
  return archived_among(without_rows(ids))
end

local function check_lineage(checkpoint, basis, head, lineage)
  local first = math.max(0, head and head.step or 0) + 1
  local expected = first
  for _, trained in ipairs(lineage) do
    expected = trained[1] == expected and expected + 1 or -1
  end
  if expected ~= checkpoint.step + 1 then
    refuse('contradicts', string.format('its steps do not follow the head at step %.0f', first - 1))
  end
  if basis.chain ~= checkpoint.chain then
    refuse('contradicts', 'its chain does not continue that of the head')
  end
  local archived = archived_in(lineage)
  for _, trained in ipairs(lineage) do
    local step, rev, visits, digest = unpack(trained)
    local stored = plans:get(step)
    if stored and rev > stored.rev then
      stored = nil -- the ledger has forgotten this revision
    end
    if stored and stored.digest ~= digest then
      refuse('contradicts', string.format('step %.0f was planned otherwise', step))
    end
    for _, visit in ipairs(visits) do
      check_place(visit, stored ~= nil, archived)
    end
  end
  check_trained(lineage)
end

-- First visits follow the log, so prompts that the lineage left out up to `last` had failed.
local function fail_passed_over(reason, last)
  pass_over(last)
  local ordinals = prompts:touched()
  for _, text in ipairs(redis.call('ZRANGEBYSCORE', KEY.open, '-inf', last)) do
    ordinals[tonumber(text)] = true
  end
  for ordinal in pairs(ordinals) do
    local prompt = ordinal <= last and prompts:get(ordinal)
    if prompt and prompt.state ~= 'failed' and not prompt.again then
      prompt = prompts:change(ordinal)
      prompt.state, prompt.worker = 'failed', ''
      prompt.reason = string.format('%.0f: ', ordinal) .. reason
    end
  end
end

local function adopt_last_visit(visit, step)
  local sample = samples:change(visit[ID])
  if sample.acked < 2 then
    sample.acked, sample.step = 2, step
  end
  if sample.state == 'lost' then
    sample.state = 'released'
    finish_prompt(visit[ORDINAL])
  end
end

-- The samples of a lineage that have no rows, by place.
local function unknown_in(lineage)
  local visits, unknown, last = {}, {}, nil
  for _, trained in ipairs(lineage) do
    for _, visit in ipairs(trained[3]) do
      visits[visit[ID]] = visit
      last = math.max(last or 0, visit[PLACE])
    end
  end
  for id, visit in pairs(visits) do
    if not samples:get(id) then
      unknown[#unknown + 1] = visit
    end
  end
  table.sort(unknown, by_first)
  return unknown, last
end

function adopt(checkpoint, basis, head, lineage)
  check_lineage(checkpoint, basis, head, lineage)
  local unknown, last = unknown_in(lineage)
  if last and settle_order(basis.order) == 'arrival' then
    for at, visit in ipairs(unknown) do
      if visit[PLACE] ~= run.committed + at - 1 then
        refuse('contradicts', 'samples before those it trained are unknown here')
      end
    end
  end
  for _, visit in ipairs(unknown) do -- lost, until its last visit says otherwise
    samples:add(visit[ID], {
      place = visit[PLACE], ordinal = visit[ORDINAL], state = 'lost', resident = false, bytes = 0,
      generation = 0, acked = 0, reason = '', is_bare = false,
    })
    texts[visit[ID]] = basis.bare_refs[visit[ID]]
    placed[visit[PLACE]] = visit[ID]
    run.committed = run.committed + 1
    reopen_prompt(visit[ORDINAL])
  end
  undo_provisional_acks() -- the lineage says what the weights contain
  for _, trained in ipairs(lineage) do
    local step, rev, visits, digest, sample_ids = unpack(trained)
    plans:add(step, {rev = rev, sample_ids = sample_ids, deaths = 0, digest = digest})
    for _, visit in ipairs(visits) do
      if visit[FINISHED] then
        adopt_last_visit(visit, step)
      end
    end
  end
  if last and run.place_order == 'ordinal' then
    fail_passed_over(basis.passed_over, last)
  end
end
