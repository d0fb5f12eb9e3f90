"""Protocol bugs planted in the scripts of the ledger on a server: the tests must find each.

A mutant is a piece of a script and what stands there instead, for the time of a `with` block. The server
takes it for another version of the scripts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from paceline.ledger.stores.redis import scripts


@dataclass(frozen=True)
class LuaMutant:
    breaks: str
    piece: str
    instead: str = ""

    @contextmanager
    def planted(self) -> Iterator[None]:
        joined = scripts._joined
        whole = joined("", scripts.CHANGES) + joined("", scripts.READING)
        assert self.piece in whole, f"no script holds {self.piece!r} any more"

        def with_bug(first_line: str, parts: tuple[str, ...]) -> str:
            return joined(first_line, parts).replace(self.piece, self.instead)

        try:
            with mock.patch.object(scripts, "_joined", with_bug):
                _forget()
                yield
        finally:
            _forget()


def _forget() -> None:
    scripts.changing.cache_clear()
    scripts.reading.cache_clear()


LUA_MUTANTS: dict[str, LuaMutant] = {
    "fence not checked in one operation": LuaMutant(
        "a zombie consumer's head is taken",
        "if epoch ~= current then",
        "if epoch ~= current and ARGV[1] ~= 'head' then",
    ),
    "a late call is made": LuaMutant(
        "a call happens twice, later", "if op and op < last then", "if false then"
    ),
    "operation number forgotten": LuaMutant("a call happens twice", "redis.call('HSET', KEY.ops, role, op)"),
    "result forgotten": LuaMutant(
        "a repetition gets another answer",
        "redis.call('HSET', KEY.results, role, packed)",
        "redis.call('HSET', KEY.results, role, cmsgpack.pack(NULL))",
    ),
    "numbers outlive the holder": LuaMutant(
        "a new holder's first calls are taken for repetitions", "later('HDEL', KEY.ops, name)"
    ),
    "acquisitions not recognised": LuaMutant(
        "a repeated acquisition fences itself", "later('HSET', KEY.tokens, call, next_epoch)"
    ),
    "epochs stand still": LuaMutant(
        "nobody is ever fenced", "or 0) + 1\n  later('HSET', KEY.epochs", "or 1)\n  later('HSET', KEY.epochs"
    ),
    "prefix read past a hole": LuaMutant(
        "plans depend on which worker was faster",
        "return tonumber(redis.call('ZRANGE', KEY.open, 0, 0)[1] or run.next_ordinal)",
        "return run.next_ordinal",
    ),
    "lease given twice": LuaMutant(
        "two workers capture one prompt",
        "prompt.state == 'pending' and ordinal",
        "prompt.state ~= 'failed' and ordinal",
    ),
    "a neighbour's group is leased": LuaMutant(
        "a group has two workers", "if pair[2] ~= worker then\n      held", "if false then\n      held"
    ),
    "budget not checked where it is reserved": LuaMutant(
        "workers promise more than there is, together", "  if budget then", "  if false then"
    ),
    "reservations not counted": LuaMutant(
        "workers promise more than there is, together",
        "run.resident_bytes + run.reserved_bytes + num_bytes",
        "run.resident_bytes + num_bytes",
    ),
    "intents not checked": LuaMutant(
        "revoked bytes are committed", "intent.worker == worker and not intent.revoked then", "true then"
    ),
    "intents of anybody": LuaMutant(
        "a neighbour's bytes are committed",
        "intent.worker == worker and not intent.revoked then",
        "not intent.revoked then",
    ),
    "a start revokes nobody's intents": LuaMutant(
        "a dead producer's bytes are promised for ever", "intents:change(generation).revoked = true"
    ),
    "a start ends everybody's work": LuaMutant(
        "a neighbour's leases return", "if pair[2] == dead then", "if true then"
    ),
    "acks inherited": LuaMutant(
        "steps of dead weights count", "  undo_provisional_acks()\n  local plan", "  local plan"
    ),
    "acks in any order": LuaMutant("steps are acked twice", "step ~= run.trained_step + 1 or", ""),
    "acks of any revision": LuaMutant(
        "a revised step is acked as it was", " or plan.rev ~= rev then", " then"
    ),
    "the newer plan wins": LuaMutant(
        "a replay trains another step",
        "rev > stored.rev and step > run.trained_step",
        "step > run.trained_step",
    ),
    "a head may be older": LuaMutant(
        "a late checkpoint is head", "if head and checkpoint.step <= head.step then", "if false then"
    ),
    "a head makes nothing durable": LuaMutant(
        "features are kept for ever", "samples:change(id).acked = 2", "samples:change(id).acked = 1"
    ),
    "freed at ack": LuaMutant(
        "features go before the head", "  return sample.acked == 2\nend", "  return sample.acked > 0\nend"
    ),
    "fall back keeps acks": LuaMutant(
        "samples are skipped",
        "sample.acked, sample.step = 0, nil\n    end\n  end\n  for _, id in ipairs(lost)",
        "sample.step = nil\n    end\n  end\n  for _, id in ipairs(lost)",
    ),
    "a durable sample may be lost": LuaMutant(
        "captured again for nothing",
        "if sample and sample.acked < 2 then\n      lose(id)",
        "if sample then\n      lose(id)",
    ),
    "generations reused": LuaMutant(
        "late frees hit new bytes", "run.next_generation + 1\n  end", "run.next_generation\n  end"
    ),
    "the stream ends early": LuaMutant(
        "the last samples are never trained",
        "ended and open == 0 and run.next_ordinal >= run.num_prompts",
        "ended",
    ),
    "a loss is not noticed": LuaMutant(
        "a client goes on with a ledger that lost its changes", "return lsn > run.lsn", "return false"
    ),
    "a loss under a former process is not noticed": LuaMutant(
        "others went on, and hid it",
        "return lsn > (following and cmsgpack.unpack(following)[2] or run.lsn)",
        "return false",
    ),
    "another ledger is taken for this one": LuaMutant(
        "a client goes on with a new ledger under the name", "identity ~= run.identity then", "false then"
    ),
    "a refusal leaves half a change": LuaMutant(
        "samples of a refused commit are there",
        "refuse('other_place', sample_id, ordinal, 'too_far'",
        "write() refuse('other_place', sample_id, ordinal, 'too_far'",
    ),
}
