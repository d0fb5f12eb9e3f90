"""`paceline bench`: a short measurement of a run's roles on this machine, which `paceline plan` reads."""

from __future__ import annotations

from pathlib import Path

from paceline.cli.plain import out, say, say_document
from paceline.config.load import load_run_config
from paceline.roles.bench import measure_run


def bench(run_file: Path, seconds: float, *, as_json: bool) -> None:
    """Raises PacelineError."""
    config = load_run_config(run_file)
    if not as_json:
        say(out, f"measuring for about {seconds:.0f} s, after the target is loaded ...")
    kept, found, path = measure_run(run_file, config, seconds)
    if as_json:
        say_document(kept.model_dump(mode="json"))
        return
    say(out, f"target ready after {found.start_s:.0f} s, in {kept.dtype}; {found.samples} samples captured")
    say(out, f"capture  {found.capture_tokens_per_s:,.0f} tokens/s by one producer")
    say(out, f"store    {found.store_mib_per_s:,.0f} MiB/s, digested")
    say(out, f"train    {found.train_tokens_per_s:,.0f} tokens/s to predict, each visit counted")
    say(out, f"kept in {path}. Next: paceline plan {run_file}")
