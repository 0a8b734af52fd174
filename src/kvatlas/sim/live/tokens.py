"""An engine's tokenizer, and the words of its answers."""

from __future__ import annotations

import contextlib
import random
import zipfile
from array import array
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory

import xxhash

from kvatlas.config.tokens import TokenSettings
from kvatlas.errors import ConfigError
from kvatlas.tokens.local.huggingface import HuggingFaceText
from kvatlas.tokens.prompts import Prompt
from kvatlas.tokens.setup import make_local

PACKAGED = "tinymodel.zip"
"""A byte-level BPE tokenizer of 4,096 tokens with a chat template: that of the tests' model, for prompts up to 131,072."""

WORDS_MAX = 512


@contextlib.contextmanager
def packaged_tokenizer() -> Iterator[Path]:
    """Unpack the packaged tokenizer into a directory for as long as the block lasts."""
    with (
        TemporaryDirectory(prefix="kvatlas-tokenizer-") as folder,
        as_file(files("kvatlas.sim.live") / PACKAGED) as packed,
        zipfile.ZipFile(packed) as archive,
    ):
        archive.extractall(folder)
        yield Path(folder)


class EngineTokens:
    """Texts and chats to tokens as vLLM makes them; tokens to text; and answers made of words."""

    def __init__(self, model: str, directory: Path, max_model_len: int | None = None) -> None:
        """Load a tokenizer. Raises TokenizationError; ConfigError where it cannot turn tokens into text."""
        limits = {} if max_model_len is None else {model: max_model_len}
        self._backend = make_local(TokenSettings(models={model: str(directory)}, max_model_len=limits))
        tokenizer = self._backend.tokenizers.get(model)
        if not isinstance(tokenizer.text, HuggingFaceText):
            raise ConfigError("--tokenizer", f"{directory} has no tokenizer.json", "a Hugging Face tokenizer's directory")
        self._text = tokenizer.text
        self.max_model_len = max_model_len or tokenizer.max_model_len or 1 << 20
        self._words = tuple(_words(self._text))
        self._spelled = dict(self._words)

    def tokens(self, prompt: Prompt) -> array[int]:
        """Return a prompt's tokens, array('I'). Raises TokenizationError."""
        return self._backend.tokenize(prompt).token_ids

    def text(self, tokens: array[int]) -> str:
        """Return tokens as text. Those that the vocabulary does not have are left out."""
        return self._text.decode(tokens)

    def spelled(self, token: int) -> str:
        """Return one token of an answer as text."""
        return self._spelled[token]

    def answer(self, prompt: array[int], count: int) -> array[int]:
        """Return so many tokens of an answer: the same ones for the same prompt, and the beginning of any longer answer."""
        chosen = random.Random(xxhash.xxh64_intdigest(prompt.tobytes()))  # noqa: S311  not for secrets
        return array("I", [self._words[chosen.randrange(len(self._words))][0] for _ in range(count)])


def _words(text: HuggingFaceText) -> Iterator[tuple[int, str]]:
    """Yield tokens that are a word with a space before it, in any order of which the text becomes the same tokens again."""
    found = 0
    for token in range(text.vocabulary_size):
        word = text.decode(array("I", [token]))
        if not (word[:1] == " " and word[1:].isascii() and word[1:].isalpha() and word.islower()):
            continue
        if text.ids(word * 2).tolist() == [token, token]:
            yield token, word
            found += 1
            if found == WORDS_MAX:
                return
    if not found:
        raise ConfigError("--tokenizer", "has no tokens that are words", "another tokenizer")
