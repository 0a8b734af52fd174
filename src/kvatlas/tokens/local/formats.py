"""Which files make a tokenizer, of which format, and a digest over them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal, TypeAlias

from kvatlas.tokens.local.mistral import mistral_file

Kind: TypeAlias = Literal["huggingface", "mistral"]

LOOKED_FOR = "tokenizer.json, tokenizer_config.json with a vocabulary, tekken.json, *.model.v*, tokenizer.model"
_VOCABULARIES = frozenset(
    {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "vocab.json", "vocab.txt", "merges.txt"}
)
_TOKENIZER_FILES = _VOCABULARIES | {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
}
_VERSIONED_MODEL = re.compile(r"[A-Za-z0-9_-]+\.model\.v\d+(m\d+)?")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def is_tokenizer_file(name: str) -> bool:
    """Return whether tokens can depend on a file of this name."""
    return name in _TOKENIZER_FILES or _VERSIONED_MODEL.fullmatch(name) is not None


def kind_of(names: Collection[str]) -> Kind | None:
    """Return which format a directory with these files is read in, as vLLM's ``--tokenizer-mode auto`` decides; None: none.

    With files of both, vLLM takes Mistral's where the weights are in Mistral's format too (``consolidated*.safetensors``). A
    copy without any weights has ``params.json`` to tell it.
    """
    mistral = mistral_file(list(names))
    versioned = mistral is not None and not mistral.endswith(".model")
    configured = "tokenizer_config.json" in names or "config.json" in names
    if "tokenizer.json" in names or (configured and not _VOCABULARIES.isdisjoint(names)):
        weights = [name for name in names if name.endswith(_WEIGHTS)]
        consolidated = any(name.startswith("consolidated") and name.endswith(".safetensors") for name in weights)
        official = "tekken.json" in names or any(name.startswith("tokenizer.model.v") for name in names)
        if official and (consolidated or (not weights and "params.json" in names)):
            return "mistral"
        return "huggingface"
    return "mistral" if versioned or (mistral is not None and not configured) else None


def digest(directory: Path) -> str:
    """Return ``sha256:`` and 12 digits over names and contents of a directory's tokenizer files. Reads them all."""
    total = hashlib.sha256()
    for name in sorted(entry.name for entry in os.scandir(directory) if is_tokenizer_file(entry.name)):
        with (directory / name).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        total.update(name.encode() + b"\0" + content)
    return f"sha256:{total.hexdigest()[:12]}"
