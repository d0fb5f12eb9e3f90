"""The keys of the facts: small values that the roles record in the ledger for each other."""

RUN_ID = "run_id"
CONFIG = "config"
LEDGER = "ledger"  # its identity, those of ledgers that it replaced, and the run folder that it began for
PROMPTS = "prompts"  # sizes of the set at the start and after each extension, and digests of its blocks
RENDERING = "rendering"  # digest of the first group's token ids
RENDERING_DATE = "rendering_date"  # the date that a chat template writes
ENGINE = "engine"  # its name, and whether it repeats its bits
CHECKPOINT_WANTED = "checkpoint_wanted"
COMPLETED_STEP = "completed_step"
STOPPED_FLAT = "stopped_flat"  # why training ends, or ended, before the stream does
FLAT_AFTER = "flat_after"  # the step after which a curve counts as flat: training went on there
BUILDS_BEGUN = "builds_begun"
DAMAGED_CHECKPOINTS = "given_up"  # identities of recorded checkpoints that were damaged
PROBES_BEGUN = "probes_begun"
QUARANTINED_IN_A_ROW = "quarantined_in_a_row"
FEATURES_LIE = "features_lie"  # where the producer's feature store is
FEATURES_NAME = "features_name"  # of its folder, if another user took the usual name
