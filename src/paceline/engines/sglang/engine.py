"""The engine that lets an SGLang server run the target.

States come by one of two ways. SGLang's own answers hold those of the layers that it was started with, as
lists of numbers: enough for small runs of methods that need no state after the last block. With the plug-in
(sink.py) the server writes them, and that state too, to files of a folder that both share.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cached_property

import torch

from paceline.engines.capture_rows import is_sound
from paceline.engines.engine import CaptureRequest
from paceline.engines.served.engine import ServedEngine, served_facts
from paceline.engines.served.http import Http, Wish, key_of
from paceline.engines.served.own_files import own_prefix
from paceline.engines.served.probe import Look, why_no_reference
from paceline.engines.settings import EngineRun
from paceline.engines.sglang.command import aux_layers, layer_ids
from paceline.engines.sglang.files import SinkFiles
from paceline.engines.sglang.settings import SglangSection
from paceline.engines.sglang.wire import Answer, Client, ServerInfo, states_of
from paceline.engines.transformers import TransformersEngine
from paceline.errors import ConfigError, EngineError
from paceline.target.settings import TargetSection

FILE_WAIT_S = 60.0
AGAIN = "start the server as `paceline engine sglang RUN.yaml` prints."


class SglangEngine(ServedEngine):
    _section: SglangSection

    def __init__(self, section: SglangSection, target: TargetSection, run: EngineRun) -> None:
        """Raises ConfigError for a method whose layers the server cannot give."""
        facts = served_facts(target, section.name)
        last = facts.num_hidden_layers
        aux = aux_layers(section, run.features(facts), last)
        self._layer_ids = layer_ids(aux, last)
        layers = aux if section.directory is None else (*aux, last)
        super().__init__(section, target, run, layers, where=section.url)
        skips = section.reference == "skip"
        without = "engine.reference is skip" if skips else why_no_reference(target.model)
        if section.directory is None and without:
            raise ConfigError(
                f"The target cannot be compared with itself in this process: {without}.",
                why="Without the state after the last block only the model itself can prove the text.",
                next="set engine.directory and start the server with Paceline's plug-in (docs/sglang.md).",
            )
        self._prefix = own_prefix(run.directory)
        http = Http(section.url, key_of(section.api_key_variable), should_stop=self._stops)
        self._client = Client(http, timeout_s=section.timeout_s)
        self._info: ServerInfo | None = None
        self._files: SinkFiles | None = None
        if section.directory is not None:
            wait_s = min(section.timeout_s, FILE_WAIT_S)
            shape = (layers, facts.hidden_size, self._dtype)
            self._files = SinkFiles(
                section.directory, *shape, prefix=self._prefix, wait_s=wait_s, should_stop=self._stops
            )

    @classmethod
    def of_run(cls, section: SglangSection, target: TargetSection, run: EngineRun) -> SglangEngine:
        return cls(section, target, run)

    # -- capture ---------------------------------------------------------------------------

    def _look(self, request: CaptureRequest, logprobs: bool = False) -> Look:
        if not request.max_new_tokens:
            _, states = self._exchange(Wish(request.processed, 1), request.sample_id)
            return Look(request, request.token_ids, states)
        done, states = self._exchange(self._wish(request, logprobs=logprobs), request.sample_id)
        tokens = self._all_tokens(request, done.token_ids)
        # SGLang tells log probabilities at the asked temperature, where there is one.
        told = () if request.temperature else done.logprobs
        return Look(request, tokens, states, told)

    def _read(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        return self._exchange(Wish(token_ids, 1), "")[1]

    def _exchange(self, wish: Wish, sample_id: str) -> tuple[Answer, torch.Tensor]:
        """The answer, and the states [T, layers, H] of all its tokens but the last."""
        name = self._request_id(wish, sample_id)
        if self._files is not None:
            self._files.clear(name)
        done = self._client.generate(wish, name)
        tokens = (*wish.token_ids, *done.token_ids)
        if self._files is None:
            shape = (len(tokens) - 1, len(self._layers), self._facts.hidden_size)
            states = states_of(done.states, shape, self._dtype)
        elif done.states:
            raise EngineError(
                "The server answered with states of its own, and wrote no file.",
                why="Paceline's plug-in is not loaded, and only it gives the state after the last block.",
                next="install paceline beside it, name it in SGLANG_PLUGINS if that is set, and " + AGAIN,
            )
        else:
            states = self._files.take(name, tokens)
        if not is_sound(states):
            raise EngineError(
                f"The server gave states for {sample_id or 'a text'} that are not finite, or all zero.",
                why="Training on them would destroy the draft's weights; they were dropped.",
                next="try target.dtype: float32, remove the prompt, or another version of the server.",
            )
        self._answered()
        return done, states

    def _request_id(self, wish: Wish, sample_id: str) -> str:
        """The same for the same request of the same run, so that a repeated one overwrites its file."""
        known = repr((sample_id, wish)).encode()
        return self._prefix + hashlib.blake2b(known, digest_size=10).hexdigest()

    def _remove_files(self) -> None:
        if self._files is not None:
            self._files.sweep(older_than_s=2 * self._section.timeout_s + FILE_WAIT_S)

    # -- the server ------------------------------------------------------------------------

    def _connect(self, silent_s: float) -> None:  # noqa: ARG002 (it is the user's to start)
        self._client.http.check_health()
        info = self._info = self._client.info()
        if list(info.layer_ids or ()) != self._layer_ids:
            told = f"the layers {list(info.layer_ids)}" if info.layer_ids else "no layers that were named"
            raise EngineError(
                f"The server captures {told}; the method needs {self._layer_ids}, in SGLang's numbers.",
                why="A server captures the layers that it was started with.",
                next=AGAIN,
            )
        leaves_out = "keeps prefixes of prompts" if info.caches_prefixes else ""
        if info.chunk_tokens and self._files is None:
            leaves_out = f"reads prompts in chunks of {info.chunk_tokens} tokens"
        if leaves_out:
            why = "Its answers hold no states of those tokens."
            raise EngineError(f"The server {leaves_out}.", why=why, next=AGAIN)
        most = self._facts.max_positions
        if info.max_tokens is not None and (most is None or info.max_tokens < most):
            self._facts = replace(self._facts, max_positions=info.max_tokens)

    def _version(self) -> str:
        return f"SGLang {self._info.version if self._info else 'unknown'}"

    # -- probe -----------------------------------------------------------------------------

    @cached_property
    def _own(self) -> TransformersEngine:
        return super()._reference()

    def _reference(self) -> TransformersEngine:
        return self._own

    def _provable(self, look: Look) -> Look:
        """Without the plug-in, the last layer is that of the model in this process."""
        last = self._facts.num_hidden_layers
        if last in self._layers:
            return look
        own = self._own.plain(list(look.token_ids[:-1])).states[last].to(self._dtype)
        return replace(look, states=torch.cat([look.states, own[:, None]], dim=1))
