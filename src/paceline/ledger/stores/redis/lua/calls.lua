-- What every call shares: its context, its answer, and the checks of the ledger that it found.

local CONTEXT, MOST_ARGUMENTS = cmsgpack.unpack(ARGV[2]), 8
local UNCHANGED, change = {}, {} -- the operations by name; `UNCHANGED, result` changes nothing
local worker = CONTEXT[10] or '' -- the producer that makes the change
local adopt, archived_among

local function answer_packed(status, packed)
  local lsn, incarnation = run and run.lsn or 0, run and run.incarnation or 0
  return {status, lsn, incarnation, run and run.server or '', packed}
end

local function answer(status, value)
  return answer_packed(status, cmsgpack.pack(value))
end

-- A client that saw change `lsn` under an incarnation of the server knows that the ledger reached it. The
-- ledger has lost changes if that incarnation is unknown here, is another server's, or ended before.
local function has_lost(incarnation, server, lsn)
  if incarnation == run.incarnation and server == run.server then
    return lsn > run.lsn
  end
  local began = redis.call('HGET', KEY.incarnations, incarnation)
  if not began or cmsgpack.unpack(began)[1] ~= server then
    return true
  end
  local following = redis.call('HGET', KEY.incarnations, incarnation + 1)
  return lsn > (following and cmsgpack.unpack(following)[2] or run.lsn)
end

local OF_A_COPY = {load = true, loaded = true, dump = true} -- what may be asked of one that is not whole

-- An answer that refuses the call, if this is not the ledger that the client knows.
local function refused_by_state(identity, incarnation, server, lsn)
  if run == nil then
    return answer('missing', NULL)
  end
  if run.loading and not OF_A_COPY[ARGV[1]] then
    return answer('copying', NULL)
  end
  if run.schema ~= SCHEMA then
    return answer('schema', run.schema or NULL)
  end
  if identity and identity ~= run.identity then
    return answer('other', run.identity)
  end
  if identity and has_lost(incarnation, server, lsn) then
    return answer('regressed', run.lsn)
  end
end
