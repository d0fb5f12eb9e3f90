"""What engines have in common whose target runs in a server.

Every prompt of a group is a request of its own, and several groups are in flight: the server batches as it
likes. So a sample's bits depend on what happened to run beside it, and such an engine does not promise to
repeat them (`TargetFacts.repeats_bits`): a run keeps its answers, and a lost sample is captured again from
its own tokens. A server that is silent, restarts or fails is waited for; nothing is lost by it. A server that
gives other tokens, other shapes, other states or implausible text stops the run.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count

import torch

from paceline.engines.capture_rows import kept_rows, sample_tensors
from paceline.engines.engine import Captured, CaptureRequest
from paceline.engines.served.gate import Gate
from paceline.engines.served.http import NoAnswerError, TryAgainError, Wish, stopped
from paceline.engines.served.probe import (
    Look,
    mismatch,
    probe_requests,
    refuse_other_states,
    refuse_wrong_states,
    refuse_wrong_text,
    same_bits,
    why_no_reference,
)
from paceline.engines.served.settings import ServedSection
from paceline.engines.settings import EngineRun
from paceline.engines.transformers import TransformersEngine, target_facts
from paceline.errors import EngineError
from paceline.target.chat_encoder import ChatEncoder
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.target.model import library_config
from paceline.target.settings import TargetSection
from paceline.target.tokenizer import PromptEncoder
from paceline.types import Feature, States, layers_of

GROUPS_IN_FLIGHT_MAX = 64
TRIES = 3  # of one request, by a server that is there
PAUSE_S = 10.0  # a server may have been restarted in a pause of this length
SWEEP_EVERY_S = 60.0
CHECKED_TOKENS = 32  # of one answer of each group


class ServedEngine(ABC):
    """A subclass talks to its kind of server: `_look`, `_read`, `_connect`, `_version`, `_remove_files`."""

    def __init__(
        self,
        section: ServedSection,
        target: TargetSection,
        run: EngineRun,
        layers: Sequence[int],
        *,
        where: str,
    ) -> None:
        """`layers`: those whose states the server gives. `where`: the server's name for people.

        Raises ConfigError or EngineError for a target or settings that it cannot work with.
        """
        self._section, self._model_folder, self._run = section, target.model, run
        self._is_closing = False
        self._encoder = PromptEncoder(target.model, date=run.date, variables=target.template)
        self._facts = served_facts(target, section.name)
        self._dtype: torch.dtype = getattr(torch, self._facts.dtype)
        self._layers = tuple(layers)
        self._output = TargetHead.load(target.model).output()
        self._gate = Gate(
            self._check,
            where=where,
            patience_s=section.patience_s,
            should_stop=self._stops,
            report=run.report,
        )
        self._witness: list[Look] = []  # what the server gave when it was compared with the model
        self._pool = ThreadPoolExecutor(section.requests_in_flight, f"paceline-{section.name}")
        self._checked = count()
        self._answered_at = self._swept_at = 0.0

    @property
    def facts(self) -> TargetFacts:
        return self._facts

    @property
    def chats(self) -> ChatEncoder:
        return ChatEncoder(self._encoder, self._model_folder)

    def encode(self, prompt: str) -> tuple[int, ...]:
        return self._encoder.encode(prompt)

    def close(self) -> None:
        """Send nothing more."""
        self._is_closing = True
        self._pool.shutdown(cancel_futures=True)

    # -- the server of a subclass ----------------------------------------------------------------

    @abstractmethod
    def _look(self, request: CaptureRequest, logprobs: bool = False) -> Look:
        """One exchange: the text and its states. Raises NoAnswerError, TryAgainError, EngineError."""

    @abstractmethod
    def _read(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """The states of known tokens, [T, layers, H]. Raises as `_look` does."""

    @abstractmethod
    def _connect(self, silent_s: float) -> None:
        """Raise NoAnswerError or TryAgainError while the server cannot answer, EngineError if it is not fit.

        `silent_s`: for how long it has not answered.
        """

    @abstractmethod
    def _version(self) -> str:
        """The server's name and release."""

    @abstractmethod
    def _remove_files(self) -> None:
        """Remove files of requests that no producer waits for any more."""

    def _failed(self, error: Exception) -> None:  # noqa: B027 (most have nothing to do)
        """A request got no answer, and the server was not found ready since. Called inside the gate."""

    def _answered(self) -> None:
        """A request got its answer."""
        self._answered_at = time.monotonic()

    def _provable(self, look: Look) -> Look:
        """The look with a last layer that its text can be proved by; most servers give it."""
        return look

    def _wish(self, request: CaptureRequest, *, logprobs: bool) -> Wish:
        return Wish(
            request.token_ids,
            request.max_new_tokens,
            request.temperature,
            request.seed,
            self._facts.eos_token_ids,
            logprobs=logprobs,
        )

    def _all_tokens(self, request: CaptureRequest, written: Sequence[int]) -> tuple[int, ...]:
        """The given and the written tokens. Raises CaptureMismatchError for tokens that the target lacks."""
        tokens = (*request.token_ids, *written)
        if max(tokens) >= self._facts.vocab_size:
            raise mismatch(f"it wrote token {max(tokens)} of {self._facts.vocab_size}")
        return tokens

    # -- capture ---------------------------------------------------------------------------

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        """See `TargetEngine`. Raises ServerUnavailableError if the server stays away, EngineError for a
        request that it cannot answer, CaptureMismatchError if it is not the run's."""
        self._refuse_other_layers(features)
        self._sweep()
        if self._witness and group and time.monotonic() - self._answered_at > PAUSE_S:
            self._gate.wait(self._gate.enter(), "it was not asked for a while")
        looks = self._looks(group)
        if written := [look for look in looks if look.request.max_new_tokens]:
            self._check_one(written[next(self._checked) % len(written)])
        return [self._captured(look, features) for look in looks]

    def _captured(self, look: Look, features: Sequence[Feature]) -> Captured:
        request, tokens = look.request, look.token_ids
        targets, states = request.targets(len(tokens)), {}
        for feature in features:
            if isinstance(feature.source, States):
                columns = [self._layers.index(k) for k in feature.source.layers]
                kept = look.states[kept_rows(feature, targets)][:, columns].flatten(1)
                states[feature.name] = kept.to(getattr(torch, feature.dtype))
        return Captured(request.sample_id, sample_tensors(request, features, tokens, states))

    def _looks(self, requests: Sequence[CaptureRequest], *, logprobs: bool = False) -> list[Look]:
        """Every request answered, in order; after an error nothing more is sent."""
        sent: list[Future[Look]] = [self._pool.submit(self._tried, r, logprobs) for r in requests]
        try:
            return [future.result() for future in sent]
        finally:
            for future in sent:
                future.cancel()

    def _tried(self, request: CaptureRequest, logprobs: bool) -> Look:
        """The answer, after as many tries as a request has."""
        reason = ""
        for attempt in range(TRIES):
            self._pause(attempt)
            ticket = self._gate.enter()
            try:
                return self._look(request, logprobs)
            except (NoAnswerError, TryAgainError) as error:
                reason = str(error)
                self._gate.wait(ticket, reason, partial(self._failed, error))
        raise EngineError(
            f"The server failed {TRIES} times on {request.sample_id} ({len(request.token_ids)} tokens), the "
            f"last time: {reason}.",
            why="It answers other requests, or answered after a restart.",
            next="read the server's log; if every prompt fails, check its memory and its version.",
        )

    def _refuse_other_layers(self, features: Sequence[Feature]) -> None:
        asked = layers_of(features)
        if missing := sorted(asked - set(self._layers)):
            raise EngineError(
                f"The states after {missing[0]} blocks were requested; the server writes those after "
                f"{', '.join(map(str, self._layers))}.",
                why="A server writes the states that it was started with.",
                next=f"start the server as `paceline engine {self._section.name} RUN.yaml` prints.",
            )

    def _sweep(self) -> None:
        """Now and then."""
        if time.monotonic() - self._swept_at > SWEEP_EVERY_S:
            self._swept_at = time.monotonic()
            self._remove_files()

    def _check(self, silent_s: float) -> None:
        """For the gate: raises unless the server can answer, and is still the one that was probed."""
        self._connect(silent_s)
        if self._witness:
            greedy = [look for look in self._witness if not look.request.temperature]
            again = [Look(look.request, look.token_ids, self._read(look.token_ids[:-1])) for look in greedy]
            refuse_other_states(greedy, again, self._output)
            sampled = next(look.request for look in self._witness if look.request.temperature)
            refuse_wrong_text([self._provable(self._look(sampled))], self._output, self._dtype)

    def _stops(self) -> bool:
        return self._is_closing or self._run.should_stop()

    def _pause(self, attempt: int) -> None:
        until = time.monotonic() + attempt
        while (left := until - time.monotonic()) > 0:
            if self._stops():
                raise stopped()
            time.sleep(min(left, 0.25))

    # -- probe -------------------------------------------------------------------------------

    @torch.inference_mode()
    def probe(self) -> None:
        """See `TargetEngine`; probe.py says what is compared. Waits for the server first."""
        self._gate.enter()
        requests = probe_requests(self.encode, self._facts.max_positions)
        looks = self._looks(requests, logprobs=True)
        proved = [self._provable(look) for look in looks]
        refuse_wrong_text(proved, self._output, self._dtype)
        if self._witness:  # the states were compared when this process began
            return
        without = why_no_reference(self._model_folder) if self._section.reference == "auto" else "by choice"
        if not without:
            own = self._reference()
            layers = sorted({*self._layers, self._facts.num_hidden_layers})
            refuse_wrong_states(proved, layers, own.plain, self._output)
        turned = self._looks(requests[::-1])
        parts = [look for request in requests for look in self._looks([request])]
        repeats = same_bits(looks, turned) and same_bits(looks, parts)
        self._witness = looks
        self._run.report("note", message=self._told(without, repeats))

    def _check_one(self, look: Look) -> None:
        """One answer of a group must be likely under its own states; a sampler may break at any time."""
        kept = len(look.request.token_ids) + CHECKED_TOKENS
        part = Look(look.request, look.token_ids[:kept], look.states[: kept - 1])
        refuse_wrong_text([self._provable(part)], self._output, self._dtype)

    def _told(self, without: str, repeats: bool) -> str:
        compared = "are the model's own" if not without else f"were not compared with the model's ({without})"
        bits = "the same bits" if repeats else "other bits"
        return (
            f"{self._version()}: its states {compared}; its text is what the target would write; "
            f"probed in another order and one by one, it gave {bits}, which nothing depends on"
        )

    def _reference(self) -> TransformersEngine:
        """The target in this process."""
        return TransformersEngine(self._model_folder, dtype=self._facts.dtype, device="cpu")


def served_facts(target: TargetSection, engine: str) -> TargetFacts:
    """The facts of the target as a server runs it. Raises ConfigError."""
    dtype = "bfloat16" if target.dtype == "auto" else target.dtype
    facts = target_facts(library_config(target.model), target.model, dtype=dtype, device=engine)
    return replace(facts, repeats_bits=False, groups_in_flight_max=GROUPS_IN_FLIGHT_MAX)
