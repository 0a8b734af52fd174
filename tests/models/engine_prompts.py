"""How the test engine turns requests into tokens: by words, or with a model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import xxhash

Body = Mapping[str, Any]


class Tokenizer(Protocol):
    def text(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]: ...


class Words:
    """A token for each word: the same word is the same token everywhere."""

    def text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [xxhash.xxh32_intdigest(word.encode()) for word in text.split()]

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        return self.text(" ".join(f"<{message['role']}> {_content(message)}" for message in messages))


class ModelTokens:
    """Tokens as the model in ``directory`` has them (tokenizer.json, chat_template.jinja)."""

    def __init__(self, directory: Path) -> None:
        import jinja2
        from tokenizers import Tokenizer as Fast

        self._fast = Fast.from_file(str(directory / "tokenizer.json"))
        self._template = jinja2.Template((directory / "chat_template.jinja").read_text())

    def text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        plain = [{"role": message["role"], "content": _content(message)} for message in messages]
        return self.text(self._template.render(messages=plain, add_generation_prompt=add_generation_prompt), False)


def prompt_tokens(tokenizer: Tokenizer, path: str, body: Body) -> list[int]:
    """Return the tokens of a request to ``path``. Raises KeyError, TypeError or ValueError for what is none."""
    return _READERS.get(path, _input)(tokenizer, body)


def _completion(tokenizer: Tokenizer, body: Body) -> list[int]:
    prompt = body["prompt"]
    if isinstance(prompt, str):
        return tokenizer.text(prompt, body.get("add_special_tokens", True))
    if isinstance(prompt[0], str):
        return tokenizer.text(prompt[0], body.get("add_special_tokens", True))
    return [int(token) for token in (prompt[0] if isinstance(prompt[0], list) else prompt)]


def _chat(tokenizer: Tokenizer, body: Body) -> list[int]:
    return tokenizer.chat(body["messages"], body.get("add_generation_prompt", True))


def _tokenize(tokenizer: Tokenizer, body: Body) -> list[int]:
    return _chat(tokenizer, body) if "messages" in body else _completion(tokenizer, body)


def _input(tokenizer: Tokenizer, body: Body) -> list[int]:
    """Embeddings and responses: a text, or a list of texts or messages."""
    given = body["input"]
    if isinstance(given, str):
        return tokenizer.text(given)
    if isinstance(given[0], str):
        return [token for text in given for token in tokenizer.text(text)]
    return tokenizer.chat(given)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


_READERS: dict[str, Callable[[Tokenizer, Body], list[int]]] = {
    "/v1/completions": _completion,
    "/v1/chat/completions": _chat,
    "/tokenize": _tokenize,
}
