"""Tokenizers in Mistral's own format, by mistral_common, as vLLM 0.32 uses it with ``--tokenizer-mode mistral``.

There is no text in between: mistral_common makes tokens of a chat in one step, and special tokens never come from text. What
vLLM does to a chat before (``vllm/tokenizers/mistral.py``, ``renderers/``) is done here too;
``tests/live/mistral_against_vllm.py`` compares the two.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.local.chat_arguments import EFFORTS
from kvatlas.tokens.local.chat_input import bad_message
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as CommonTokenizer

CALL_ID_CHARS = 9
"""Mistral's tool call ids are that long; vLLM keeps the last characters of longer ones."""
FIRST_VERSION_WITH_EFFORT = 15
DEFAULT_MAX_MODEL_LEN = 128_000
"""What vLLM assumes where params.json does not say it and there is no config.json."""
CONFIG_BYTES_MAX = 4 << 20
_MODEL_FILE = re.compile(r"[^.]+\.model(\.v\d+(m\d+)?)?")
_TEXT_KEYS = {"text": ("type", "text"), "thinking": ("type", "thinking", "closed")}


def mistral_file(names: Sequence[str]) -> str | None:
    """Return which of a directory's files is Mistral's tokenizer, as mistral_common chooses; None where none is one.

    ``tekken.json``, or else the last of the sentencepiece models (``tokenizer.model.v3``, ``*.model.v7m1``, ``*.model``).
    """
    if "tekken.json" in names:
        return "tekken.json"
    return max((name for name in names if _MODEL_FILE.fullmatch(name)), default=None)


class MistralTokenizer:
    """A LocalTokenizer over mistral_common. Calls may come from several threads."""

    text = None

    def __init__(
        self, common: CommonTokenizer[Any, Any, Any, Any, Any], name: str, revision: str | None, max_model_len: int | None
    ) -> None:
        self._common = common
        self._tokens = common.instruct_tokenizer.tokenizer
        self._version = int(str(self._tokens.version.value).removeprefix("v"))
        self._name = name
        self._revision = revision
        self._max_model_len = max_model_len
        self._chars_per_token_max = max(map(len, self._tokens.vocab()), default=1)

    @property
    def name(self) -> str:
        return self._name

    @property
    def revision(self) -> str | None:
        return self._revision

    @property
    def max_model_len(self) -> int | None:
        return self._max_model_len

    @property
    def chars_per_token_max(self) -> int:
        return self._chars_per_token_max

    @property
    def version(self) -> int:
        """Of Mistral's format: 1, 2, 3, 7, 11, 13, 15."""
        return self._version

    def around(self, prompt: Prompt) -> tuple[int, int]:
        """A text has BOS before it; of a chat, all tokens are its own."""
        return (1 if isinstance(prompt, TextPrompt) and prompt.add_special_tokens else 0), 0

    def render(self, chat: ChatPrompt) -> str:
        """Refuse: a chat is never text here."""
        problem = "a Mistral tokenizer makes tokens of a chat in one step"
        raise TokenizationError(TokenizationReason.UNSUPPORTED, "messages", problem, "tokenize the chat instead")

    def tokenize(self, prompt: Prompt) -> array[int]:
        """Return all tokens of a prompt as array('I'), before any truncation. Raises TokenizationError."""
        if isinstance(prompt, TextPrompt):
            return self._tokenize_text(prompt)
        _check_parameters(prompt)
        messages = [_message(message, f"messages[{position}]") for position, message in enumerate(prompt.messages)]
        _check_ends(prompt, messages)
        tools = None if prompt.tools is None else [_tool(tool, f"tools[{at}]") for at, tool in enumerate(prompt.tools)]
        return array("I", self._encode_chat(messages, tools, prompt))

    def _tokenize_text(self, prompt: TextPrompt) -> array[int]:
        try:
            return array("I", self._tokens.encode(prompt.text, bos=prompt.add_special_tokens, eos=False))
        except Exception as error:
            raise TokenizationError(
                TokenizationReason.BAD_TEXT, "prompt", f"cannot be tokenized ({type(error).__name__})", "send Unicode text"
            ) from None

    def _encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: ChatPrompt
    ) -> Sequence[int]:
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        further = {"reasoning_effort": prompt.reasoning_effort} if self._version >= FIRST_VERSION_WITH_EFFORT else {}
        try:
            request = ChatCompletionRequest.from_openai(
                messages=messages, tools=tools, continue_final_message=prompt.continue_final_message, **further
            )
            tokens: Sequence[int] = self._common.encode_chat_completion(request).tokens
        except Exception as error:  # its checks are assertions, pydantic's, its own and KeyErrors: vLLM answers 400 to all
            remedy = f"send a chat that a Mistral model of tokenizer version {self._version} takes"
            raise TokenizationError(TokenizationReason.BAD_MESSAGES, "messages", _told(error), remedy) from None
        return tokens


def load_mistral(
    directory: Path,
    *,
    name: str,
    revision: str | None,
    chat_template: str | None = None,
    trust_request_template: bool = False,
) -> MistralTokenizer:
    """Return the tokenizer of a directory in Mistral's format. Takes about a second. Raises TokenizationError.

    Templates play no part: vLLM leaves the server's out with these tokenizers, and refuses a request's.
    """
    del chat_template, trust_request_template
    try:
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Common
    except ImportError:
        remedy = "pip install 'kvatlas[tokens]'"
        problem = "mistral_common is not installed"
        raise TokenizationError(TokenizationReason.NOT_INSTALLED, "model", problem, remedy) from None
    try:
        file = mistral_file([entry.name for entry in directory.iterdir()])
        if file is None:
            raise FileNotFoundError("no tekken.json, *.model.v* or *.model")  # noqa: TRY301 - told like other unreadable files
        common = Common.from_file(directory / file, mode=ValidationMode.test)
    except ImportError as error:
        remedy = "pip install 'mistral-common[sentencepiece]'"
        raise TokenizationError(TokenizationReason.NOT_INSTALLED, "model", str(error).partition(".")[0], remedy) from None
    except Exception as error:
        problem = f"the tokenizer in {directory} cannot be read: {str(error)[:200]}"
        remedy = "bring its files again, whole"
        raise TokenizationError(TokenizationReason.BROKEN_TOKENIZER, "model", problem, remedy) from None
    return MistralTokenizer(common, name, revision, _max_model_len(directory))


def _max_model_len(directory: Path) -> int | None:
    """Return what vLLM derives: params.json's, else config.json's, else a default where there is a params.json."""
    params = _read_object(directory / "params.json")
    config = _read_object(directory / "config.json") or {}
    text_config = config.get("text_config")
    for source in (params or {}, config, text_config if isinstance(text_config, dict) else {}):
        length = source.get("max_position_embeddings")
        if isinstance(length, int) and not isinstance(length, bool) and length > 0:
            return length
    return None if params is None else DEFAULT_MAX_MODEL_LEN


def _read_object(file: Path) -> dict[str, Any] | None:
    try:
        if file.stat().st_size > CONFIG_BYTES_MAX:
            return None
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


# -- a chat as vLLM hands it on -----------------------------------------------------------------------------------------


def _check_parameters(chat: ChatPrompt) -> None:
    """Refuse what vLLM refuses with these tokenizers, whatever the server trusts."""
    for field, value in (("chat_template", chat.chat_template), ("chat_template_kwargs", chat.chat_template_kwargs)):
        if value is not None:
            problem = "Mistral tokenizers have no chat template"
            raise TokenizationError(TokenizationReason.BAD_TEMPLATE, field, problem, "leave it out")
    if chat.reasoning_effort and chat.reasoning_effort not in EFFORTS:
        problem = f"{chat.reasoning_effort[:20]!r} is unknown"
        raise bad_message("reasoning_effort", problem, f"one of {', '.join(sorted(EFFORTS))}")
    if chat.tools is not None and not chat.tools:
        raise bad_message("tools", "an empty list", "give a tool, or leave it out")
    if not chat.messages:
        raise bad_message("messages", "there are none", "send at least one")
    if chat.add_generation_prompt and chat.continue_final_message:
        raise bad_message("continue_final_message", "add_generation_prompt is true too", "set one of the two")


def _check_ends(chat: ChatPrompt, messages: Sequence[Mapping[str, Any]]) -> None:
    last = messages[-1].get("role")
    if chat.add_generation_prompt and last == "assistant":
        problem = "the last message is the assistant's, and add_generation_prompt is true"
        raise bad_message("messages", problem, "set continue_final_message, or end with another's message")
    if chat.continue_final_message and last != "assistant":
        raise bad_message("continue_final_message", "the last message is not the assistant's", "end with a message to continue")


def _message(message: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return a copy of a message with what mistral_common reads, ids cut and arguments parsed."""
    if not isinstance(message, Mapping) or not isinstance(role := message.get("role"), str):
        raise bad_message(field, "no object with a role", "send chats as OpenAI has them")
    copy: dict[str, Any] = {"role": role}
    if "content" in message:
        copy["content"] = _content(message["content"], role, f"{field}.content")
    if role == "assistant":
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, Sequence):
            raise bad_message(f"{field}.tool_calls", "no list", "send a list of tool calls")
        copy["tool_calls"] = [_call(call, f"{field}.tool_calls[{position}]") for position, call in enumerate(calls or ())]
        reasoning = message.get("reasoning")
        copy["reasoning"] = message.get("reasoning_content") if reasoning is None else reasoning
    elif role == "tool":
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str):
            raise bad_message(f"{field}.tool_call_id", "is missing or no text", "name the call that this answers")
        copy["tool_call_id"] = call_id[-CALL_ID_CHARS:]
    return copy


def _content(content: object, role: str, field: str) -> object:
    """Return text or a list of text and thinking parts. What would have to be fetched or decoded stops here."""
    if isinstance(content, str) or (content is None and role == "assistant"):
        return content
    if not isinstance(content, Sequence):
        raise bad_message(field, "neither text nor a list of parts", "send text")
    parts = []
    for position, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            remedy = 'send parts such as {"type": "text", "text": "..."}'
            raise bad_message(f"{field}[{position}]", "no part with a type", remedy)
        keys = _TEXT_KEYS.get(kind)
        if keys is None:
            problem = f"a part of type {kind[:20]!r}"
            remedy = "only text can be tokenized here; images and audio need the engine's renderer"
            raise TokenizationError(TokenizationReason.UNSUPPORTED, f"{field}[{position}]", problem, remedy)
        if not isinstance(part.get(kind), str):
            raise bad_message(f"{field}[{position}].{kind}", "no text", "send text")
        parts.append({key: part[key] for key in keys if key in part})
    return parts


def _call(call: object, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or call.get("type") != "function":
        raise bad_message(field, "no call of a function", 'send {"id": ..., "type": "function", "function": {...}}')
    call_id, name, arguments = call.get("id"), function.get("name"), function.get("arguments")
    if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(arguments, str)):
        raise bad_message(field, "id, name or arguments are missing or no text", "send all three as text")
    return {
        "id": call_id[-CALL_ID_CHARS:],
        "type": "function",
        "function": {"name": name, "arguments": _arguments(arguments)},
    }


def _arguments(text: str) -> dict[str, Any]:
    """Return a call's arguments. vLLM puts an empty object where there is no JSON object: the chat must be able to go on."""
    try:
        parsed = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _tool(tool: Mapping[str, Any], field: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise bad_message(field, "no function with a name", 'send {"type": "function", "function": {"name": ...}}')
    if tool.get("type", "function") != "function":
        raise bad_message(f"{field}.type", "not 'function'", "send functions only")
    return {"type": "function", "function": dict(function)}


def _told(error: Exception) -> str:
    """Return what is wrong with a chat, without any of its text."""
    from mistral_common.exceptions import InvalidFunctionCallException, MistralCommonException
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])[:80]}: {first['type']}"
    if isinstance(error, MistralCommonException) and not isinstance(error, InvalidFunctionCallException):
        return str(error)[:200]
    return f"the chat is not one that it takes ({type(error).__name__})"
