"""The engine that lets a vLLM server run the target, and reads the hidden states that it leaves in files."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace

import torch

from paceline.engines.engine import CaptureRequest
from paceline.engines.served.engine import ServedEngine, served_facts
from paceline.engines.served.http import Http, Wish, key_of
from paceline.engines.served.own_files import own_prefix
from paceline.engines.served.probe import Look, mismatch
from paceline.engines.settings import EngineRun
from paceline.engines.vllm.client import Client, Completion
from paceline.engines.vllm.command import serve_command, served_layers
from paceline.engines.vllm.files import Layout, StateFiles
from paceline.engines.vllm.server import ManagedServer
from paceline.engines.vllm.settings import VllmSection
from paceline.target.settings import TargetSection

LOCK_WAIT_S = 60.0


class VllmEngine(ServedEngine):
    _section: VllmSection

    def __init__(self, section: VllmSection, target: TargetSection, run: EngineRun) -> None:
        """Raises ConfigError or EngineError for a target or settings that it cannot work with."""
        facts = served_facts(target, section.name)
        layers = served_layers(run.features(facts), facts.num_hidden_layers)
        super().__init__(section, target, run, layers, where=section.url or "127.0.0.1 (managed)")
        layout = Layout(len(layers), facts.hidden_size, self._dtype)
        wait_s = min(section.timeout_s, LOCK_WAIT_S)
        folder = section.directory or run.files()
        self._prefix = own_prefix(run.directory)
        self._files = StateFiles(folder, layout, prefix=self._prefix, wait_s=wait_s, should_stop=self._stops)
        self._server = self._managed() if section.managed else None
        self._client = self._new_client()
        self._model = ""

    @classmethod
    def of_run(cls, section: VllmSection, target: TargetSection, run: EngineRun) -> VllmEngine:
        return cls(section, target, run)

    def close(self) -> None:
        """End a managed server, and remove what it has left."""
        super().close()
        if self._server is not None:
            self._server.stop()
            self._files.sweep()

    def _look(self, request: CaptureRequest, logprobs: bool = False) -> Look:
        """The text, then the file. Older servers leave out the states of what they wrote, so the whole text
        is read again by a second request."""
        if not request.max_new_tokens:
            return Look(request, request.token_ids, self._read(request.processed))
        done = self._complete(self._wish(request, logprobs=logprobs))
        tokens = self._all_tokens(request, done.token_ids)
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
        done = self._complete(Wish(token_ids, 1, outputs=False))
        found = self._files.take(done.path, len(token_ids) + 1)
        if found.token_ids != token_ids:
            raise mismatch("a file of states holds other tokens than were sent")
        self._answered()
        return found.states

    def _complete(self, wish: Wish) -> Completion:
        """A repeated request has another id: the server may still answer the first."""
        return self._client.complete(self._model, wish, f"{self._prefix}-{secrets.token_hex(8)}")

    def _remove_files(self) -> None:
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
        key = server.key if server else key_of(section.api_key_variable)
        url = server.url if server else section.url or ""
        return Client(Http(url, key, should_stop=self._stops), timeout_s=section.timeout_s)

    def _connect(self, silent_s: float) -> None:
        if self._server is not None and self._server.ensure(silent_s):
            self._client = self._new_client()
        self._client.http.check_health()
        if self._server is not None:
            self._server.was_ready()
        self._model, length = self._client.model()
        if length is not None and length < (self._facts.max_positions or length + 1):
            self._facts = replace(self._facts, max_positions=length)

    def _version(self) -> str:
        return f"vLLM {self._client.version()}"

    def _answered(self) -> None:
        super()._answered()
        if self._server is not None:
            self._server.answered()

    def _failed(self, error: Exception) -> None:
        """A managed server that answered nothing for as long as a request may take is started again."""
        silent = time.monotonic() - self._answered_at > self._section.timeout_s
        if self._server is not None and silent and getattr(error, "timed_out", False):
            self._server.stop()
