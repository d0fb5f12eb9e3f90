"""Records that hold token ids, with a mask or spans of the answers among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from paceline.data.prompts import BrokenRecordError, Prompt

IDS = ("prompt_ids", "token_ids", "input_ids")
MASKS = ("loss_mask", "assistant_masks")  # 1 where a token is an answer's
LABELS = "labels"  # the token itself where it is an answer's, else IGNORED
IGNORED = -100


def token_ids(record: Mapping[str, Any]) -> Prompt:
    """{"prompt_ids" | "token_ids" | "input_ids": [...], "loss_mask" | "labels" | "spans": [...]}.

    Raises BrokenRecordError.
    """
    key = next((key for key in IDS if key in record), IDS[0])
    ids = _integers(record.get(key), key)
    if not ids:
        raise BrokenRecordError(f'its "{key}" are empty')
    if min(ids) < 0:
        raise BrokenRecordError(f'its "{key}" are not all at least 0')
    return Prompt("", token_ids=ids, spans=_spans(record, ids))


def _spans(record: Mapping[str, Any], ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    given = [key for key in ("spans", *MASKS, LABELS) if record.get(key) is not None]
    if not given:
        return ()
    if len(given) > 1:
        raise BrokenRecordError("its answers are marked twice", f" ({' and '.join(given)})")
    [key] = given
    if key == "spans":
        return _in_order(record[key], len(ids))
    marks = _integers(record[key], key)
    if len(marks) != len(ids):
        raise BrokenRecordError(f'its "{key}" is not as long as its ids', f" ({len(marks)}, not {len(ids)})")
    if key == LABELS:
        if any(mark not in (IGNORED, token) for mark, token in zip(marks, ids, strict=True)):
            raise BrokenRecordError(f'its "{LABELS}" are neither {IGNORED} nor the ids')
        marks = tuple(int(mark != IGNORED) for mark in marks)
    if not {*marks} <= {0, 1}:
        raise BrokenRecordError(f'its "{key}" holds other values than 0 and 1')
    return _of_mask(marks)


def _of_mask(mask: Sequence[int]) -> tuple[tuple[int, int], ...]:
    found, place = [], 0
    for is_answer, marks in groupby(mask):
        length = len(list(marks))
        if is_answer:
            found.append((place, place + length))
        place += length
    return tuple(found)


def _in_order(given: object, length: int) -> tuple[tuple[int, int], ...]:
    spans = [_integers(span, "spans") for span in given] if isinstance(given, (list, tuple)) else [()]
    ends = [0, *(end for span in spans for end in span), length]
    if any(len(span) != 2 or span[0] >= span[1] for span in spans) or ends != sorted(ends):
        raise BrokenRecordError('its "spans" are not pairs of places in rising order', f" ({given!r:.60})")
    return tuple((span[0], span[1]) for span in spans)


def _integers(given: object, key: str) -> tuple[int, ...]:
    is_list = isinstance(given, (list, tuple))
    if not is_list or not all(type(value) in (int, bool) for value in given):  # type: ignore[attr-defined]
        raise BrokenRecordError(f'its "{key}" is not a list of integers')
    return tuple(int(value) for value in given)  # type: ignore[attr-defined]
