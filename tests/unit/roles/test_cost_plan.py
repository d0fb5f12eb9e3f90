"""A plan agrees with the run that follows it, and says what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline.capture.backpressure import Watermarks
from paceline.config.load import load_run_config
from paceline.errors import ConfigError
from paceline.roles import cost_plan as module
from paceline.roles import footprint, wire
from paceline.roles.consumer import consume
from paceline.roles.cost_plan import CostPlan, cost_plan
from paceline.roles.lengths import mean_lengths
from paceline.roles.machine import Gpu, Machine
from paceline.roles.plan import plan_run
from paceline.roles.producer import produce
from paceline.roles.rates import BENCH, Bench, data_sheet, named
from paceline.target.shape import read_shape
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun

TARGETS = Path(__file__).parents[2] / "targets"
LAPTOP = Machine(processors=2, memory_bytes=8 << 30, gpus=(), bfloat16=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(autouse=True)
def a_laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "this_machine", lambda: LAPTOP)


def planned(run: TinyRun, **options: Any) -> CostPlan:
    return cost_plan(load_run_config(run.run_file), **options)


def test_bytes_and_window_are_those_of_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The producer reserves what the plan says, collects as many samples, and no sample is larger; draft and
    checkpoint have their bytes."""
    marks: list[Watermarks] = []

    def recorded(**given: Any) -> Watermarks:
        marks.append(Watermarks(**given))
        return marks[-1]

    monkeypatch.setattr(wire, "Watermarks", recorded)
    narrow = {"method": {"transfer": "float8"}}
    run = TinyRun(tmp_path / "run", model, **narrow)
    found = planned(run)
    assert found.fits, found.findings
    run.work_here(produce)
    [mark] = marks
    assert mark.group_bytes == found.sample.bytes_max * found.window.group_samples
    assert mark.window_samples == found.window.collected_samples
    assert mark.budget_bytes == found.window.budget_bytes
    ledger = run.ledger()
    captured = ledger.snapshot()
    ledger.close()
    assert captured.committed == found.run.samples
    a_sample = captured.usage.resident_bytes / captured.committed
    assert a_sample <= found.sample.bytes_max
    assert a_sample == pytest.approx(found.sample.bytes_about, rel=0.6)
    run.work_here(consume)
    learned = [tensor for name, tensor in run.final_weights().items() if name not in ("d2t", "t2d")]
    assert found.draft.parameters == sum(tensor.numel() for tensor in learned)
    folders = [path for path in (run.directory / "checkpoints").glob("step-*") if path.is_dir()]
    files = sum(path.stat().st_size for path in run.directory.glob("ledger.db*"))
    assert files <= found.disk.ledger_bytes
    real = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert max(real) == pytest.approx(found.disk.checkpoint_bytes, rel=0.1)
    again = planned(TinyRun(tmp_path / "again", model, data={"answers": str(run.directory)}, **narrow))
    assert (again.run.samples, again.sample.answers_known) == (found.run.samples, True)
    assert again.sample.bytes_about == pytest.approx(a_sample, rel=0.25)


def test_the_time_follows_from_the_rates_of_the_run_file(model: Path, tmp_path: Path) -> None:
    """40 samples of up to 12 answer tokens, visited 3 times: the slower side binds, and what would help is
    said."""
    costs = {"capture_tokens_per_s": 6.0, "train_tokens_per_s": 100.0, "measured": "by hand"}
    run = TinyRun(tmp_path / "run", model, costs=costs, training={"passes": 3, "batch_size": 4})
    time = planned(run).time
    assert (time.capture_s, time.training_s) == pytest.approx((40 * 12 / 6, 3 * 40 * 12 / 100))
    assert time.first_s == pytest.approx(8 / 40 * 80)
    assert time.total_s == pytest.approx(80)
    assert (time.binds, time.together) == ("capture", True)
    assert "training.passes up to 16" in time.advice
    assert time.source == "costs of the run file (by hand)"
    slow = TinyRun(tmp_path / "slow", model, costs={**costs, "train_tokens_per_s": 1.0})
    assert planned(slow).time.binds == "training"
    crowded = TinyRun(tmp_path / "crowded", model, costs=costs, machine={"producer_threads": 2})
    turns = planned(crowded)
    assert turns.time.total_s == pytest.approx(80 + 4.8)
    assert any("take turns" in finding.what for finding in turns.findings)
    assert "a lower data.max_answer_tokens and more processors would shorten" in turns.time.advice


def test_on_one_gpu_nothing_costs_no_time(model: Path, tmp_path: Path) -> None:
    """Target and draft share it: a visit more or a producer more only adds to the sum."""
    costs = {"capture_tokens_per_s": 6.0, "train_tokens_per_s": 100.0}
    there = {"device": "cuda:0"}
    run = TinyRun(tmp_path / "run", model, costs=costs, engine=there, training={**there, "passes": 3})
    time = planned(run, gpu="RTX 4090").time
    assert not time.together
    assert "fewer training.passes and another GPU for one of them would shorten the run" in time.advice
    assert "producers" not in time.advice


def test_a_bench_of_the_same_target_and_method_counts(model: Path, tmp_path: Path) -> None:
    """The run file's own figures come first; a file that is none, or of another target, tells nothing."""
    run = TinyRun(tmp_path / "run", model, costs={"capture_tokens_per_s": 10.0})
    assert planned(run).time.source.startswith("unknown")
    run.directory.mkdir()
    bench = Bench(
        date="2026-11-29",
        machine="a laptop",
        target=named(read_shape(model)),
        method="eagle3",
        dtype="float32",
        capture_tokens_per_s=1.0,
        train_tokens_per_s=20.0,
    )
    path = run.directory / BENCH
    path.write_text(bench.model_dump_json())
    time = planned(run).time
    assert (time.capture_tokens_per_s, time.train_tokens_per_s) == (10.0, 20.0)
    assert time.source == "costs of the run file; paceline bench on a laptop, 2026-11-29"
    for other in (bench.model_copy(update={"target": "another"}).model_dump_json(), "[" * 100_000, "\0"):
        path.write_text(other)
        assert planned(run).time.total_s is None


def test_what_does_not_fit_is_told_with_what_to_change(model: Path, tmp_path: Path) -> None:
    """A budget in which both sides would wait for ever, a device that is not there, too little data."""
    run = TinyRun(
        tmp_path / "run",
        model,
        features={"budget_mib": 1},
        training={"device": "cuda:1"},
        method={"first_samples": 100},
    )
    found = planned(run)
    assert not found.fits
    refused = "\n".join(finding.what for finding in found.findings if finding.refuses)
    assert "features.budget_mib gives 1 MiB" in refused
    assert "consumer is to run on cuda:1, and this machine has no GPU" in refused
    assert any("40 samples, and method.first_samples is 100" in finding.what for finding in found.findings)


@pytest.mark.parametrize(("free_mib", "fits"), [(4096 + 700, True), (4096 + 40, False)])
def test_what_lies_on_one_filesystem_is_added_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_mib: int, fits: bool
) -> None:
    """Features and checkpoints may each fit alone and not together."""
    monkeypatch.setattr(footprint, "free_bytes", lambda _: free_mib << 20)
    features = {"store": "directory", "directory": str(tmp_path), "budget_mib": 4096}
    found = planned(TinyRun(tmp_path / "run", model, features=features))
    assert 40 << 20 < found.disk.total_bytes < 700 << 20
    assert found.fits is fits, found.findings
    if not fits:
        [told] = [finding for finding in found.findings if finding.refuses]
        assert "lie on one filesystem" in told.what


def test_a_ledger_on_a_server_takes_none_of_the_runs_disk(model: Path, tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", model, ledger={"store": "redis", "url": "redis://ledgers:6379/0"})
    assert planned(run).disk.ledger_bytes == 0


def test_a_plan_for_another_machine_leaves_this_one_out(model: Path, tmp_path: Path) -> None:
    """With its GPU's memory and data sheet; a target too large for it is told, an unknown GPU refused."""
    engine = {"name": "vllm", "managed": True, "devices": [0]}
    run = TinyRun(
        tmp_path / "run",
        Path("Qwen/Qwen3-30B-A3B"),
        engine=engine,
        training={"device": "cuda:1"},
        target={"model": "Qwen/Qwen3-30B-A3B", "dtype": "bfloat16"},
        features={"budget_mib": 4096},
    )
    there = {"target_config": TARGETS / "qwen3-30b-a3b"}
    roomy = planned(run, gpu="h200", **there)
    assert roomy.fits, roomy.findings
    assert roomy.time.total_s is not None
    assert "data sheet of H200" in roomy.time.source
    small = planned(run, gpu="RTX 4090", **there)
    assert any("cuda:0 (RTX 4090) has" in finding.what for finding in small.findings if finding.refuses)
    with pytest.raises(ConfigError, match="No data sheet"):
        planned(run, gpu="abacus", **there)
    with pytest.raises(ConfigError, match="cannot be fetched") as caught:
        planned(run)
    assert "--target-config" in caught.value.next


@pytest.mark.parametrize(
    ("args", "device", "fits"),
    [
        ([], "cuda:0", False),
        (["--gpu-memory-utilization", "0.6"], "cuda:0", True),
        (["--gpu-memory-utilization=0.88"], "cuda:0", False),
        (["--gpu_memory_utilization", "0.6"], "cuda:0", True),
        (["--kv-cache-memory-bytes", "20G"], "cuda:0", True),
        ([], "cuda:1", True),
    ],
)
def test_a_server_takes_its_share_of_a_gpu_before_training_does(
    tmp_path: Path, args: list[str], device: str, fits: bool
) -> None:
    """Weights and optimizer together would fit: 8 billion parameters and a draft, on 80 GB."""
    run = TinyRun(
        tmp_path / "run",
        Path("Qwen/Qwen3-8B"),
        engine={"name": "vllm", "managed": True, "devices": [0], "args": args},
        training={"device": device},
        target={"model": "Qwen/Qwen3-8B", "dtype": "bfloat16"},
        features={"budget_mib": 4096},
        method={"draft_vocab_size": 32000},
    )
    found = planned(run, gpu="H100", target_config=TARGETS / "qwen3-8b")
    refused = [finding.what for finding in found.findings if finding.refuses]
    assert found.fits == fits, refused
    assert fits or "The server takes" in refused[0]


def test_a_gpu_is_known_by_its_driver_name() -> None:
    for name, known in (("NVIDIA H200", "H200"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA L40S", "L40S")):
        sheet = data_sheet(name)
        assert sheet is not None
        assert sheet.name == known
    for name in ("Quadro P400", "NVIDIA L40", "NVIDIA RTX A1000 Laptop GPU"):
        assert data_sheet(name) is None


def test_auto_is_the_first_gpu_and_what_the_hardware_multiplies() -> None:
    """As the roles decide it at their start."""
    old, new = (Machine(1, 0, (Gpu("g", 0, capability),), bfloat16=False) for capability in (7.5, 9.0))
    assert (LAPTOP.device("auto"), new.device("auto"), new.device("cpu")) == ("cpu", "cuda:0", "cpu")
    assert [one.dtype("auto", one.device("auto")) for one in (LAPTOP, old, new)] == [
        "float32",
        "float32",
        "bfloat16",
    ]
    assert LAPTOP.dtype("bfloat16", "cpu") == "bfloat16"


def test_gpus_that_nobody_tells_of_refuse_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container without nvidia-smi, or GPUs of another maker."""
    hidden = Machine(2, 8 << 30, (), bfloat16=True, has_unknown_gpus=True)
    monkeypatch.setattr(module, "this_machine", lambda: hidden)
    found = planned(TinyRun(tmp_path / "run", model, training={"device": "cuda:1"}))
    assert found.fits
    assert any("not compared" in finding.what for finding in found.findings)


def test_a_tokenizer_that_fails_leaves_characters(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    run = TinyRun(tmp_path / "run", model)
    config = load_run_config(run.run_file)
    lengths = mean_lengths(plan_run(config).prompts, config.data, tmp_path)
    assert not lengths.tokenizer
    assert lengths.prompt > 1


def test_lengths_are_those_of_the_data(model: Path, tmp_path: Path) -> None:
    """Answers in the data tell how long answers are; without any they are as long as they may be."""
    chats = tmp_path / "chats.jsonl"
    turn = '{"role": "user", "content": "abcdefghij"}, {"role": "assistant", "content": "abcde"}'
    chats.write_text("".join(f'{{"id": "{n}", "messages": [{turn}, {turn}]}}\n' for n in range(5)))
    data = {"path": str(chats), "max_answer_tokens": 64}
    for answers in ("target", "data"):
        run = TinyRun(tmp_path / answers, model, data={**data, "answers": answers})
        config = load_run_config(run.run_file)
        lengths = mean_lengths(plan_run(config).prompts, config.data, model)
        assert (lengths.prompt, lengths.answers) == (30.0, 20.0)
        assert lengths.answers_known
    run = TinyRun(tmp_path / "prompts", model)
    config = load_run_config(run.run_file)
    assert mean_lengths(plan_run(config).prompts, config.data, model).answers == 12


def test_a_plan_of_steps_in_tokens_estimates_them_and_asks_for_room(model: Path, tmp_path: Path) -> None:
    """Of samples however short, and of the one that no longer fits."""
    sizes = {"tokens_per_step": 256, "batch_size": 8, "micro_batch_size": 8}
    run = TinyRun(tmp_path / "run", model, training=sizes, features={"budget_mib": 64})
    found = planned(run)
    assert found.fits, found.findings
    mean = found.sample.prompt_tokens_about + found.sample.answer_tokens_about
    assert found.run.steps == pytest.approx(40 * mean / 256, abs=1)
    assert found.window.collected_samples == 2 * 8 + 256 + 1
    least = -(-found.window.needed_bytes >> 20)
    for budget, fits in ((least + 1, True), (least - 1, False)):
        other = TinyRun(tmp_path / str(budget), model, training=sizes, features={"budget_mib": budget})
        told = planned(other)
        assert told.fits is fits
        assert fits or "tokens_per_step" in told.findings[0].next
