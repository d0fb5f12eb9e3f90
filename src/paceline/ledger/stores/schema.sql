-- Schema version 1. A row's state is derived wherever it can be: a sample is planned if a plan
-- names it, provisional or durable by its ack, resident while its state is 'present'.

CREATE TABLE run (
    id  INTEGER PRIMARY KEY CHECK (id = 1),
    lsn INTEGER NOT NULL
);
INSERT INTO run VALUES (1, 0);

CREATE TABLE fact (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE role (
    name   TEXT PRIMARY KEY,
    epoch  INTEGER NOT NULL,
    holder TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE task (
    ordinal INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL UNIQUE,
    state   TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'leased', 'done', 'failed')),
    holder  TEXT NOT NULL DEFAULT '',
    attempt INTEGER NOT NULL DEFAULT 0,
    reason  TEXT NOT NULL DEFAULT ''
);
CREATE INDEX task_open ON task (state, ordinal) WHERE state IN ('pending', 'leased', 'failed');

CREATE TABLE sample (
    seq       INTEGER PRIMARY KEY,
    sample_id TEXT NOT NULL UNIQUE,
    task_id   TEXT,
    state     TEXT NOT NULL DEFAULT 'present' CHECK (state IN ('present', 'lost', 'released')),
    bytes     INTEGER NOT NULL,
    compacted INTEGER NOT NULL DEFAULT 0,
    ref       TEXT NOT NULL
);
CREATE INDEX sample_unreleased ON sample (seq, state, sample_id, bytes) WHERE state != 'released';

CREATE INDEX sample_uncompacted ON sample (seq) WHERE state = 'released' AND NOT compacted;

CREATE TABLE ack (
    sample_id TEXT PRIMARY KEY,
    step      INTEGER,
    durable   INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX ack_provisional ON ack (step) WHERE durable = 0;

CREATE TABLE plan (
    step       INTEGER PRIMARY KEY,
    sample_ids TEXT NOT NULL,
    last_seq   INTEGER NOT NULL
);

CREATE TABLE checkpoint (
    step            INTEGER PRIMARY KEY,
    name            TEXT NOT NULL,
    manifest_digest TEXT NOT NULL,
    last_seq        INTEGER NOT NULL
);
