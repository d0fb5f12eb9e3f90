"""The draft inside what wraps modules: data parallel, sharded, compiled. All on the CPU, over loopback."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from paceline.methods.eagle3.method import Eagle3Method
from paceline.testing.forked_commands import ForkedCommands
from paceline.testing.synthetic import HIDDEN, VOCAB, synthetic_head
from paceline.training.settings import TrainerSettings, TrainingSection
from paceline.training.step import accumulate_gradients

METHOD = Eagle3Method({"draft_vocab_size": 24, "ttt_steps": 2, "init": "random"})
SETTINGS = TrainerSettings(None, 1, training=TrainingSection(micro_batch_size=1, grad_clip=0.05))


def _parts() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A draft and four samples, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (9, 14, 6, 11):
        states = torch.randn(length, 4 * HIDDEN, generator=generator)
        samples.append(
            {
                "input_ids": torch.randint(3, VOCAB, (length + 1,), generator=generator).int(),
                "loss_mask": (torch.arange(length + 1) >= 3).to(torch.uint8),
                "aux_hidden_states": states[:, : 3 * HIDDEN].contiguous(),
                "last_hidden_states": states[2:, 3 * HIDDEN :].contiguous(),
            }
        )
    return METHOD.build(synthetic_head(), samples, seed=3), samples


def _gradients(
    draft: nn.Module, samples: list[dict[str, torch.Tensor]], num_tokens: float | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    sums = accumulate_gradients(
        samples,
        draft,
        METHOD,
        SETTINGS,
        what="a test",
        num_tokens=num_tokens,
    )
    found = {
        name.removeprefix("module.").removeprefix("_orig_mod."): parameter.grad
        for name, parameter in draft.named_parameters()
        if parameter.grad is not None
    }
    return found, sums.grad_norm


def _join(rank: int, world: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )


RANK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_wrapped_draft import _train
_train(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
"""


def _train(rank: int, world: int, folder: Path) -> None:
    """One rank of data parallel training; and of one rank alone also the gradients of a sharded draft."""
    _join(rank, world, folder)
    draft, samples = _parts()
    mine = samples[rank::world]
    tokens = torch.tensor(sum(METHOD.collate([sample], torch.device("cpu")).num_tokens for sample in mine))
    distributed.all_reduce(tokens)
    # DDP averages over the ranks.
    found = {"ddp": _gradients(nn.parallel.DistributedDataParallel(draft), mine, float(tokens) / world)}
    if world == 1:
        sharded, _ = _parts()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
        gradients, norm = _gradients(sharded, samples)
        found["fsdp2"] = {name: gradient.full_tensor() for name, gradient in gradients.items()}, norm  # type: ignore[operator]
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_wrapped_drafts_have_the_gradients_of_one_process(
    tmp_path: Path, world: int, forked_commands: ForkedCommands
) -> None:
    """Up to the order of a sum, clipped alike, when divided once by the tokens of all ranks.

    DDP on one rank and on two; FSDP2, which gathers weights and scatters gradients, on a mesh of one.
    """
    draft, samples = _parts()
    wanted, norm = _gradients(draft, samples)
    here = str(Path(__file__).parent)
    ranks = [
        forked_commands.begin(
            [sys.executable, "-c", RANK, str(rank), str(world), str(tmp_path), here], os.environ
        )
        for rank in range(world)
    ]
    for process in ranks:
        with process:
            _, err = process.communicate()
        assert process.returncode == 0, err
    for rank in range(world):
        ways = torch.load(tmp_path / f"rank{rank}.pt")
        assert set(ways) == ({"ddp", "fsdp2"} if world == 1 else {"ddp"})
        for way, (found, its_norm) in ways.items():
            assert found.keys() == wanted.keys(), way
            assert its_norm == pytest.approx(norm, rel=1e-5), way
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def test_a_compiled_draft_has_the_gradients_of_the_plain_one() -> None:
    """Traced by Dynamo and AOTAutograd (no C compiler is asked for)."""
    draft, samples = _parts()
    wanted = {name: gradient.clone() for name, gradient in _gradients(draft, samples[:1])[0].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, _ = _gradients(torch.compile(draft, backend="aot_eager"), samples[:1])  # type: ignore[arg-type]
    torch.compiler.reset()
    assert len(found) == len(wanted)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)
