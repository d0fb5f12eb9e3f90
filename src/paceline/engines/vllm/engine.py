"""The engine that lets a vLLM server run the target, and reads the hidden states that it leaves in files.

Every prompt of a group is a request of its own, and several groups are in flight: the server batches as it
likes. So a sample's bits depend on what happened to run beside it, and this engine does not promise to repeat
them (`TargetFacts.repeats_bits`): a run keeps its answers, and a lost sample is captured again from its own
tokens. A server that is silent, restarts or fails is waited for; nothing is lost by it. A server that gives
other tokens, other shapes, other states or implausible text stops the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import torch

from paceline.engines.capture_rows import kept_rows, sample_tensors
from paceline.engines.engine import Captured, CaptureRequest
from paceline.engines.settings import EngineRun
from paceline.engines.transformers import TransformersEngine, target_facts
from paceline.engines.vllm.client import Client, NoAnswerError, TryAgainError, Wish, stopped
from paceline.engines.vllm.command import serve_command, served_layers
from paceline.engines.vllm.files import Layout, StateFiles
from paceline.engines.vllm.gate import Gate
from paceline.engines.vllm.probe import (
    Look,
    mismatch,
    probe_requests,
    refuse_other_states,
    refuse_wrong_states,
    refuse_wrong_text,
    same_bits,
    why_no_reference,
)
from paceline.engines.vllm.server import ManagedServer
from paceline.engines.vllm.settings import VllmSection
from paceline.errors import ConfigError, EngineError
from paceline.target.chat_encoder import ChatEncoder
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.target.model import library_config
from paceline.target.settings import TargetSection
from paceline.target.tokenizer import PromptEncoder
from paceline.types import Feature, States

GROUPS_IN_FLIGHT_MAX = 64
TRIES = 3  # of one request, by a server that is there
PAUSE_S = 10.0  # a server may have been restarted in a pause of this length
LOCK_WAIT_S = 60.0
SWEEP_EVERY_S = 60.0
CHECKED_TOKENS = 32  # of one answer of each group


class VllmEngine:
    def __init__(self, section: VllmSection, target: TargetSection, run: EngineRun) -> None:
        """Raises ConfigError or EngineError for a target or settings that it cannot work with."""
        self._section, self._model_folder, self._run = section, target.model, run
        self._is_closing = False
        self._encoder = PromptEncoder(target.model, date=run.date, variables=target.template)
        self._facts = facts = served_facts(target)
        self._dtype: torch.dtype = getattr(torch, facts.dtype)
        self._layers = served_layers(run.features(facts), facts.num_hidden_layers)
        self._output = TargetHead.load(target.model).output()
        folder = section.directory or run.files()
        layout = Layout(len(self._layers), facts.hidden_size, self._dtype)
        wait_s = min(section.timeout_s, LOCK_WAIT_S)
        self._files = StateFiles(folder, layout, wait_s=wait_s, should_stop=self._stops)
        self._server = self._managed() if section.managed else None
        self._client = self._new_client()
        self._gate = Gate(
            self._check,
            where=section.url or "127.0.0.1 (managed)",
            patience_s=section.patience_s,
            should_stop=self._stops,
            report=run.report,
        )
        self._model = ""
        self._witness: list[Look] = []  # what the server gave when it was compared with the model
        self._pool = ThreadPoolExecutor(section.requests_in_flight, "paceline-vllm")
        self._checked = count()
        self._answered_at = self._swept_at = 0.0

    @classmethod
    def of_run(cls, section: VllmSection, target: TargetSection, run: EngineRun) -> VllmEngine:
        return cls(section, target, run)

    @property
    def facts(self) -> TargetFacts:
        return self._facts

    @property
    def chats(self) -> ChatEncoder:
        return ChatEncoder(self._encoder, self._model_folder)

    def encode(self, prompt: str) -> tuple[int, ...]:
        return self._encoder.encode(prompt)

    def close(self) -> None:
        """End a managed server, and remove what it has left."""
        self._is_closing = True
        self._pool.shutdown(cancel_futures=True)
        if self._server is not None:
            self._server.stop()
            self._files.sweep()

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
                self._restart_if_stuck(error)
                self._gate.wait(ticket, reason)
        raise EngineError(
            f"The server failed {TRIES} times on {request.sample_id} ({len(request.token_ids)} tokens), the "
            f"last time: {reason}.",
            why="It answers other requests, or answered after a restart.",
            next="read the server's log; if every prompt fails, check its memory and its version.",
        )

    def _look(self, request: CaptureRequest, logprobs: bool = False) -> Look:
        """One exchange: the text, then the file. Older servers leave out the states of what they wrote, so
        the whole text is read again by a second request."""
        if not request.max_new_tokens:
            return Look(request, request.token_ids, self._read(request.processed))
        wish = Wish(
            request.token_ids,
            request.max_new_tokens,
            request.temperature,
            request.seed,
            self._facts.eos_token_ids,
            logprobs=logprobs,
        )
        done = self._client.complete(self._model, wish)
        tokens = (*request.token_ids, *done.token_ids)
        if max(tokens) >= self._facts.vocab_size:
            raise mismatch(f"it wrote token {max(tokens)} of {self._facts.vocab_size}")
        found = self._files.take(done.path, len(tokens))
        states = found.states
        if found.token_ids == request.token_ids and len(done.token_ids) > 1:
            states = self._read(tokens[:-1])
        elif found.token_ids != tokens[:-1]:
            raise mismatch("a file of states holds other tokens than the answer")
        self._answered()
        return Look(request, tokens, states, done.logprobs)

    def _read(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """The states of known tokens, [T, layers, H]."""
        done = self._client.complete(self._model, Wish(token_ids, 1, outputs=False))
        found = self._files.take(done.path, len(token_ids) + 1)
        if found.token_ids != token_ids:
            raise mismatch("a file of states holds other tokens than were sent")
        self._answered()
        return found.states

    def _refuse_other_layers(self, features: Sequence[Feature]) -> None:
        asked = set(served_layers(features, self._facts.num_hidden_layers))
        if missing := sorted(asked - set(self._layers)):
            raise EngineError(
                f"The states after {missing[0]} blocks were requested; the server writes those after "
                f"{', '.join(map(str, self._layers))}.",
                why="A server writes the states that it was started with.",
                next="start the server as `paceline engine vllm RUN.yaml` prints.",
            )

    def _sweep(self) -> None:
        """Remove files of requests that nobody waits for any more, now and then."""
        if time.monotonic() - self._swept_at > SWEEP_EVERY_S:
            self._swept_at = time.monotonic()
            self._files.sweep(older_than_s=2 * self._section.timeout_s + LOCK_WAIT_S)

    # -- the server --------------------------------------------------------------------------

    def _managed(self) -> ManagedServer:
        section, facts = self._section, self._facts
        server = ManagedServer(
            serve_command(
                section,
                self._model_folder,
                facts.dtype,
                self._layers,
                facts.num_hidden_layers,
                self._files.folder,
            ),
            devices=section.devices,
            log=self._run.directory / "logs" / "vllm.log",
            directory=self._run.directory,
            restarts_max=section.restarts_max,
            report=self._run.report,
        )
        server.end_leftover()
        self._files.sweep()
        return server

    def _new_client(self) -> Client:
        section, server = self._section, self._server
        key = server.key if server else _key_of(section.api_key_variable)
        url = server.url if server else section.url or ""
        return Client(url, key, timeout_s=section.timeout_s, should_stop=self._stops)

    def _check(self, silent_s: float) -> None:
        """For the gate: raises unless the server can answer, and is still the one that was probed."""
        if self._server is not None and self._server.ensure(silent_s):
            self._client = self._new_client()
        self._client.check_health()
        if self._server is not None:
            self._server.was_ready()
        self._model, length = self._client.model()
        if length is not None and length < (self._facts.max_positions or length + 1):
            self._facts = replace(self._facts, max_positions=length)
        if self._witness:
            greedy = [look for look in self._witness if not look.request.temperature]
            again = [Look(look.request, look.token_ids, self._read(look.token_ids[:-1])) for look in greedy]
            refuse_other_states(greedy, again, self._output)
            sampled = next(look.request for look in self._witness if look.request.temperature)
            refuse_wrong_text([self._look(sampled)], self._output, self._dtype)

    def _answered(self) -> None:
        self._answered_at = time.monotonic()
        if self._server is not None:
            self._server.answered()

    def _restart_if_stuck(self, error: Exception) -> None:
        """A managed server that answered nothing for as long as a request may take is started again."""
        silent = time.monotonic() - self._answered_at > self._section.timeout_s
        if self._server is not None and silent and getattr(error, "timed_out", False):
            self._server.stop()

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
        refuse_wrong_text(looks, self._output, self._dtype)
        if self._witness:  # the states were compared when this process began
            return
        without = why_no_reference(self._model_folder) if self._section.reference == "auto" else "by choice"
        if not without:
            own = TransformersEngine(self._model_folder, dtype=self._facts.dtype, device="cpu")
            refuse_wrong_states(looks, self._layers, own.plain, self._output)
        turned = self._looks(requests[::-1])
        parts = [look for request in requests for look in self._looks([request])]
        repeats = same_bits(looks, turned) and same_bits(looks, parts)
        self._witness = looks
        self._run.report("note", message=self._told(without, repeats))

    def _check_one(self, look: Look) -> None:
        """One answer of a group must be likely under its own states; a sampler may break at any time."""
        kept = len(look.request.token_ids) + CHECKED_TOKENS
        part = Look(look.request, look.token_ids[:kept], look.states[: kept - 1])
        refuse_wrong_text([part], self._output, self._dtype)

    def _told(self, without: str, repeats: bool) -> str:
        compared = "are the model's own" if not without else f"were not compared with the model's ({without})"
        bits = "the same bits" if repeats else "other bits"
        return (
            f"vLLM {self._client.version()}: its states {compared}; its text is what the target would write; "
            f"probed in another order and one by one, it gave {bits}, which nothing depends on"
        )


def served_facts(target: TargetSection) -> TargetFacts:
    """The facts of the target as a server runs it. Raises ConfigError."""
    dtype = "bfloat16" if target.dtype == "auto" else target.dtype
    facts = target_facts(library_config(target.model), target.model, dtype=dtype, device="vllm")
    return replace(facts, repeats_bits=False, groups_in_flight_max=GROUPS_IN_FLIGHT_MAX)


def _key_of(variable: str | None) -> str:
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise ConfigError(
            f"There is no environment variable {variable}, which engine.api_key_variable names.",
            why="The server answers only who knows its key.",
            next=f"export {variable}=... and run the same command again.",
        )
    return key
