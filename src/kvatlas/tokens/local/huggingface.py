"""Hugging Face tokenizers: a directory with tokenizer.json becomes the tokens that vLLM 0.32 sees. No network, no remote code.

Loading imports transformers; importing this module does not. One tokenizer serves any number of threads: its backend is never
changed after loading, and lets go of the interpreter while it encodes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import warnings
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.encoding import Encoding
from kvatlas.tokens.local import chat_arguments
from kvatlas.tokens.local.chat import conversation, with_developers_as_system
from kvatlas.tokens.local.chat_input import check_text
from kvatlas.tokens.local.formats import digest
from kvatlas.tokens.local.model_config import max_model_len, own_chats
from kvatlas.tokens.local.twin import PROBES, twin
from kvatlas.tokens.prompts import ChatPrompt, Prompt
from kvatlas.tokens.seams import Seams

if TYPE_CHECKING:
    from kvatlas import _native
    from kvatlas.tokens.local.templates import ModelTemplates

_log = logging.getLogger(__name__)

_WRONG_CLASS = frozenset({"internlm2", "step3_vl", "step3p7", "unlimited-ocr", "unlimited_ocr"})
"""Kinds of models whose tokenizer_config.json names a wrong class: vLLM reads their tokenizer.json as it is."""


class HuggingFaceText:
    """A TextTokenizer over a fast tokenizer's backend. Made by :func:`load_huggingface`."""

    def __init__(self, backend: Any, before: array[int], after: array[int]) -> None:
        self._backend = backend
        self.before = before
        self.after = after
        self.native: _native.TextEncoder | None = None
        """The backend's twin (``twin.py``): where it is there, it does the work."""
        self._seams: Seams | None = None

    def seams(self) -> Seams:
        """Return where texts may be cut."""
        if self._seams is None:
            self._seams = Seams.of(self._backend)
        return self._seams

    def encode(self, text: str) -> Encoding:
        """Return a text's own tokens. Raises TokenizationError, BAD_TEXT."""
        if self.native is not None:
            with contextlib.suppress(ValueError):  # the backend says what is wrong
                ids, ends = self.native.encode(text)
                return Encoding(array("I", ids), array("I", ends))
        encoded = _encoded(self._backend.encode_batch, text)
        return Encoding(
            token_ids=array("I", encoded.ids), ends=array("I", accumulate(map(itemgetter(1), encoded.offsets), max))
        )

    def ids(self, text: str) -> array[int]:
        """Return the same tokens as :meth:`encode`, without where they end. Raises TokenizationError, BAD_TEXT."""
        if self.native is not None:
            with contextlib.suppress(ValueError):
                return array("I", self.native.ids(text))
        return array("I", _encoded(self._backend.encode_batch_fast, text).ids)

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are; their ids are below it."""
        return int(self._backend.get_vocab_size())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return tokens as text, special ones as their marks. Ids that the vocabulary does not have are left out."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))


class HuggingFaceTokenizer:
    """A LocalTokenizer. Made by :func:`load_huggingface`."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        name: str,
        revision: str | None,
        max_model_len: int | None,
        processor_template: str | None,
        chat_template: str | None,
        trust_request_template: bool,
        own_chats: str | None,
    ) -> None:
        self.name = name
        self.revision = revision
        self.max_model_len = max_model_len
        self.chars_per_token_max: int = max(map(len, tokenizer.get_vocab()), default=1)
        """Characters of the longest token as the vocabulary writes it: the engine's bound for texts (``trim_text``)."""
        self.specials_around: int = tokenizer.num_special_tokens_to_add(False)
        """How many tokens are put around a text with ``add_special_tokens``."""
        # Tokenizers are large: the one that was loaded is used and changed, not copied.
        backend = _unpadded(tokenizer)
        self.text = _text_tokenizer(backend, self.specials_around)
        self._whole: Any = backend if self.text is None else None
        self._templates: ModelTemplates = tokenizer.chat_template
        self._processor_template = processor_template
        self._special_tokens: dict[str, str] = dict(tokenizer.special_tokens_map)
        self._chat_template = chat_template
        self._trust_request_template = trust_request_template
        self._own_chats = own_chats

    def around(self, prompt: Prompt) -> tuple[int, int]:
        """Return how many special tokens stand before and behind a prompt's own."""
        if self.text is None or not prompt.add_special_tokens:
            return 0, 0
        return len(self.text.before), len(self.text.after)

    def render(self, chat: ChatPrompt) -> str:
        """Return a chat as the text that its template makes of it. Raises TokenizationError."""
        from kvatlas.tokens.local import templates

        if self._own_chats is not None:
            raise TokenizationError(
                TokenizationReason.UNSUPPORTED,
                "messages",
                f"the engine writes this model's chats with code of its own ({self._own_chats}), not with a template",
                "set tokens.renderer.endpoints to a renderer (vllm launch render)",
            )
        given, replaced = self._given_templates(chat)
        arguments = chat_arguments.arguments(chat)
        with_tools = arguments["tools"] is not None
        source = self._choose(given, with_tools=with_tools)
        # As in the engine, a template in chat_template_kwargs renders messages that were prepared for the one it replaces.
        content_format = "string" if source is None else templates.compiled(source).content_format
        if replaced is not None:
            source = self._choose(replaced, with_tools=with_tools)
        if source is None:
            raise templates.missing()
        template = templates.compiled(source)
        messages = conversation(chat.messages, content_format)
        if not template.knows_developers:
            messages = with_developers_as_system(messages)
        continues = bool(arguments.pop("continue_final_message", False))
        text = template.render(messages, {**self._special_tokens, **arguments}, continue_final_message=continues)
        check_text(text, chat)
        return text

    def prompt_text(self, prompt: Prompt) -> str:
        """Return the text that a prompt's tokens stand for. The engine takes no empty one. Raises TokenizationError."""
        if isinstance(prompt, ChatPrompt):
            return self.render(prompt)
        if not isinstance(prompt.text, str) or not prompt.text:
            problem = "it is no text" if prompt.text else "it is empty"
            raise TokenizationError(TokenizationReason.BAD_TEXT, "prompt", problem, "pass a text of one character at least")
        return prompt.text

    def tokenize(self, prompt: Prompt) -> array[int]:
        """Return all tokens of a prompt as array('I'), before any truncation. Raises TokenizationError."""
        text = self.prompt_text(prompt)
        if self.text is None:
            encoded = _encoded(self._whole.encode_batch_fast, text, add_special_tokens=prompt.add_special_tokens)
            return array("I", encoded.ids)
        ids = self.text.ids(text)
        return self.text.before + ids + self.text.after if prompt.add_special_tokens else ids

    def _given_templates(self, chat: ChatPrompt) -> tuple[str | None, str | None]:
        """Return the template that is given for a chat, and the one in chat_template_kwargs where that counts."""
        in_arguments = chat_arguments.template_argument(chat)
        if not self._trust_request_template and (chat.chat_template is not None or in_arguments is not None):
            raise TokenizationError(
                TokenizationReason.BAD_TEMPLATE,
                "chat_template" if chat.chat_template is not None else "chat_template_kwargs.chat_template",
                "a template in the request is not trusted",
                "leave it out, or set tokens.trustRequestTemplate where engines run with --trust-request-chat-template",
            )
        if chat.chat_template is not None and not isinstance(chat.chat_template, str):
            raise TokenizationError(TokenizationReason.BAD_TEMPLATE, "chat_template", "it is no text", "pass a text")
        given = chat.chat_template or self._chat_template
        return given, in_arguments if given is None else None

    def _choose(self, given: str | None, *, with_tools: bool) -> str | None:
        from kvatlas.tokens.local import templates

        if given is None and not with_tools and self._processor_template is not None:
            return self._processor_template
        return templates.choose(given, self._templates, with_tools=with_tools)


def load_huggingface(
    directory: Path,
    *,
    name: str,
    revision: str | None,
    chat_template: str | None = None,
    trust_request_template: bool = False,
) -> HuggingFaceTokenizer:
    """Return the tokenizer of a model's directory.

    ``revision`` None: the beginning of a digest of its files stands for it. ``chat_template``: the template's text that engines
    run with instead of the model's own. ``trust_request_template``: whether requests may bring one. Takes a second or more, the
    first time some seconds. Raises TokenizationError: NOT_INSTALLED, BROKEN_TOKENIZER.
    """
    transformers = _transformers()
    if not directory.is_dir():
        raise _broken(directory, "there is no such directory", "give the directory of a tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        _check_json(directory / file)
    with _silence(transformers):
        config = _config(transformers, directory)
        tokenizer = _load(transformers, directory, config)
    raw = _read_json(directory / "config.json")
    return HuggingFaceTokenizer(
        tokenizer,
        name=name,
        revision=revision or digest(directory),
        max_model_len=None if raw is None else max_model_len(raw if config is None else config.get_text_config()),
        processor_template=_processor_template(directory),
        chat_template=chat_template,
        trust_request_template=trust_request_template,
        own_chats=own_chats(raw or {}),
    )


# --- encoding


def _encoded(encode_batch: Any, text: str, *, add_special_tokens: bool = False) -> Any:
    """Return a text's encoding, by a method for batches: the backend's ``encode`` holds the interpreter while it works."""
    try:
        return encode_batch([text], add_special_tokens=add_special_tokens)[0]
    except TypeError:  # half of a surrogate pair: no UTF-8
        check_text(text)
        raise


def _unpadded(tokenizer: Any) -> Any:
    """Return the backend, which neither truncates nor pads from here on."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return backend


def _text_tokenizer(backend: Any, added: int) -> HuggingFaceText | None:
    """Return the tokenizer of texts, where its ``added`` special tokens always stand around a text's own tokens; else None.

    The backend is left without its post-processor in the first case, and as it was in the second.
    """
    plain, whole = ([_ids(backend, sample, with_specials) for sample in PROBES] for with_specials in (False, True))
    probe = _ids(backend, "a", True)
    post_processor = backend.post_processor
    backend.post_processor = None  # it adds the special tokens, and cuts white space from where tokens end
    own = _ids(backend, "a", False)
    for count in range(added + 1):
        if probe[count : count + len(own)] != own or len(probe) != len(own) + added:
            continue
        text = HuggingFaceText(backend, array("I", probe[:count]), array("I", probe[count + len(own) :]))
        found = [text.ids(sample) for sample in PROBES]
        if [ids.tolist() for ids in found] == plain and [(text.before + ids + text.after).tolist() for ids in found] == whole:
            text.native = twin(backend)
            return text
    backend.post_processor = post_processor
    _log.info("special tokens do not stand around texts: this tokenizer works without a prefix store")
    return None


def _ids(backend: Any, text: str, with_specials: bool) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=with_specials).ids
    return ids


# --- files


def _transformers() -> Any:
    try:
        with _quiet_import():
            for package in ("jinja2", "tokenizers"):
                importlib.import_module(package)
            return importlib.import_module("transformers")
    except ImportError as error:
        raise TokenizationError(
            TokenizationReason.NOT_INSTALLED,
            "model",
            f"{error.name or 'a package'} is not installed",
            "pip install 'kvatlas[tokens]'",
        ) from error


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Keep transformers from telling on the console that there is no PyTorch: tokenizers need none."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addFilter(_only_errors)
    try:
        yield
    finally:
        logger.removeFilter(_only_errors)
        logger.setLevel(level)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def _silence(transformers: Any) -> Iterator[None]:
    """Keep transformers' warnings off the console: what matters is raised."""
    logging_of = transformers.utils.logging
    before = logging_of.get_verbosity()
    logging_of.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging_of.set_verbosity(before)


def _config(transformers: Any, directory: Path) -> Any:
    """Return transformers' configuration of the model; None where there is none that it knows."""
    if not (directory / "config.json").is_file():
        return None
    try:
        return transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        _log.debug("transformers does not know this model's config.json: %s", type(error).__name__)
        return None


def _load(transformers: Any, directory: Path, config: Any) -> Any:
    try:
        wrong_class = getattr(config, "model_type", None) in _WRONG_CLASS
        loader = transformers.TokenizersBackend if wrong_class else transformers.AutoTokenizer
        tokenizer = loader.from_pretrained(
            str(directory), config=config, local_files_only=True, trust_remote_code=False, truncation_side="left"
        )
    except Exception as error:
        file = directory / "tokenizer.json"
        problem = str(error).strip().split("\n")[0][:300] or type(error).__name__
        if not file.is_file():
            problem = f"it is missing, and transformers could do without it only with other files: {problem}"
        remedy = "fetch the model's tokenizer files again"
        if "custom code" in problem or "remote_code" in problem:
            remedy = "code of a model's repository is never run here: set tokens.renderer.endpoints to a renderer"
        raise _broken(file, problem, remedy) from error
    if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "backend_tokenizer", None) is None:
        raise _broken(
            directory,
            "it has a slow tokenizer only (in Python)",
            "convert it to a tokenizer.json, or set tokens.renderer.endpoints",
        )
    return tokenizer


def _check_json(file: Path) -> None:
    """Raise BROKEN_TOKENIZER for a file that is there and is no JSON object."""
    if file.is_file():
        _read_json(file)


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(file, str(error)[:300], "fetch it again") from error
    if not isinstance(value, dict):
        raise _broken(file, "it is no JSON object", "fetch it again")
    return value


def _processor_template(directory: Path) -> str | None:
    """Return the template of a multimodal model's processor, which comes before the tokenizer's where there are no tools."""
    if not any((directory / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
        return None
    for file in ("chat_template.json", "processor_config.json"):
        template = (_read_json(directory / file) or {}).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def _broken(path: Path, problem: str, remedy: str) -> TokenizationError:
    return TokenizationError(TokenizationReason.BROKEN_TOKENIZER, "model", f"{path}: {problem}", remedy)
