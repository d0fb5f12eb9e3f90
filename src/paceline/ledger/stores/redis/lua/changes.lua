-- One change: check which process makes it, run the operation, write all of it.

local identity, seen_incarnation, seen_server, seen_lsn, server, role, epoch, op, syncs = unpack(CONTEXT, 1, 9)

local function begin_consumer()
  undo_provisional_acks()
  local plan = run.started_step and plans:change(run.started_step)
  if plan then
    plan.deaths = plan.deaths + 1
  end
  run.started_step = nil
  local head = head_checkpoint()
  run.trained_step = head and head.step or 0
end

-- `token`: of this call alone, so that it can be repeated when its result was lost. All are remembered: a
-- copy of a call may arrive when another process has taken the role over since.
function change.acquire(name, holder, token, order)
  local call = name .. ' ' .. token
  local known = redis.call('HGET', KEY.tokens, call)
  if known then
    return UNCHANGED, tonumber(known)
  end
  if order and settle_order(order) ~= order then
    refuse('other_order', run.place_order)
  end
  local next_epoch = tonumber(redis.call('HGET', KEY.epochs, name) or 0) + 1
  later('HSET', KEY.epochs, name, next_epoch)
  later('HSET', KEY.holders, name, holder)
  later('HSET', KEY.tokens, call, next_epoch)
  later('HDEL', KEY.ops, name)
  later('HDEL', KEY.results, name)
  if name == 'consumer' then
    begin_consumer()
  else
    end_work_of(string.match(name, ':(.*)') or '')
  end
  return next_epoch
end

-- `facts`: a list of {key, JSON text}.
function change.set_facts(facts, settle)
  local standing = {}
  for _, fact in ipairs(facts) do
    local known = settle and redis.call('HGET', KEY.facts, fact[1])
    if known then
      standing[#standing + 1] = {fact[1], known}
    end
    later('HSET', KEY.facts, fact[1], fact[2])
  end
  if #standing > 0 then
    return UNCHANGED, standing
  end
  return facts
end

-- For the API without plans (paceline.compat): samples that a step used.
function change.record_ack(sample_ids, step, acked)
  samples:load(sample_ids)
  for _, id in ipairs(sample_ids) do
    local sample = samples:get(id)
    if sample and sample.acked < 2 then
      sample = samples:change(id)
      sample.acked, sample.step = acked, step
    end
  end
  return NULL
end

-- -- the call ------------------------------------------------------------------------------------------

local COUNTERS = {
  'lsn', 'incarnation', 'num_prompts', 'next_ordinal', 'closed', 'committed', 'trained_step', 'archived_step',
  'archived_place', 'archived', 'resident_samples', 'resident_bytes', 'provisional_samples', 'waiting_samples',
  'displaced_samples', 'reserved_bytes',
}

-- `loading`: 1 for a copy, which no process finds until it is whole.
local function create(new_identity, loading)
  run_before = {}
  run = {schema = SCHEMA, identity = new_identity, next_generation = 1, server = server, loading = loading}
  for _, name in ipairs(COUNTERS) do
    run[name] = 0
  end
  redis.call('HSET', KEY.incarnations, 0, cmsgpack.pack({server, 0}))
  write_run()
  return answer('ok', NULL)
end

-- The result of the role's last operation, if this call repeats it.
local function recorded()
  if role == nil then
    return nil
  end
  local current = tonumber(redis.call('HGET', KEY.epochs, role) or 0)
  if epoch ~= current then
    return answer('fenced', current)
  end
  local last = tonumber(redis.call('HGET', KEY.ops, role) or 0)
  if op and op < last then
    return answer('late', last)
  end
  if op == last then
    return answer_packed('ok', redis.call('HGET', KEY.results, role))
  end
end

-- WAITAOF waits for what its connection wrote, so a call that changes nothing, but must last, writes this.
local function write_nothing()
  if syncs then
    redis.call('HSET', KEY.run, 'lsn', run.lsn)
  end
end

-- The result of the role's last operation, for a repetition of it.
local function record(packed)
  if role and op then
    redis.call('HSET', KEY.ops, role, op)
    redis.call('HSET', KEY.results, role, packed)
  end
end

local function commit_change(result)
  if run_before.loading then -- a copy has the changes of what it is a copy of
    write()
    return answer('ok', result)
  end
  if run.server ~= server then
    run.incarnation, run.server = run.incarnation + 1, server
    redis.call('HSET', KEY.incarnations, run.incarnation, cmsgpack.pack({server, run.lsn}))
  end
  run.lsn = run.lsn + 1
  write()
  local packed = cmsgpack.pack(result)
  record(packed)
  redis.call('XADD', KEY.changes, 'MAXLEN', 1, string.format('%.0f-0', run.lsn), 'lsn', run.lsn)
  return answer_packed('ok', packed)
end

local function make_change(name, arguments)
  run = read_run()
  if name == 'clear' then
    local _, seen, changes = unpack(arguments, 1, 3)
    if run and not run.loading and (run.identity ~= seen or run.lsn ~= changes) then
      return answer('appeared', NULL)
    end
    redis.call('UNLINK', unpack(KEYS))
    return create(arguments[1], 1)
  end
  if run == nil and name == 'create' then
    return create(arguments[1])
  end
  local stopped = refused_by_state(identity, seen_incarnation, seen_server, seen_lsn)
  if stopped then
    return stopped
  end
  if name == 'create' then
    return answer('ok', NULL)
  end
  local known = recorded()
  if known then
    write_nothing()
    return known
  end
  local done, result, unchanged = pcall(change[name], unpack(arguments, 1, MOST_ARGUMENTS))
  if not done then
    if type(result) == 'table' and result.refused then
      return answer(result.refused, result.detail)
    end
    error(result)
  end
  if result == UNCHANGED then
    -- Recorded all the same: a copy that arrives late must not find something to change by then.
    local packed = cmsgpack.pack(unchanged)
    record(packed)
    write_nothing()
    return answer_packed('ok', packed)
  end
  return commit_change(result)
end

return make_change(ARGV[1], cmsgpack.unpack(ARGV[3]))
