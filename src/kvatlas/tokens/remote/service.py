"""A tokenization service over gRPC as a tokenizer: ``kvatlas tokenizer``, or llm-d's."""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import grpc

from kvatlas.config import TokenServiceSettings
from kvatlas.errors import ConfigError, TokenizationError, TokenizationReason
from kvatlas.proto.tokenization import tokenizer_pb2 as pb
from kvatlas.proto.tokenization import tokenizer_pb2_grpc
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt
from kvatlas.tokens.remote.breaker import Breaker, Turn
from kvatlas.tokens.remote.calls import Deadline, Places, remote_text
from kvatlas.tokens.remote.features import media_field
from kvatlas.tokens.remote.service_messages import chat_request, check_truncation, checked_text, features_of
from kvatlas.tokens.results import Tokenized, TokenSource
from kvatlas.tokens.truncation import truncate
from kvatlas.types import MultimodalItem

MESSAGE_BYTES_MAX = 100 << 20
"""Of a request and of an answer; llm-d's service and clients have the same bound."""

_NOT_LOADED = "Tokenizer not initialized"
_REFUSALS = ("Render failed:", "(parameter=", "is not a multimodal model", "validation error for ")
_TOO_LONG = "maximum context length"
_NOT_FOUND = ("Failed to load renderer", "Failed to initialize renderer")
"""How llm-d's service, which answers everything with INTERNAL, says whose fault it is."""

_SILENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})
"""Status codes that a service may never have sent: only these count as its failures."""


class _Response(Protocol):
    @property
    def success(self) -> bool: ...
    @property
    def error_message(self) -> str: ...


R = TypeVar("R", bound=_Response)


class ServiceBackend:
    """Asks the service at ``settings.address``. Connects at the first call. ``clock`` returns seconds that never fall."""

    def __init__(self, settings: TokenServiceSettings, clock: Callable[[], float] = time.monotonic) -> None:
        if settings.address is None:
            raise ConfigError("tokens.service.address", "is missing", "where the service listens")
        self._settings = settings
        self._address = settings.address
        self._clock = clock
        self._places = Places(settings.calls_max, "tokens.service.callsMax")
        self._breaker = Breaker(settings.failures_max, settings.retry_after, clock)
        self._channel = _channel(settings.address, settings.ca_file)
        self._stub = tokenizer_pb2_grpc.TokenizationServiceStub(self._channel)
        self._metadata = None if settings.token is None else (("authorization", f"Bearer {settings.token}"),)

    def tokenize(self, prompt: Prompt, timeout_s: float) -> Tokenized:
        """Return a prompt's tokens. Raises TokenizationError; unsupported for what the service's messages can't express."""
        check_truncation(prompt)
        chat = chat_request(prompt) if isinstance(prompt, ChatPrompt) else None
        deadline = Deadline(min(timeout_s, self._settings.timeout), self._clock)
        with self._places.taken(deadline):
            turn = self._breaker.enter()
            if turn is None:
                raise self._left_alone()
            with turn:
                call = _Call(self._address, turn, deadline, self._metadata, deadline.left_s >= 0.5 * self._settings.timeout)
                try:
                    tokens, items = self._tokens(call, prompt, chat)
                except TokenizationError as error:
                    raise _uncut(prompt, error) from None
        return Tokenized(
            token_ids=tokens if prompt.truncation is None else truncate(tokens, prompt.truncation, None),
            source=TokenSource.SERVICE,
            tokenizer=self._address,
            multimodal=items,
        )

    def circuits(self) -> dict[str, str]:
        """Return the state of each endpoint's circuit."""
        return {self._address: self._breaker.state.value}

    def close(self) -> None:
        """Close the connection; calls in progress fail."""
        self._channel.close()

    def _tokens(
        self, call: _Call, prompt: Prompt, chat: pb.RenderChatCompletionRequest | None
    ) -> tuple[array[int], tuple[MultimodalItem, ...]]:
        if chat is not None:
            answer = call(self._stub.RenderChatCompletion, chat)
            try:
                items = features_of(answer)
            except ValueError as error:
                call.nonsense(str(error))
            media = media_field(prompt)
            if media is not None and not items:
                call.turn.succeeded()
                raise TokenizationError(
                    TokenizationReason.UNSUPPORTED,
                    media,
                    f"{self._address} does not say where in the prompt it is",
                    "use a renderer",
                )
            return call.tokens(answer.token_ids), items
        assert isinstance(prompt, TextPrompt)
        text = checked_text(prompt.text)
        if prompt.add_special_tokens:
            rendered = call(self._stub.RenderCompletion, pb.RenderCompletionRequest(model_name=prompt.model, prompt=text))
            return call.tokens(rendered.token_ids), ()
        return call.tokens(self._plain(call, prompt.model, text).input_ids, may_be_empty=not text), ()

    def _plain(self, call: _Call, model: str, text: str) -> pb.TokenizeResponse:
        """Return a text's own tokens. llm-d's service wants a model to be loaded first, and forgets it when restarted."""
        request = pb.TokenizeRequest(input=text, model_name=model, add_special_tokens=False)
        try:
            return call(self._stub.Tokenize, request)
        except _NotLoadedError:
            call(self._stub.InitializeTokenizer, pb.InitializeTokenizerRequest(model_name=model, add_generation_prompt=True))
        try:
            return call(self._stub.Tokenize, request)
        except _NotLoadedError as error:
            raise TokenizationError(error.reason, error.field, error.problem, error.remedy) from None

    def _left_alone(self) -> TokenizationError:
        return TokenizationError(
            TokenizationReason.CIRCUIT_OPEN,
            "prompt",
            f"{self._address} failed {self._settings.failures_max} times in a row, and is left alone for "
            f"{self._breaker.retry_in_s:.1f} s",
            "see that it answers",
        )


class _NotLoadedError(TokenizationError):
    """The service knows the model, but has not loaded it."""


class _Call:
    """The calls that one prompt needs, within one deadline, and what their failures mean."""

    def __init__(self, address: str, turn: Turn, deadline: Deadline, metadata: Any, unhurried: bool) -> None:
        self.turn = turn
        self._address = address
        self._deadline = deadline
        self._metadata = metadata
        self._unhurried = unhurried

    def __call__(self, method: Callable[..., R], request: object) -> R:
        """Return an answer that is a success. Raises TokenizationError."""
        left_s = self._deadline.left_s
        try:
            answer = method(request, timeout=left_s, metadata=self._metadata)
        except grpc.RpcError as error:
            failed: Any = error  # of a call that was made it is a grpc.Call too
            self._fail(failed.code(), failed.details() or "", left_s)
        except ValueError as error:  # the channel was closed
            self._raise(TokenizationReason.UNAVAILABLE, str(error), "start again")
        if not answer.success:
            self.turn.succeeded()
            self._refused(remote_text(answer.error_message))
        return answer

    def tokens(self, token_ids: Any, *, may_be_empty: bool = False) -> array[int]:
        """Return an answer's tokens, and count it as a success."""
        if not token_ids and not may_be_empty:
            self.nonsense("no tokens")
        self.turn.succeeded()
        return array("I", token_ids)

    def nonsense(self, problem: str) -> NoReturn:
        """Raise that an answer is none."""
        self.turn.failed()
        self._raise(
            TokenizationReason.UNAVAILABLE, f"answers with something else: {problem}", "see that it is a tokenization service"
        )

    def _fail(self, code: grpc.StatusCode, details: str, left_s: float) -> NoReturn:
        said = remote_text(details)
        if code not in _SILENT:
            self.turn.succeeded()
        elif code is not grpc.StatusCode.DEADLINE_EXCEEDED or self._unhurried:
            self.turn.failed()  # a caller in a hurry learns nothing about it
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            problem = f"did not answer within {left_s:.3g} s"
            self._raise(TokenizationReason.TIMEOUT, problem, "see whether it is overloaded, or raise tokens.service.timeout")
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            self._raise(TokenizationReason.UNAVAILABLE, f"refuses us: {said}", "check tokens.service.token")
        if code is grpc.StatusCode.INTERNAL:
            self._refused(said)
        reason = _REASON_BY_CODE.get(code, TokenizationReason.UNAVAILABLE)
        ours = None if reason is TokenizationReason.UNAVAILABLE else _OUR_REFUSAL.fullmatch(said)
        if ours is not None:
            self._raise(reason, ours["problem"], ours["remedy"], ours["field"])
        self._raise(reason, f"{code.name}: {said}", _REMEDIES.get(reason, "see that it runs, and that the address is right"))

    def _refused(self, said: str) -> NoReturn:
        """Raise what a failure means that has only a text."""
        if _NOT_LOADED in said:
            raise _NotLoadedError(
                TokenizationReason.UNKNOWN_MODEL, "model", f"{self._address}: {said}", "name a model that it has"
            )
        if said.startswith(_NOT_FOUND):
            self._raise(TokenizationReason.UNKNOWN_MODEL, said, "name a model that it has", field="model")
        if _TOO_LONG in said:
            self._raise(TokenizationReason.TOO_MANY_TOKENS, said, "send less")
        if any(words in said for words in _REFUSALS):
            self._raise(TokenizationReason.REFUSED, said, "send what the engine would take")
        self._raise(TokenizationReason.UNAVAILABLE, f"failed: {said}", "see its log")

    def _raise(self, reason: TokenizationReason, problem: str, remedy: str, field: str = "prompt") -> NoReturn:
        raise TokenizationError(reason, field, f"{self._address}: {problem}", remedy)


_OUR_REFUSAL = re.compile(r"(?P<field>[a-z_][\w.\[\]]{0,99}): (?P<problem>.+?); (?P<remedy>.+)", re.ASCII)
"""How ``kvatlas tokenizer`` refuses: field, problem and remedy of its own error."""

_REASON_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: TokenizationReason.REFUSED,
    grpc.StatusCode.OUT_OF_RANGE: TokenizationReason.REFUSED,
    grpc.StatusCode.NOT_FOUND: TokenizationReason.UNKNOWN_MODEL,
    grpc.StatusCode.UNIMPLEMENTED: TokenizationReason.UNSUPPORTED,
    grpc.StatusCode.FAILED_PRECONDITION: TokenizationReason.BROKEN_TOKENIZER,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TokenizationReason.UNSUPPORTED,  # a message beyond somebody's bound
}

_REMEDIES = {
    TokenizationReason.REFUSED: "send what the engine would take",
    TokenizationReason.UNKNOWN_MODEL: "name a model that it has",
    TokenizationReason.UNSUPPORTED: "use a renderer (tokens.renderer), or a tokenizer here (tokens.directories)",
    TokenizationReason.BROKEN_TOKENIZER: "see its log",
}


def _channel(address: str, ca_file: str | None) -> grpc.Channel:
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if address.startswith("unix:"):
        options.append(("grpc.default_authority", "localhost"))  # else the path, which Go's servers refuse as a host's name
    if ca_file is None:
        return grpc.insecure_channel(address, options)
    try:
        certificates = Path(ca_file).read_bytes()
    except OSError as error:
        raise ConfigError("tokens.service.caFile", f"cannot read {ca_file!r}: {error.strerror}", "a readable file") from None
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(certificates), options)


def _uncut(prompt: Prompt, error: TokenizationError) -> TokenizationError:
    """Return a failure as it is; but that a whole prompt is refused says nothing about one that is to be cut."""
    if prompt.truncation is None or error.reason not in (TokenizationReason.REFUSED, TokenizationReason.TOO_MANY_TOKENS):
        return error
    return TokenizationError(
        TokenizationReason.UNSUPPORTED,
        "truncate_prompt_tokens",
        f"the service tokenizes whole prompts only, and refuses this one: {error.problem}",
        "use a renderer (tokens.renderer), or a tokenizer here (tokens.directories)",
    )
