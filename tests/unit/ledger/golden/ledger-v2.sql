-- A ledger as schema version 2 left it: that of version 1, migrated, with an intent and its operation.
BEGIN TRANSACTION;
CREATE TABLE ack (
    sample_id TEXT PRIMARY KEY,
    step      INTEGER,
    durable   INTEGER NOT NULL
) WITHOUT ROWID;
INSERT INTO ack VALUES('run0:s0',1,1);
INSERT INTO ack VALUES('run0:s1',1,1);
INSERT INTO ack VALUES('run0:s2',2,1);
INSERT INTO ack VALUES('run0:s3',2,1);
CREATE INDEX ack_provisional ON ack (step) WHERE durable = 0;
CREATE TABLE checkpoint (
    step            INTEGER PRIMARY KEY,
    name            TEXT NOT NULL,
    manifest_digest TEXT NOT NULL,
    last_seq        INTEGER NOT NULL,
    chain           TEXT NOT NULL DEFAULT ''
);
INSERT INTO checkpoint VALUES(1,'step-1','digest-1',2,'');
INSERT INTO checkpoint VALUES(2,'step-2','digest-2',4,'');
CREATE TABLE fact (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO fact VALUES('run_id','"run0"');
CREATE TABLE folded (
    kind    TEXT NOT NULL CHECK (kind IN ('tasks', 'samples', 'steps')),
    first   INTEGER NOT NULL,
    last    INTEGER NOT NULL,
    digest  TEXT NOT NULL,
    content BLOB,
    PRIMARY KEY (kind, first)
);
INSERT INTO folded VALUES('tasks',0,8,'c9476045bf61266d6bb54c1e4beba41c76c4915886b537e372d14832364a75cb',X'FD377A585A000004E6D6B4460200210116000000742FE5A3E0005900225D002D888A8613D101ED634E29ACDA83B79DB21FF887B683F6079F96064AE6419CE6EC00000000B671A22589B2E06E00013E5ABC16FDEA1FB6F37D010000000004595A');
CREATE TABLE intent (
    generation INTEGER PRIMARY KEY,
    sample_id  TEXT NOT NULL,
    bytes      INTEGER NOT NULL
);
INSERT INTO intent VALUES(1,'run0:s8',9);
CREATE TABLE operation (
    op_id  TEXT PRIMARY KEY,
    lsn    INTEGER NOT NULL,
    result TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO operation VALUES('op-a',20,'{"run0:s8":1}');
CREATE INDEX operation_age ON operation (lsn);
CREATE TABLE plan (
    step       INTEGER PRIMARY KEY,
    rev        INTEGER NOT NULL DEFAULT 0,
    sample_ids TEXT NOT NULL, -- JSON
    last_seq   INTEGER NOT NULL,
    deaths     INTEGER NOT NULL DEFAULT 0
);
INSERT INTO "plan" VALUES(2,0,'["run0:s2", "run0:s3"]',4,0);
INSERT INTO "plan" VALUES(3,0,'["run0:s4", "run0:s5"]',6,0);
CREATE TABLE role (
    name   TEXT PRIMARY KEY,
    epoch  INTEGER NOT NULL,
    holder TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO role VALUES('consumer',1,'host:2');
INSERT INTO role VALUES('producer',1,'host:1');
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
INSERT INTO run VALUES(1,20,6,9,8,2,2,NULL,1,0);
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
INSERT INTO sample VALUES(1,'run0:s0','task-0',0,'released',0,100,0,NULL,'','{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{},"feature_specs":{},"feature_store_uri":"mem://run0","metadata":{},"num_tokens":4,"run_id":"run0","sample_id":"run0:s0","schema_version":1,"source_task_id":"task-0","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
INSERT INTO sample VALUES(2,'run0:s1','task-1',1,'released',0,100,0,NULL,'','{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{},"feature_specs":{},"feature_store_uri":"mem://run0","metadata":{},"num_tokens":4,"run_id":"run0","sample_id":"run0:s1","schema_version":1,"source_task_id":"task-1","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
INSERT INTO sample VALUES(3,'run0:s2','task-2',2,'present',1,100,0,NULL,'','{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{"hidden_states":"run0:s2/hidden_states"},"feature_specs":{"hidden_states":{"device_hint":null,"dtype":"float32","name":"hidden_states","required":true,"shape":[4,8],"target_meta":{},"target_repr":null}},"feature_store_uri":"mem://run0","metadata":{"digest":"00000000000000000000000000000002"},"num_tokens":4,"run_id":"run0","sample_id":"run0:s2","schema_version":1,"source_task_id":"task-2","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
INSERT INTO sample VALUES(4,'run0:s3','task-3',3,'present',1,100,0,NULL,'','{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{"hidden_states":"run0:s3/hidden_states"},"feature_specs":{"hidden_states":{"device_hint":null,"dtype":"float32","name":"hidden_states","required":true,"shape":[4,8],"target_meta":{},"target_repr":null}},"feature_store_uri":"mem://run0","metadata":{"digest":"00000000000000000000000000000003"},"num_tokens":4,"run_id":"run0","sample_id":"run0:s3","schema_version":1,"source_task_id":"task-3","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
INSERT INTO sample VALUES(5,'run0:s4','task-4',4,'present',1,100,0,NULL,'','{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{"hidden_states":"run0:s4/hidden_states"},"feature_specs":{"hidden_states":{"device_hint":null,"dtype":"float32","name":"hidden_states","required":true,"shape":[4,8],"target_meta":{},"target_repr":null}},"feature_store_uri":"mem://run0","metadata":{"digest":"00000000000000000000000000000004"},"num_tokens":4,"run_id":"run0","sample_id":"run0:s4","schema_version":1,"source_task_id":"task-4","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
INSERT INTO sample VALUES(6,'run0:s5','task-5',5,'lost',0,100,0,NULL,'','{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{"hidden_states":"run0:s5/hidden_states"},"feature_specs":{"hidden_states":{"device_hint":null,"dtype":"float32","name":"hidden_states","required":true,"shape":[4,8],"target_meta":{},"target_repr":null}},"feature_store_uri":"mem://run0","metadata":{"digest":"00000000000000000000000000000005"},"num_tokens":4,"run_id":"run0","sample_id":"run0:s5","schema_version":1,"source_task_id":"task-5","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
CREATE INDEX sample_open ON sample (state, seq, sample_id) WHERE state IN ('present', 'lost', 'quarantined');
CREATE INDEX sample_ordinal ON sample (ordinal);
CREATE INDEX sample_resident ON sample (seq, sample_id, generation, bytes) WHERE resident;
CREATE INDEX sample_task ON sample (task_id) WHERE state = 'lost';
CREATE TABLE task (
    ordinal INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL UNIQUE,
    state   TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'leased', 'done', 'failed')),
    holder  TEXT NOT NULL DEFAULT '',
    attempt INTEGER NOT NULL DEFAULT 0,
    deaths  INTEGER NOT NULL DEFAULT 0,
    reason  TEXT NOT NULL DEFAULT ''
);
INSERT INTO task VALUES(5,'task-5','pending','',0,0,'');
INSERT INTO task VALUES(6,'task-6','failed','',1,0,'too long');
INSERT INTO task VALUES(7,'task-7','leased','producer-0',0,0,'');
CREATE INDEX task_state ON task (state, ordinal);
pragma user_version=2;
pragma application_id=1346454341;
COMMIT TRANSACTION;
