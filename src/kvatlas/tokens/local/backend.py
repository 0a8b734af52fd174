"""Prompts become tokens in this process: the model's tokenizer, helped by what is known of texts that came before."""

from __future__ import annotations

import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Mapping

import msgspec

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.encoding import LocalTokenizer, TextTokenizer
from kvatlas.tokens.excerpt import first_tokens, is_far_longer, last_tokens
from kvatlas.tokens.incremental import EncoderStats, Incremental, IncrementalEncoder
from kvatlas.tokens.local.loaded import LoadedTokenizers
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt
from kvatlas.tokens.results import Tokenized, TokenSource
from kvatlas.tokens.segments import KnownSegments, SegmentEncoder
from kvatlas.tokens.stores import PrefixStore
from kvatlas.tokens.truncation import tokens_kept, trim_text, truncate


class NativeWork(msgspec.Struct, frozen=True):
    """A prompt whose text the native core can tokenize, and what Python makes of its tokens."""

    encoder: SegmentEncoder
    text: str
    answer: Callable[[Incremental], Tokenized]
    """Raises TokenizationError."""


class LocalBackend:
    """Tokenizes with loaded tokenizers.

    ``segments`` knows texts of tokenizers that have a native twin, ``store`` those of all others; None does without.
    """

    def __init__(
        self,
        tokenizers: LoadedTokenizers,
        store: PrefixStore | None,
        *,
        segments: KnownSegments | None = None,
        text_chars_max: int,
        max_model_len: Mapping[str, int] | None = None,
    ) -> None:
        self.tokenizers = tokenizers
        self.known_texts = tuple(some for some in (segments, store) if some is not None)
        """What holds known texts."""
        self._segments = segments
        self._store = store
        self._text_chars_max = text_chars_max
        self._max_model_len = max_model_len or {}
        self._encoders: weakref.WeakKeyDictionary[LocalTokenizer, IncrementalEncoder | SegmentEncoder] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.Lock()

    def tokenize(self, prompt: Prompt, timeout_s: float = 0.0) -> Tokenized:
        """Return a prompt's tokens. ``timeout_s`` is not looked at: work in this process cannot be cut short."""
        tokenizer = self.tokenizers.get(prompt.model)
        if tokenizer.text is None:
            tokens, stored = tokenizer.tokenize(self._trimmed(tokenizer, prompt)), 0
        else:
            tokens, stored = self._encode(tokenizer, prompt)
        return self._answer(tokenizer, prompt, tokens, stored)

    def native_work(self, prompt: Prompt) -> NativeWork | None:
        """Return a prompt as work for the native core; None where it needs Python first. Loads nothing, costs next to nothing.

        Raises TokenizationError.
        """
        if not isinstance(prompt, TextPrompt) or prompt.truncation is not None:
            return None
        tokenizer = self.tokenizers.peek(prompt.model)
        with self._lock:
            encoder = None if tokenizer is None else self._encoders.get(tokenizer)
        if tokenizer is None or not isinstance(encoder, SegmentEncoder):
            return None
        text = trim_text(self._text(tokenizer, prompt), None, self._limit(tokenizer, prompt), tokenizer.chars_per_token_max)
        return NativeWork(encoder, text, lambda found: self._answer(tokenizer, prompt, *_around(tokenizer, prompt, found)))

    def stores(self, prompt: Prompt) -> bool:
        """Tell whether the beginning of a prompt may be known: not where it is cut, or becomes tokens in one step."""
        if not self.known_texts or prompt.truncation is not None:
            return False
        tokenizer = self.tokenizers.peek(prompt.model)
        return tokenizer is None or tokenizer.text is not None

    def known(self, prompt: Prompt) -> Tokenized:
        """Return the tokens of the known prefix of a prompt, possibly none. Never waits for a tokenizer to be loaded."""
        tokenizer = self.tokenizers.peek(prompt.model)
        if tokenizer is None or tokenizer.text is None:
            return Tokenized(token_ids=array("I"), source=TokenSource.STORE, tokenizer=prompt.model, complete=False)
        encoder = self._encoder(tokenizer)
        tokens = encoder.known(self._text(tokenizer, prompt)) if encoder else array("I")
        stored = len(tokens)
        if prompt.add_special_tokens:
            tokens = tokenizer.text.before + tokens
        return Tokenized(
            token_ids=tokens,
            source=TokenSource.STORE,
            tokenizer=tokenizer.name,
            revision=tokenizer.revision,
            complete=False,
            tokens_stored=stored,
        )

    def warm(self, models: Iterable[str]) -> dict[str, TokenizationError]:
        """Load models' tokenizers and find where their texts may be cut; return what went wrong, by model."""
        models = tuple(models)
        failures = self.tokenizers.warm(models)
        for model in models:
            tokenizer = self.tokenizers.peek(model)
            if tokenizer is not None:
                self._encoder(tokenizer)
        return failures

    def encoder_stats(self) -> EncoderStats:
        """Return what encoders did with the store, over all loaded tokenizers."""
        total = EncoderStats()
        with self._lock:
            encoders = list(self._encoders.values())
        for stats in (encoder.stats() for encoder in encoders):
            for name in stats.__struct_fields__:
                setattr(total, name, getattr(total, name) + getattr(stats, name))
        return total

    def close(self) -> None:
        """Nothing to let go of."""

    def _encode(self, tokenizer: LocalTokenizer, prompt: Prompt) -> tuple[array[int], int]:
        """Return the tokens of a text, or of what a chat's template makes of it, and how many of them the store knew."""
        assert tokenizer.text is not None
        text = trim_text(
            self._text(tokenizer, prompt), prompt.truncation, self._limit(tokenizer, prompt), tokenizer.chars_per_token_max
        )
        encoder = self._encoder(tokenizer)
        excerpt = self._excerpt(tokenizer, prompt, text)
        if excerpt is not None:
            found = Incremental(excerpt, 0)
        elif encoder is None:
            found = Incremental(tokenizer.text.ids(text), 0)
        else:
            found = encoder.encode(text)
        return _around(tokenizer, prompt, found)

    def _excerpt(self, tokenizer: LocalTokenizer, prompt: Prompt, text: str) -> array[int] | None:
        """Return at least those of a text's tokens that its truncation keeps, where the text has far more than them."""
        assert tokenizer.text is not None
        kept = tokens_kept(prompt.truncation, self._limit(tokenizer, prompt), prompt.max_output_tokens)
        if prompt.truncation is None or kept is None or not is_far_longer(text, kept):
            return None
        take = first_tokens if prompt.truncation.side == "right" else last_tokens
        return take(tokenizer.text, tokenizer.text.seams(), text, kept)

    def _text(self, tokenizer: LocalTokenizer, prompt: Prompt) -> str:
        if isinstance(prompt, ChatPrompt):
            return self._checked("messages", tokenizer.render(prompt))
        return self._checked("prompt", prompt.text)

    def _trimmed(self, tokenizer: LocalTokenizer, prompt: Prompt) -> Prompt:
        """Return what the engine tokenizes of a prompt that becomes tokens in one step."""
        if isinstance(prompt, ChatPrompt):
            return prompt
        text = self._checked("prompt", prompt.text)
        trimmed = trim_text(text, prompt.truncation, self._limit(tokenizer, prompt), tokenizer.chars_per_token_max)
        return prompt if trimmed == text else msgspec.structs.replace(prompt, text=trimmed)

    def _checked(self, field: str, text: str) -> str:
        if not isinstance(text, str) or (not text and field == "prompt"):
            problem = "is empty" if text == "" else f"is of type {type(text).__name__}"
            raise TokenizationError(TokenizationReason.BAD_TEXT, field, problem, "pass a text of one character at least")
        if len(text) > self._text_chars_max:
            raise TokenizationError(
                TokenizationReason.BAD_TEXT,
                field,
                f"{len(text)} characters are more than tokens.textCharsMax ({self._text_chars_max})",
                "send less, or raise the setting",
            )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise TokenizationError(
                    TokenizationReason.BAD_TEXT,
                    field,
                    f"a lone surrogate at character {error.start} is no Unicode text",
                    "send text in valid UTF-8",
                ) from None
        return text

    def _encoder(self, tokenizer: LocalTokenizer) -> IncrementalEncoder | SegmentEncoder | None:
        if not self.known_texts or tokenizer.text is None:
            return None
        with self._lock:
            encoder = self._encoders.get(tokenizer)
        if encoder is None:
            made = self._made(tokenizer, tokenizer.text)  # takes a while: unlocked
            if made is not None:
                with self._lock:
                    encoder = self._encoders.setdefault(tokenizer, made)
        return encoder

    def _made(self, tokenizer: LocalTokenizer, text: TextTokenizer) -> IncrementalEncoder | SegmentEncoder | None:
        space = f"{tokenizer.name}@{tokenizer.revision}"
        if self._segments is not None:
            made = self._segments.encoder(text, space)
            if made is not None:
                return made
        return None if self._store is None else IncrementalEncoder(text, text.seams(), self._store, space)

    def _limit(self, tokenizer: LocalTokenizer, prompt: Prompt) -> int | None:
        return self._max_model_len.get(prompt.model, tokenizer.max_model_len)

    def _answer(self, tokenizer: LocalTokenizer, prompt: Prompt, tokens: array[int], stored: int) -> Tokenized:
        before, after = tokenizer.around(prompt)
        limit = self._limit(tokenizer, prompt)
        tokens = truncate(
            tokens, prompt.truncation, limit, before=before, after=after, max_output_tokens=prompt.max_output_tokens
        )
        return Tokenized(
            token_ids=tokens,
            source=TokenSource.STORE if stored else TokenSource.LOCAL,
            tokenizer=tokenizer.name,
            revision=tokenizer.revision,
            tokens_stored=stored,
        )


def _around(tokenizer: LocalTokenizer, prompt: Prompt, found: Incremental) -> tuple[array[int], int]:
    """Return a text's tokens with those that the tokenizer puts around them, and how many were known."""
    assert tokenizer.text is not None
    if not prompt.add_special_tokens:
        return found.token_ids, found.tokens_stored
    return tokenizer.text.before + found.token_ids + tokenizer.text.after, found.tokens_stored
