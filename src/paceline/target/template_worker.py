"""Renders chat templates for a parent process: `python -m paceline.target.template_worker`.

A template is a program in the model's folder. The library's sandbox limits neither its time nor its memory,
and a process cannot stop an endless template that runs inside it. So templates run in this process, which the
kernel kills at the limits. It reads one JSON object per line on stdin and answers each with one on stdout.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, tzinfo
from typing import Any

RENDER_S = 10  # of processor time: a machine that is busy or asleep must not decide about a prompt
MEMORY_BYTES = 2 << 30
TEXT_CHARACTERS_MAX = 16 << 20


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; this process ends with it
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    setting = json.loads(sys.stdin.readline())
    if setting["date"] is not None:
        _stop_the_clock(datetime.fromisoformat(setting["date"]))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, RENDER_S)  # SIGPROF kills this process at the limit
        try:
            answer = _rendered(render_jinja_template, setting, json.loads(line))
        except MemoryError:
            answer = {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
        except Exception as error:  # noqa: BLE001 (whatever a template raises is its parent's to judge)
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _rendered(
    render: Callable[..., Any], setting: Mapping[str, Any], chat: Mapping[str, Any]
) -> dict[str, Any]:
    texts, spans = render(
        conversations=[chat["messages"]],
        tools=chat["tools"] or None,
        chat_template=setting["template"],
        add_generation_prompt=chat["is_open"],
        return_assistant_tokens_mask=setting["marks"],
        **{**setting["special_tokens"], **setting["variables"]},
    )
    if len(texts[0]) > TEXT_CHARACTERS_MAX:
        return {"error": f"it wrote a text of {len(texts[0])} characters"}
    return {"text": texts[0], "spans": spans[0] if spans else []}


def _stop_the_clock(at: datetime) -> None:
    """Fix the date that templates see: `strftime_now` of the library reads the clock through this name."""
    from transformers.utils import chat_template_utils

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return at.astimezone(tz) if tz else at

    chat_template_utils.datetime = Stopped  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
