-- Schema version 3. What nobody will ask again has no row: a prompt below run.next_ordinal without a
-- row is done, one at or above it is pending, and trained samples and plans up to the oldest checkpoint
-- kept are folded. So the tables are as large as what is in flight, however long the run is.

CREATE TABLE run (
    id              INTEGER PRIMARY KEY CHECK (id = 1),
    lsn             INTEGER NOT NULL DEFAULT 0,
    last_seq        INTEGER NOT NULL DEFAULT 0, -- samples committed, ever
    num_tasks       INTEGER NOT NULL DEFAULT 0, -- prompts known, ever
    next_ordinal    INTEGER NOT NULL DEFAULT 0, -- the first prompt that was never leased
    next_generation INTEGER NOT NULL DEFAULT 1,
    trained_step    INTEGER NOT NULL DEFAULT 0, -- the last step acked since the head, or the head's own
    started_step    INTEGER,                    -- begun, and neither acked nor left
    folded_step     INTEGER NOT NULL DEFAULT 0,
    folded_seq      INTEGER NOT NULL DEFAULT 0  -- no folded sample has a higher seq
);
INSERT INTO run (id) VALUES (1);

CREATE TABLE fact (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE role (
    name   TEXT PRIMARY KEY,
    epoch  INTEGER NOT NULL,
    holder TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE operation (
    op_id  TEXT PRIMARY KEY,
    lsn    INTEGER NOT NULL,
    result TEXT NOT NULL
) WITHOUT ROWID;

-- 'done' only for a prompt at or above run.next_ordinal.
CREATE TABLE task (
    ordinal INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL UNIQUE,
    state   TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'leased', 'done', 'failed')),
    holder  TEXT NOT NULL DEFAULT '',
    attempt INTEGER NOT NULL DEFAULT 0,
    deaths  INTEGER NOT NULL DEFAULT 0,
    reason  TEXT NOT NULL DEFAULT ''
);
-- Not of 'leased': a lease that goes well enters none of them.
CREATE INDEX task_pending ON task (ordinal) WHERE state = 'pending';
CREATE INDEX task_done ON task (ordinal) WHERE state = 'done';
CREATE INDEX task_failed ON task (ordinal) WHERE state = 'failed';

CREATE TABLE intent (
    generation INTEGER PRIMARY KEY,
    sample_id  TEXT NOT NULL,
    bytes      INTEGER NOT NULL
);

CREATE TABLE sample (
    seq             INTEGER PRIMARY KEY,
    sample_id       TEXT NOT NULL UNIQUE,
    task_id         TEXT,
    ordinal         INTEGER, -- of its prompt, if the ledger knows that
    state           TEXT NOT NULL DEFAULT 'present'
                    CHECK (state IN ('present', 'lost', 'released', 'quarantined')),
    resident        INTEGER NOT NULL DEFAULT 1, -- the feature store should hold its bytes
    bytes           INTEGER NOT NULL,
    generation      INTEGER NOT NULL DEFAULT 0,
    quarantine_step INTEGER,
    reason          TEXT NOT NULL DEFAULT '',
    ref             TEXT NOT NULL
);
CREATE INDEX sample_resident ON sample (seq, sample_id, generation, bytes, state, resident) WHERE resident;
CREATE INDEX sample_lost ON sample (seq, sample_id) WHERE state = 'lost';
CREATE INDEX sample_lost_task ON sample (task_id) WHERE state = 'lost';
CREATE INDEX sample_quarantined ON sample (seq, sample_id) WHERE state = 'quarantined';

CREATE TABLE ack (
    sample_id TEXT PRIMARY KEY,
    step      INTEGER,
    durable   INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX ack_provisional ON ack (step) WHERE durable = 0;

CREATE TABLE plan (
    step       INTEGER PRIMARY KEY,
    rev        INTEGER NOT NULL DEFAULT 0,
    sample_ids TEXT NOT NULL, -- JSON
    last_seq   INTEGER NOT NULL,
    deaths     INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE checkpoint (
    step            INTEGER PRIMARY KEY,
    name            TEXT NOT NULL,
    manifest_digest TEXT NOT NULL,
    last_seq        INTEGER NOT NULL,
    chain           TEXT NOT NULL DEFAULT ''
);

-- Folded history, xz-compressed JSON, sha256 of the JSON beside it. kind 'tasks': the ids of prompts
-- first..last (content NULL once every one of them is history itself); 'samples': columns of samples
-- whose seqs lie in first..last; 'steps': [step, rev, last_seq, [seq, ...]] of first..last.
CREATE TABLE folded (
    kind    TEXT NOT NULL CHECK (kind IN ('tasks', 'samples', 'steps')),
    first   INTEGER NOT NULL,
    last    INTEGER NOT NULL,
    digest  TEXT NOT NULL,
    content BLOB,
    PRIMARY KEY (kind, first)
);
