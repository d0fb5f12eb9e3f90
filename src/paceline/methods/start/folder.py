"""The folder of the draft that a run starts from, as far as it is the same for every method. No torch.

Public folders come flat, for vLLM or SGLang, or in the layout of the speculators package, which nests the
sizes of the decoder layers. A checkpoint of a run has a manifest instead, which is read as a flat config.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.parts import parts_of
from paceline.section import Section
from paceline.target.folder import read_json
from paceline.target.layer_ids import EAGLE_IDS
from paceline.target.rope import rope_parameters

CONFIG, MANIFEST, DRAFT = "config.json", "manifest.json", "draft.safetensors"
KIND = "speculators_model_type"
WHY_NOT_HERE = "Paceline's draft does not compute that, so its outputs would be others than the folder's."
BIASES = ("attention_bias", "qkv_bias", "mlp_bias")


@dataclass(frozen=True)
class StartFolder:
    """`config`: config.json, or what a checkpoint's manifest says, by the same names. `drafts`: the file of a
    checkpoint's draft, or its parts in order, each with its SHA-256; () for a public folder."""

    path: Path
    config: Mapping[str, Any]
    drafts: tuple[tuple[str, str], ...] = ()

    @property
    def decoder(self) -> Mapping[str, Any]:
        """The part of the config that describes the decoder layers."""
        nested = self.config.get("transformer_layer_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def is_checkpoint(self) -> bool:
        return bool(self.drafts)

    @property
    def target_version(self) -> str:
        """The digest of the target that the draft was trained for; "" if the folder does not say."""
        return str(_mapping(_mapping(self.config, "paceline"), "target").get("model") or "")

    @property
    def target_name(self) -> str:
        """ "" if the folder does not say."""
        known = _mapping(_mapping(self.config, "paceline"), "target").get("name")
        verifier = _mapping(_mapping(self.config, "speculators_config"), "verifier")
        return str(known or verifier.get("name_or_path") or "")

    def refused(self, reason: str, why: str) -> ConfigError:
        return ConfigError(
            f"A run cannot start from {self.path}: {reason}.",
            why=why,
            next="set method.start_from to another draft of the same method and target, or leave it out.",
        )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what goes wrong with a value of the config into a ConfigError that names it."""
        try:
            yield
        except KeyError as error:
            reason = f"{error} is missing in its {MANIFEST if self.is_checkpoint else CONFIG}"
            raise self.refused(reason, "Its sizes are the draft's.") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise self.refused(str(error), "Its sizes are the draft's.") from error


def read_start_folder(path: Path) -> StartFolder:
    """Raises ConfigError for a folder that is missing, or neither a draft's nor a checkpoint's."""
    if not (path / CONFIG).exists() and (path / MANIFEST).is_file():
        return _of_checkpoint(path, read_json(path / MANIFEST))
    return StartFolder(path, read_json(path / CONFIG))


def _of_checkpoint(path: Path, manifest: Mapping[str, Any]) -> StartFolder:
    empty = StartFolder(path, {}, ((DRAFT, "unknown"),))
    with empty.reading():
        values, sizes = manifest["values"], dict(manifest["values"]["draft_config"])
        config = {
            **sizes,
            EAGLE_IDS: sizes["aux_layer_ids"],
            "layer_types": ["sliding_attention"] if sizes.get("sliding_window") else [],
            "paceline": {
                "method": values["method"],
                "target": {
                    "model": values.get("target_version"),
                    "name": (values.get("target") or {}).get("name"),
                },
            },
        }
        files = manifest["files"]
        drafts = tuple((name, str(files[name]["sha256"])) for name in parts_of(DRAFT, files))
        return StartFolder(path, config, drafts)


def refuse_other_method(start: StartFolder, method: str, architectures: Collection[str], kind: str) -> None:
    """Raise ConfigError unless the folder holds a draft of `method`: by its own word, or else by its
    `architectures` and, in the speculators package's layout, its `kind`."""
    told, config = _mapping(start.config, "paceline").get("method"), start.config
    if told is not None and told != method:
        raise start.refused(f"it holds a draft of the method {told}, not {method}", WHY_NOT_HERE)
    if start.is_checkpoint:
        return
    if config.get(KIND, kind) != kind:
        raise start.refused(f"its {KIND} is {config[KIND]!r}, not {kind!r}", WHY_NOT_HERE)
    named = set(config.get("architectures") or [])
    if not set(architectures) & named and (named or KIND not in config):
        raise start.refused(f"its architectures are {config.get('architectures')}", WHY_NOT_HERE)


def refuse_other_settings(start: StartFolder, section: Section, shape: Mapping[str, Any]) -> None:
    """Raise ConfigError if the section itself asks for another `shape` than the folder's, by setting."""
    fields = type(section).model_fields
    for name, value in shape.items():
        chosen = getattr(section, name)
        if chosen not in (fields[name].default, value):  # a recorded run file names the defaults, too
            reason = f"method.{name} is {chosen}, and the folder's is {value}"
            raise start.refused(reason, "The draft's shape is the folder's: leave the setting out.")


def refuse_other_layers(start: StartFolder) -> None:
    """Raise ConfigError for decoder layers that no draft here has."""
    for field in BIASES:
        if start.config.get(field) or start.decoder.get(field):
            raise start.refused(f"it sets {field}: its projections have biases", WHY_NOT_HERE)
    rope = {**start.decoder, **rope_parameters(start.decoder)}
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise start.refused("its rotary embedding is partial", WHY_NOT_HERE)
    if start.decoder.get("hidden_act", "silu") != "silu":
        raise start.refused(f"its hidden_act is {start.decoder['hidden_act']!r}", WHY_NOT_HERE)


def decoder_sizes(start: StartFolder, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The draft's own sizes, under the names of its config class. Raises KeyError, ValueError or TypeError.

    `defaults`: what the library's config class takes for fields that are left out.
    """
    given = {**(defaults or {}), **start.decoder}
    heads, hidden = int(given["num_attention_heads"]), int(given["hidden_size"])
    return {
        "hidden_size": hidden,
        "intermediate_size": int(given["intermediate_size"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(given.get("num_key_value_heads") or heads),
        "head_dim": int(given.get("head_dim") or hidden // heads),
        "vocab_size": int(given["vocab_size"]),
        "rms_norm_eps": float(given["rms_norm_eps"]),
        "max_position_embeddings": int(given.get("max_position_embeddings", 2048)),
    }


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, dict) else {}
