-- Schema version 1. What no process needs again has no row: a prompt without a row is done below
-- run.next_ordinal and pending from there on; trained samples and steps that no recovery can need are
-- archived. So the tables grow with what is in flight, not with the length of the run.

CREATE TABLE run (
    id              INTEGER PRIMARY KEY CHECK (id = 1),
    lsn             INTEGER NOT NULL DEFAULT 0,
    place_order     TEXT CHECK (place_order IN ('ordinal', 'arrival')), -- what a place is; NULL: not settled
    num_prompts     INTEGER NOT NULL DEFAULT 0, -- known
    next_ordinal    INTEGER NOT NULL DEFAULT 0, -- the first prompt that was never leased
    closed          INTEGER NOT NULL DEFAULT 0, -- the stream has ended
    committed       INTEGER NOT NULL DEFAULT 0, -- samples, ever
    next_generation INTEGER NOT NULL DEFAULT 1,
    trained_step    INTEGER NOT NULL DEFAULT 0, -- the last step acked since the head, or the head's own
    started_step    INTEGER,                    -- begun, and neither acked nor left
    archived_step   INTEGER NOT NULL DEFAULT 0, -- no recovery goes back behind it
    archived_place  INTEGER NOT NULL DEFAULT 0, -- no consumer reads the log below it any more
    archived        INTEGER NOT NULL DEFAULT 0  -- samples that have no row any more
);
INSERT INTO run (id) VALUES (1);

CREATE TABLE fact (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

-- 'consumer', or 'producer:' and a worker's name. The last operation of the epoch and its result, as JSON.
CREATE TABLE role (
    name    TEXT PRIMARY KEY,
    epoch   INTEGER NOT NULL,
    holder  TEXT NOT NULL,
    last_op INTEGER NOT NULL DEFAULT 0,
    result  TEXT NOT NULL DEFAULT 'null'
) WITHOUT ROWID;

-- The prompts known, in blocks that follow each other.
CREATE TABLE source (
    first  INTEGER PRIMARY KEY,
    count  INTEGER NOT NULL,
    digest TEXT NOT NULL
);

-- Only what is leased, to be captured (again), or failed. `again`: its sample was lost.
CREATE TABLE prompt (
    ordinal INTEGER PRIMARY KEY,
    state   TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'leased', 'failed')),
    again   INTEGER NOT NULL DEFAULT 0,
    worker  TEXT NOT NULL DEFAULT '',
    attempt INTEGER NOT NULL DEFAULT 0,
    deaths  INTEGER NOT NULL DEFAULT 0,
    reason  TEXT NOT NULL DEFAULT ''
);
CREATE INDEX prompt_pending ON prompt (ordinal) WHERE state = 'pending';
CREATE INDEX prompt_open ON prompt (ordinal, state, again) WHERE state != 'failed';

CREATE TABLE intent (
    generation INTEGER PRIMARY KEY,
    sample_id  TEXT NOT NULL,
    bytes      INTEGER NOT NULL,
    ordinal    INTEGER,
    worker     TEXT NOT NULL DEFAULT '',
    revoked    INTEGER NOT NULL DEFAULT 0 -- its bytes are to be deleted
);

CREATE TABLE sample (
    place           INTEGER PRIMARY KEY,
    sample_id       TEXT NOT NULL UNIQUE,
    ordinal         INTEGER, -- of its prompt; the place itself in ordinal order
    state           TEXT NOT NULL DEFAULT 'present'
                    CHECK (state IN ('present', 'lost', 'released', 'quarantined')),
    resident        INTEGER NOT NULL DEFAULT 1, -- the feature store should hold its bytes
    bytes           INTEGER NOT NULL DEFAULT 0,
    generation      INTEGER NOT NULL DEFAULT 0,
    acked           INTEGER NOT NULL DEFAULT 0 CHECK (acked IN (0, 1, 2)), -- no; provisionally; durably
    step            INTEGER, -- of its ack, or that in whose plan it was quarantined
    reason          TEXT NOT NULL DEFAULT '',
    ref             TEXT NOT NULL
);
CREATE INDEX sample_ordinal ON sample (ordinal) WHERE ordinal != place;
CREATE INDEX sample_resident ON sample (place, sample_id, generation, bytes, state, acked, step) WHERE resident;
CREATE INDEX sample_lost ON sample (place) WHERE state = 'lost';
CREATE INDEX sample_quarantined ON sample (place) WHERE state = 'quarantined';
CREATE INDEX sample_provisional ON sample (step) WHERE acked = 1;

CREATE TABLE plan (
    step       INTEGER PRIMARY KEY,
    rev        INTEGER NOT NULL DEFAULT 0,
    sample_ids TEXT NOT NULL, -- JSON
    deaths     INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE checkpoint (
    step            INTEGER PRIMARY KEY,
    name            TEXT NOT NULL,
    manifest_digest TEXT NOT NULL,
    chain           TEXT NOT NULL,
    first_place     INTEGER NOT NULL -- a consumer that resumes from it begins to read the log there
);

-- Steps first..last, as xz-compressed JSON, sha256 of the JSON beside it:
-- [[step, rev, [[place, sample_id, ordinal, finished], ...]], ...]. `finished`: how many are.
CREATE TABLE archive (
    first    INTEGER PRIMARY KEY,
    last     INTEGER NOT NULL,
    finished INTEGER NOT NULL,
    digest   TEXT NOT NULL,
    content  BLOB NOT NULL
);
