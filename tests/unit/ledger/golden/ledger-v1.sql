-- A ledger as Paceline 0.1.0 left it: schema version 1, two checkpoints, one lost and one failed.
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
    last_seq        INTEGER NOT NULL
);
INSERT INTO checkpoint VALUES(1,'step-1','digest-1',2);
INSERT INTO checkpoint VALUES(2,'step-2','digest-2',4);
CREATE TABLE fact (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO fact VALUES('run_id','"run0"');
CREATE TABLE plan (
    step       INTEGER PRIMARY KEY,
    sample_ids TEXT NOT NULL,
    last_seq   INTEGER NOT NULL
);
INSERT INTO "plan" VALUES(2,'["run0:s2", "run0:s3"]',4);
INSERT INTO "plan" VALUES(3,'["run0:s4", "run0:s5"]',6);
CREATE TABLE role (
    name   TEXT PRIMARY KEY,
    epoch  INTEGER NOT NULL,
    holder TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO role VALUES('consumer',1,'host:2');
INSERT INTO role VALUES('producer',1,'host:1');
CREATE TABLE run (
    id  INTEGER PRIMARY KEY CHECK (id = 1),
    lsn INTEGER NOT NULL
);
INSERT INTO run VALUES(1,19);
CREATE TABLE sample (
    seq       INTEGER PRIMARY KEY,
    sample_id TEXT NOT NULL UNIQUE,
    task_id   TEXT,
    state     TEXT NOT NULL DEFAULT 'present' CHECK (state IN ('present', 'lost', 'released')),
    bytes     INTEGER NOT NULL,
    compacted INTEGER NOT NULL DEFAULT 0,
    ref       TEXT NOT NULL
);
INSERT INTO sample VALUES(1,'run0:s0','task-0','released',100,1,'{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{},"feature_specs":{},"feature_store_uri":"mem://run0","metadata":{},"num_tokens":4,"run_id":"run0","sample_id":"run0:s0","schema_version":1,"source_task_id":"task-0","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
INSERT INTO sample VALUES(2,'run0:s1','task-1','released',100,1,'{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{},"feature_specs":{},"feature_store_uri":"mem://run0","metadata":{},"num_tokens":4,"run_id":"run0","sample_id":"run0:s1","schema_version":1,"source_task_id":"task-1","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
INSERT INTO sample VALUES(3,'run0:s2','task-2','present',100,0,'{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{"hidden_states":"run0:s2/hidden_states"},"feature_specs":{"hidden_states":{"device_hint":null,"dtype":"float32","name":"hidden_states","required":true,"shape":[4,8],"target_meta":{},"target_repr":null}},"feature_store_uri":"mem://run0","metadata":{"digest":"00000000000000000000000000000002"},"num_tokens":4,"run_id":"run0","sample_id":"run0:s2","schema_version":1,"source_task_id":"task-2","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
INSERT INTO sample VALUES(4,'run0:s3','task-3','present',100,0,'{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{"hidden_states":"run0:s3/hidden_states"},"feature_specs":{"hidden_states":{"device_hint":null,"dtype":"float32","name":"hidden_states","required":true,"shape":[4,8],"target_meta":{},"target_repr":null}},"feature_store_uri":"mem://run0","metadata":{"digest":"00000000000000000000000000000003"},"num_tokens":4,"run_id":"run0","sample_id":"run0:s3","schema_version":1,"source_task_id":"task-3","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
INSERT INTO sample VALUES(5,'run0:s4','task-4','present',100,0,'{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{"hidden_states":"run0:s4/hidden_states"},"feature_specs":{"hidden_states":{"device_hint":null,"dtype":"float32","name":"hidden_states","required":true,"shape":[4,8],"target_meta":{},"target_repr":null}},"feature_store_uri":"mem://run0","metadata":{"digest":"00000000000000000000000000000004"},"num_tokens":4,"run_id":"run0","sample_id":"run0:s4","schema_version":1,"source_task_id":"task-4","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
INSERT INTO sample VALUES(6,'run0:s5','task-5','lost',100,0,'{"draft_weight_version":null,"estimated_bytes":100,"feature_keys":{"hidden_states":"run0:s5/hidden_states"},"feature_specs":{"hidden_states":{"device_hint":null,"dtype":"float32","name":"hidden_states","required":true,"shape":[4,8],"target_meta":{},"target_repr":null}},"feature_store_uri":"mem://run0","metadata":{"digest":"00000000000000000000000000000005"},"num_tokens":4,"run_id":"run0","sample_id":"run0:s5","schema_version":1,"source_task_id":"task-5","strategy":"eagle3","target_model_version":"unknown","tokenizer_version":"unknown"}');
CREATE INDEX sample_uncompacted ON sample (seq) WHERE state = 'released' AND NOT compacted;
CREATE INDEX sample_unreleased ON sample (seq, state, sample_id, bytes) WHERE state != 'released';
CREATE TABLE task (
    ordinal INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL UNIQUE,
    state   TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'leased', 'done', 'failed')),
    holder  TEXT NOT NULL DEFAULT '',
    attempt INTEGER NOT NULL DEFAULT 0,
    reason  TEXT NOT NULL DEFAULT ''
);
INSERT INTO task VALUES(0,'task-0','done','',0,'');
INSERT INTO task VALUES(1,'task-1','done','',0,'');
INSERT INTO task VALUES(2,'task-2','done','',0,'');
INSERT INTO task VALUES(3,'task-3','done','',0,'');
INSERT INTO task VALUES(4,'task-4','done','',0,'');
INSERT INTO task VALUES(5,'task-5','pending','',0,'');
INSERT INTO task VALUES(6,'task-6','failed','',1,'too long');
INSERT INTO task VALUES(7,'task-7','leased','producer-0',0,'');
INSERT INTO task VALUES(8,'task-8','pending','',0,'');
CREATE INDEX task_open ON task (state, ordinal) WHERE state IN ('pending', 'leased', 'failed');
pragma user_version=1;
pragma application_id=1346454341;
COMMIT TRANSACTION;
