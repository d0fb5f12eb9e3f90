"""Asks the engine for samples, and puts what was captured into the feature store."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from paceline.capture.encoding import EncodedPrompt, Encoding
from paceline.capture.first_answers import CapturedPrompt, token_ids
from paceline.capture.groups import sample_id
from paceline.capture.isolation import CaptureFailedError, as_failure
from paceline.capture.settings import CaptureSettings
from paceline.capture.turns import TurnError, TurnWriter
from paceline.engines.engine import CaptureRequest, TargetEngine
from paceline.errors import ConfigError
from paceline.features.store import FeatureStore
from paceline.types import SampleRef, Tokens, name_of


class Samples:
    def __init__(
        self,
        run_id: str,
        engine: TargetEngine,
        features: FeatureStore,
        settings: CaptureSettings,
        encoding: Encoding,
    ) -> None:
        self._run_id = run_id
        self._engine = engine
        self._features = features
        self._settings = settings
        self._turns = TurnWriter(lambda: encoding.chats, encoding.limits, self._written, settings.too_long)

    def id_of(self, prompt: EncodedPrompt) -> str:
        return sample_id(self._run_id, prompt)

    def capture(self, members: Sequence[EncodedPrompt]) -> list[CapturedPrompt]:
        """Capture these prompts, as they are stored. Raises CaptureFailedError for any error that the input
        may cause."""
        features = self._settings.features
        try:
            asked = self._turns.write(members)
            samples = self._engine.capture([self._request(one) for one in asked], features)
        except TurnError as error:
            may_help = not self._engine.facts.repeats_bits
            raise CaptureFailedError(error, error.reasons, retryable=may_help) from error
        except ConfigError:
            raise
        except Exception as error:
            raise as_failure(error) from error
        return [CapturedPrompt(*pair) for pair in zip(asked, samples, strict=True)]

    def _written(self, prompts: Sequence[EncodedPrompt], turn: int) -> list[tuple[int, ...]]:
        """What the target answers to these prompts in an earlier turn of their chats."""
        features = [feature for feature in self._settings.features if isinstance(feature.source, Tokens)]
        requests = [self._request(prompt, turn) for prompt in prompts]
        captured = self._engine.capture(requests, features)
        tokens = [token_ids(sample, features) for sample in captured]
        return [ids[len(prompt.token_ids) :] for ids, prompt in zip(tokens, prompts, strict=True)]

    def _request(self, prompt: EncodedPrompt, turn: int | None = None) -> CaptureRequest:
        """`turn`: an earlier one of a chat; None: the last one."""
        s = self._settings
        if prompt.is_whole:
            return CaptureRequest(self.id_of(prompt), prompt.token_ids, prompt.spans)
        return CaptureRequest(
            self.id_of(prompt),
            prompt.token_ids,
            prompt.spans,
            max_new_tokens=s.max_answer_tokens,
            temperature=s.temperature_in(prompt.round),
            seed=sample_seed(s.seed, prompt.ordinal, turn),
        )

    def put(self, captured: CapturedPrompt, generations: Mapping[str, int], rendering: str) -> SampleRef:
        """Store a sample under its generation; returns the ref to commit. Raises StoreError."""
        prompt, sample = captured.prompt, captured.sample
        generation = generations[sample.sample_id]
        sealed = self._features.put(sample.sample_id, sample.tensors, generation=generation)
        facts, tokens = self._engine.facts, sample.tensors[name_of(Tokens, self._settings.features)]
        is_written = self._settings.answers == "target"
        return SampleRef(
            sample_id=sample.sample_id,
            run_id=self._run_id,
            source_task_id=prompt.task_id,
            feature_store_uri=sealed.uri,
            feature_keys=sealed.keys,
            feature_specs=sealed.specs,
            strategy=self._settings.strategy,
            num_tokens=int(tokens.shape[0]) - 1,  # that the target processed
            estimated_bytes=sealed.num_bytes,
            target_model_version=facts.model_version,
            tokenizer_version=facts.tokenizer_version,
            metadata={
                "digest": sealed.digest,
                "digest_kind": sealed.digest_kind,
                "rendering": rendering,
                "greedy": is_written and self._settings.temperature_in(prompt.round) == 0.0,
            },
            generation=generation,
            ordinal=prompt.ordinal,
        )


def sample_seed(run_seed: int, ordinal: int, turn: int | None = None) -> int:
    """A different seed for every sample and for every earlier `turn` of a chat, below 2**63."""
    which = f"{run_seed}:{ordinal}" if turn is None else f"{run_seed}:{ordinal}:{turn}"
    digest = hashlib.sha256(which.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
