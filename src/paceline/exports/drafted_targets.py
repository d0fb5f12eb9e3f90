"""Which targets an inference server drafts for: what is known of two releases, as data. No torch.

A draft reads states of inner layers, and a server takes them only from a class that can give them. vLLM 0.32
asks its class for the interface `SupportsEagle3`; what it has no class for, it builds from the library's
classes, and they have it. SGLang 0.5.23 asks for the method `set_eagle3_layers_to_capture`, which these
lack. Both were looked up in those releases, for every architecture that transformers 5 builds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paceline.exports.serving import LOADED_BY
from paceline.target.folder import read_json

RELEASES = {"vllm": "vLLM 0.32", "sglang": "SGLang 0.5.23"}
SAYS = {
    "vllm": "Model does not support EAGLE3 interface",
    "sglang": "does not implement set_eagle3_layers_to_capture",
}

_REFUSED_BY_VLLM = """
AXK1ForCausalLM AriaForConditionalGeneration Blip2ForConditionalGeneration BloomForCausalLM
Cohere2ForCausalLM Cohere2VisionForConditionalGeneration CohereForCausalLM
Cosmos3EdgeForConditionalGeneration DbrxForCausalLM DiffusionGemmaForBlockDiffusion
Dots3NoteForCausalLM Ernie4_5_MoeForCausalLM Ernie4_5_VLMoeForConditionalGeneration Exaone4ForCausalLM
ExaoneMoeForCausalLM FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM GPT2LMHeadModel
GPTJForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM
Gemma3nForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM
Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration
GlmAsrForConditionalGeneration GlmOcrForConditionalGeneration Granite4VisionForConditionalGeneration
GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM
GraniteSpeechForConditionalGeneration GraniteSpeechPlusForConditionalGeneration HYV3ForCausalLM
HYV4ForCausalLM HrmTextForCausalLM HyperCLOVAXForCausalLM Idefics3ForConditionalGeneration
InklingForCausalLM InklingForConditionalGeneration InternVLForConditionalGeneration JambaForCausalLM
Lfm2ForCausalLM Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration LlavaNextForConditionalGeneration
LlavaNextVideoForConditionalGeneration LlavaOnevisionForConditionalGeneration LongcatFlashForCausalLM
Mamba2ForCausalLM MambaForCausalLM MixtralForCausalLM Molmo2ForConditionalGeneration
MossTranscribeDiarizeForConditionalGeneration NemotronForCausalLM OPTForCausalLM OlmoHybridForCausalLM
OlmoeForCausalLM PaddleOCRVLForConditionalGeneration PaliGemmaForConditionalGeneration
QianfanOCRForConditionalGeneration Qwen2AudioForConditionalGeneration Qwen2MoeForCausalLM
Qwen2VLForConditionalGeneration Qwen2_5OmniForConditionalGeneration Qwen4ExpForCausalLM
SmolVLMForConditionalGeneration StableLmForCausalLM Step3p7ForConditionalGeneration
VoxtralForConditionalGeneration Zamba2ForCausalLM
"""
_TAKEN_BY_SGLANG = """
ApertusForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM
ExaoneMoeForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma4AssistantForCausalLM
Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedAssistantForCausalLM
Gemma4UnifiedForConditionalGeneration Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
Glm5NextForConditionalGeneration GlmMoeDsaForCausalLM GptOssForCausalLM Llama4ForCausalLM
Llama4ForConditionalGeneration LlamaForCausalLM LongcatFlashForCausalLM MellumForCausalLM
MiniMaxM2ForCausalLM MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM MistralForCausalLM
Phi3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen2_5_VLForConditionalGeneration
Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3VLForConditionalGeneration
Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration
Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration Qwen4ExpForConditionalGeneration
"""
REFUSED_BY_VLLM = frozenset(_REFUSED_BY_VLLM.split())
TAKEN_BY_SGLANG = frozenset(_TAKEN_BY_SGLANG.split())


def architectures_of(folder: Path) -> tuple[str, ...]:
    """The classes that the target's config.json names; a server builds the first. Raises ConfigError."""
    found = read_json(folder / "config.json").get("architectures")
    return tuple(map(str, found)) if isinstance(found, list) else ()


def refused_class(server: str, method: str, architectures: Sequence[str]) -> str:
    """The class for which the server refuses a draft of `method`; "" if it is not known to refuse it.

    vLLM asks for its interface whatever the method is; of SGLang only what EAGLE-3 needs is known.
    """
    name = architectures[0] if architectures else ""
    if server == "vllm":
        return name if name in REFUSED_BY_VLLM else ""
    return name if method == "eagle3" and name not in TAKEN_BY_SGLANG else ""


def refusals(format_name: str, method: str, architectures: Sequence[str]) -> list[str]:
    """One sentence for each server that loads the format and refuses a target of these classes."""
    return [
        f"{RELEASES[server]} refuses this target with a draft ({name}: {SAYS[server]!r}); other releases "
        "may take it."
        for server in LOADED_BY.get(format_name, ())
        if (name := refused_class(server, method, architectures))
    ]
