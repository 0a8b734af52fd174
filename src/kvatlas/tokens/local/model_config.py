"""What a model's config.json says of its tokens: how many it takes, and whether a template writes its chats at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OWN_CHATS = {
    "gpt_oss": "harmony",
    "kimi_k3": "kimi_k3",
    "deepseek_v32": "deepseek_v32",
    "deepseek_v4": "deepseek_v4",
    "deepseek_v41": "deepseek_v41",
    "inkling": "inkling",
    "kimi_audio": "kimi_audio",
}
"""Kinds of models whose chats vLLM renders with code of its own, not with a template."""
_OWN_CHAT_ARCHITECTURES = {
    "GptOssForCausalLM": "harmony",
    "MoonshotKimiaForCausalLM": "kimi_audio",
    "KimiK3ForConditionalGeneration": "kimi_k3",
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "DeepseekV4ForCausalLM": "deepseek_v4",
    "DeepseekV4ForConditionalGeneration": "deepseek_v4",
    "DeepseekV41ForCausalLM": "deepseek_v41",
    "InklingForCausalLM": "inkling",
    "InklingForConditionalGeneration": "inkling",
}
_LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_LENGTH_UNKNOWN = 2048
"""What vLLM assumes of a model that does not say."""
_SCALED_ALREADY = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})
"""Kinds of rope whose max_position_embeddings is the scaled length."""


def own_chats(config: Mapping[str, Any]) -> str | None:
    """Return the name of the engine's own code for a model's chats; None where a template writes them."""
    for architecture in config.get("architectures") or ():
        if architecture in _OWN_CHAT_ARCHITECTURES:
            return _OWN_CHAT_ARCHITECTURES[architecture]
    return _OWN_CHATS.get(str(config.get("model_type")))


def max_model_len(config: Any) -> int:
    """Return how many tokens a model takes, as vLLM derives it without --max-model-len.

    ``config``: transformers' configuration of its text part, or what config.json says where transformers does not know it.
    """

    def said(key: str) -> Any:
        return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)

    lengths = [length for key in _LENGTH_KEYS if isinstance(length := said(key), int | float) and length > 0]
    derived: float = said("model_max_length") or min(lengths, default=_LENGTH_UNKNOWN)
    ropes = _ropes(said("rope_parameters") or said("rope_scaling"))
    if any(_rope_type(rope) == "longrope" for rope in ropes):
        return int(said("original_max_position_embeddings") or derived)
    if "gemma3" not in str(said("model_type") or ""):
        factor = None
        for rope in ropes:
            if _rope_type(rope) not in _SCALED_ALREADY:
                factor = rope.get("factor", factor)
        derived *= factor or 1.0
    return int(derived)


def _ropes(parameters: Any) -> list[Mapping[str, Any]]:
    """Return a model's rope parameters: one for all layers, or one for each kind of layer."""
    if not isinstance(parameters, Mapping) or not parameters:
        return []
    if all(isinstance(value, Mapping) or value is None for value in parameters.values()):
        return [value for value in parameters.values() if value]
    return [parameters]


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
