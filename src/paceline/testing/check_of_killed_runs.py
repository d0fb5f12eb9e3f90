"""What must hold after a run whose processes were killed and stopped (killed_run.py), whatever happened."""

from __future__ import annotations

from paceline.fsck.checker import check as fsck
from paceline.fsck.checker import check_view
from paceline.fsck.report import Report
from paceline.ledger.records import State
from paceline.ledger.stores.redis import RedisView
from paceline.testing.killed_run import KilledRun, Violation
from paceline.testing.light_run import LightRun, Outcome, head_of
from paceline.training.checkpoint import epoch_of


def check(killed: KilledRun, wanted: Outcome) -> None:
    """The weights, the ledger, and nothing left behind. Raises Violation."""
    run, shape = killed.run, killed.run.shape
    bad = [f"light:{shape.bad_sample}"] if 0 <= shape.bad_sample < shape.prompts else []
    bad = [sample_id for sample_id in bad if shape.bad_sample != shape.bad_prompt]
    ledger = run.open_ledger()
    now = ledger.snapshot()
    prompts, usage = now.prompts, now.usage
    found = head_of(ledger, run.checkpoints)
    records = {record.name for record in now.checkpoints}
    epoch = now.epochs["consumer"]
    losses = {"lose", "reboot", "damage_head"} & {fault.kind for fault in killed.faults}
    facts = {key for key, value in ledger.facts().items() if key.startswith("isolation.") and value}
    quarantined = {sample.place: sample.sample_id for sample in ledger.find(state=State.QUARANTINED).values()}
    visits = [sample for trained in ledger.history() for sample in trained.samples]
    log = quarantined | {sample.place: sample.sample_id for sample in visits}
    left = {
        "weights that differ": found.weights != wanted.weights,
        "steps that differ": found.trained != wanted.trained,
        "lineage that differs": found.chain != wanted.chain,
        "log that differs": [log[place] for place in sorted(log)] != shape.sample_ids,
        "samples not trained to their end": set(shape.sample_ids)
        - {sample.sample_id for sample in visits if sample.finished}
        - set(bad),
        "samples quarantined": set(quarantined.values()) ^ set(bad),
        "prompts failed": set(ledger.failed()) - {shape.bad_prompt} - {int(b[6:]) for b in bad},
        "prompts open": prompts.open,
        "intents": ledger.ownership().promised or ledger.ownership().revoked,
        "bytes on the books": usage.resident_bytes + usage.reserved_bytes + usage.waiting_samples,
        "lost samples": now.lost,
        "features missed that nobody took away": not losses and killed.counts["missed by the consumer"],
        "isolations": facts,
        "what the checker finds": checked(run).errors,
        "features": run.open_features(owner=False).left(),
        "checkpoints missing": records - run.checkpoint_names(),
        # A zombie's last checkpoint, never on record, lies there until the next start sweeps it.
        "folders": [
            name
            for name in run.checkpoint_names() - records
            if not (killed.has_zombies and epoch_of(name) < epoch)
        ],
    }
    ledger.close()
    wrong = {what: value for what, value in left.items() if value}
    if wrong:
        raise Violation(f"after the run: {wrong}")


def checked(run: LightRun) -> Report:
    if not run.server:
        return fsck(run.folder, passes=run.shape.passes)
    view = run.view()
    assert isinstance(view, RedisView)
    report = check_view(view, run.folder)
    view.close()
    return report
