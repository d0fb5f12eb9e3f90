-- A ledger as rows, and rows as a ledger: see ledger/image.py for what a row is.

local LOADED = {}

function LOADED.run(row)
  local names = {
    'lsn', 'place_order', 'num_prompts', 'next_ordinal', 'closed', 'committed', 'next_generation',
    'trained_step', 'started_step', 'archived_step', 'archived_place', 'archived',
  }
  for at, name in ipairs(names) do
    run[name] = row[at]
  end
end

function LOADED.fact(row)
  later('HSET', KEY.facts, row[1], row[2])
end

function LOADED.role(row)
  later('HSET', KEY.epochs, row[1], row[2])
  later('HSET', KEY.holders, row[1], row[3])
end

function LOADED.source(row)
  later('ZADD', KEY.source, row[1], cmsgpack.pack(row))
end

function LOADED.prompt(row)
  prompts:add(row[1], {
    state = row[2], again = row[3] == 1, worker = row[4], attempt = row[5], deaths = row[6], reason = row[7],
  })
end

function LOADED.intent(row)
  intents:add(row[1], {
    sample_id = row[2], bytes = row[3], ordinal = row[4], worker = row[5], revoked = row[6] == 1,
  })
end

function LOADED.sample(row)
  samples:add(row[2], {
    place = row[1], ordinal = row[3], state = row[4], resident = row[5] == 1, bytes = row[6],
    generation = row[7], acked = row[8], step = row[9], reason = row[10], is_bare = false,
  })
  texts[row[2]] = row[11]
end

-- A plan's row ends with its digest, which the caller makes.
function LOADED.plan(row)
  plans:add(row[1], {rev = row[2], sample_ids = row[3], deaths = row[4], digest = row[5]})
end

function LOADED.checkpoint(row)
  checkpoints:add(row[1], {
    step = row[1], name = row[2], manifest_digest = row[3], chain = row[4], first_place = row[5],
  })
end

function LOADED.archive(steps)
  local block = {}
  for at, trained in ipairs(steps) do
    local visits = {}
    for visit, row in ipairs(trained[3]) do
      visits[visit] = {row[1], row[2], row[3] or false, row[4] == 1}
      if row[4] == 1 and run.place_order ~= 'ordinal' then
        later('SADD', KEY.archived_ids, row[2])
      end
    end
    block[at] = {trained[1], trained[2], visits}
  end
  later('HSET', KEY.archive, steps[1][1], cmsgpack.pack(block))
  later('ZADD', KEY.blocks, steps[#steps][1], steps[1][1])
end

-- The copy that the caller began; another one may have taken its place.
local function check_copy(identity)
  if not run.loading or run.identity ~= identity then
    refuse('appeared')
  end
end

-- Until `loaded` no process finds a ledger here.
function change.load(identity, rows)
  check_copy(identity)
  for _, row in ipairs(rows) do
    LOADED[row[1]](row[2])
  end
  return NULL
end

function change.loaded(identity)
  check_copy(identity)
  run.loading = nil
  return NULL
end
