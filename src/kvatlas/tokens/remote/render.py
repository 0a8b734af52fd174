"""vLLM's own renderer as a tokenizer: one that answers is asked, the others are for when it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NoReturn
from urllib.parse import urlsplit, urlunsplit

from kvatlas.config import RendererSettings
from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.prompts import ChatPrompt, Prompt
from kvatlas.tokens.remote.breaker import Breaker, Turn
from kvatlas.tokens.remote.calls import Deadline, Places, remote_text
from kvatlas.tokens.remote.features import media_field
from kvatlas.tokens.remote.http import Answer, HttpCalls, LateAnswerError, NoAnswerError
from kvatlas.tokens.remote.render_messages import (
    RenderedPrompt,
    beyond_tokenize,
    read_refusal,
    read_rendered,
    read_tokenized,
    render_request,
    tokenize_request,
)
from kvatlas.tokens.results import Tokenized, TokenSource

LOOK_AGAIN_S = 60.0
"""How long an endpoint without render is not asked for it again: it may be restarted with --enable-scale-out."""

_TOO_LONG = frozenset({"input_tokens", "input_text", "max_tokens"})
"""Fields that vLLM names where a prompt does not fit into the model; max_tokens: there is no room for the one we ask for."""


class RendererBackend:
    """Asks the first endpoint that works. ``clock`` returns seconds that never fall."""

    def __init__(self, settings: RendererSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._places = Places(settings.calls_max, "tokens.renderer.callsMax")
        self._http = HttpCalls(settings.token, settings.calls_max, settings.answer_bytes_max)
        self._endpoints = [
            _Endpoint(url, Breaker(settings.failures_max, settings.retry_after, clock), clock) for url in settings.endpoints
        ]

    def tokenize(self, prompt: Prompt, timeout_s: float) -> Tokenized:
        """Return a prompt's tokens as the engine would make them.

        An endpoint has its share of the time left, so that one that hangs leaves time for those behind it. The reason of the
        last endpoint's failure is told; a refusal of the prompt itself ends the search, others would refuse it too.
        """
        deadline = Deadline(min(timeout_s, self._settings.timeout), self._clock)
        with self._places.taken(deadline):
            return self._first_answer(prompt, deadline)

    def circuits(self) -> dict[str, str]:
        """Return the state of each endpoint's circuit."""
        return {endpoint.url: endpoint.breaker.state.value for endpoint in self._endpoints}

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _first_answer(self, prompt: Prompt, deadline: Deadline) -> Tokenized:
        failures: list[TokenizationError] = []
        for position, endpoint in enumerate(self._endpoints):
            if deadline.left_s <= 0:
                failures.append(self._late())
                break
            turn = endpoint.breaker.enter()
            if turn is None:
                failures.append(self._left_alone(endpoint))
                continue
            with turn:
                try:
                    rendered = self._ask(endpoint, turn, prompt, deadline.share(len(self._endpoints) - position))
                except TokenizationError as error:
                    if error.reason not in _OF_ENDPOINT:
                        raise
                    failures.append(error)
                else:
                    return Tokenized(
                        token_ids=rendered.token_ids,
                        source=TokenSource.RENDERER,
                        tokenizer=endpoint.url,
                        multimodal=rendered.multimodal,
                    )
        if not failures:
            raise TokenizationError(
                TokenizationReason.NO_BACKEND, "model", "no renderer is configured", "name one in tokens.renderer.endpoints"
            )
        # That one does not know a model says little while another, which may, does not answer.
        raise next((failure for failure in reversed(failures) if failure.reason.transient), failures[-1])

    def _ask(self, endpoint: _Endpoint, turn: Turn, prompt: Prompt, deadline: Deadline) -> RenderedPrompt:
        """Return one endpoint's answer; tell ``turn`` how it did. Raises TokenizationError."""
        asked = endpoint.may_render()
        if asked:
            path, body = render_request(prompt)
            answer = self._post(endpoint, turn, path, body, deadline)
            if not _without_render(answer):
                return self._read(endpoint, turn, prompt, answer, read_rendered)
            endpoint.has_no_render()
        field = beyond_tokenize(prompt)
        if field is not None:
            if asked:
                turn.succeeded()
            raise TokenizationError(
                TokenizationReason.UNSUPPORTED,
                field,
                f"{endpoint.url} has no render endpoint, and its /tokenize cannot do this as the engine does",
                "start it with --enable-scale-out, or `vllm launch render` beside it",
            )
        path, body = tokenize_request(prompt)
        answer = self._post(endpoint, turn, path, body, deadline)
        return self._read(endpoint, turn, prompt, answer, read_tokenized)

    def _post(self, endpoint: _Endpoint, turn: Turn, path: str, body: bytes, deadline: Deadline) -> Answer:
        given_s = deadline.left_s
        try:
            return self._http.post(endpoint.url + path, body, deadline)
        except LateAnswerError:
            # A caller in a hurry learns nothing about the endpoint: only a fair share of the configured time counts.
            if given_s >= 0.5 * self._settings.timeout / len(self._endpoints):
                turn.failed()
            raise TokenizationError(
                TokenizationReason.TIMEOUT,
                "prompt",
                f"{endpoint.url} did not answer within {given_s:.3g} s",
                "see whether it is overloaded, or raise tokens.renderer.timeout",
            ) from None
        except NoAnswerError as error:
            turn.failed()
            _unavailable(endpoint, remote_text(str(error)))

    def _read(
        self,
        endpoint: _Endpoint,
        turn: Turn,
        prompt: Prompt,
        answer: Answer,
        read: Callable[[Prompt, bytes], RenderedPrompt],
    ) -> RenderedPrompt:
        if answer.status != 200:
            _refused(endpoint, turn, prompt, answer)
        try:
            rendered = read(prompt, answer.body)
        except (ValueError, RecursionError) as error:
            turn.failed()
            _unavailable(endpoint, f"answers with something else: {remote_text(str(error))}")
        except TokenizationError:
            turn.succeeded()
            raise
        turn.succeeded()
        media = media_field(prompt)
        if media is not None and not rendered.multimodal:
            raise TokenizationError(
                TokenizationReason.UNSUPPORTED,
                media,
                f"{endpoint.url} does not say where in the prompt it is",
                "use a renderer of vLLM 0.32 or newer",
            )
        return rendered

    def _left_alone(self, endpoint: _Endpoint) -> TokenizationError:
        return TokenizationError(
            TokenizationReason.CIRCUIT_OPEN,
            "prompt",
            f"{endpoint.url} failed {self._settings.failures_max} times in a row, and is left alone for "
            f"{endpoint.breaker.retry_in_s:.1f} s",
            "see that it answers",
        )

    def _late(self) -> TokenizationError:
        return TokenizationError(
            TokenizationReason.TIMEOUT, "prompt", "the time was over before a renderer was asked", "allow more time"
        )


class _Endpoint:
    """One renderer: where it is, how it did, and whether it has render endpoints."""

    def __init__(self, url: str, breaker: Breaker, clock: Callable[[], float]) -> None:
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]  # a password would end up in messages
        self.url = urlunsplit((parts.scheme, place, parts.path.rstrip("/"), "", ""))
        self.breaker = breaker
        self._clock = clock
        self._lock = threading.Lock()
        self._without_render_until: float | None = None

    def may_render(self) -> bool:
        """Whether it is to be asked for render: not where it has had none just now."""
        with self._lock:
            return self._without_render_until is None or self._clock() >= self._without_render_until

    def has_no_render(self) -> None:
        with self._lock:
            self._without_render_until = self._clock() + LOOK_AGAIN_S


_OF_ENDPOINT = frozenset(
    {
        TokenizationReason.TIMEOUT,
        TokenizationReason.UNAVAILABLE,
        TokenizationReason.BUSY,
        TokenizationReason.UNKNOWN_MODEL,
        TokenizationReason.UNSUPPORTED,
    }
)
"""Reasons that lie in the endpoint: the next one is asked."""


def _without_render(answer: Answer) -> bool:
    """Whether this answer means that there is no such endpoint, rather than that it refuses the prompt.

    Without --enable-scale-out vLLM 0.32 answers 403 and says so; other versions, and other servers, answer 404 or 405. A model
    that vLLM does not have is 404 too, but says which.
    """
    if answer.status == 403:
        refusal = read_refusal(answer.body)
        return refusal is not None and "--enable-scale-out" in refusal.message
    if answer.status == 404:
        return not _model_missing(answer)
    return answer.status in (405, 501)


def _model_missing(answer: Answer) -> bool:
    refusal = read_refusal(answer.body)
    return answer.status == 404 and refusal is not None and refusal.kind == "NotFoundError"


def _refused(endpoint: _Endpoint, turn: Turn, prompt: Prompt, answer: Answer) -> NoReturn:
    """Raise what an answer without success means, and tell ``turn``."""
    refusal = read_refusal(answer.body)
    if answer.status >= 500 or answer.status < 400 or (answer.status in (404, 405) and not _model_missing(answer)):
        turn.failed()
        _unavailable(endpoint, f"answers with status {answer.status}{'' if refusal is None else f': {_said(refusal.message)}'}")
    turn.succeeded()
    if answer.status in (401, 403):
        _unavailable(endpoint, f"refuses us with status {answer.status}", "check tokens.renderer.token")
    if answer.status in (408, 429):
        raise TokenizationError(
            TokenizationReason.BUSY, "prompt", f"{endpoint.url} answers with status {answer.status}", "ask again later"
        )
    message = f"status {answer.status}" if refusal is None else _said(refusal.message)
    field = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
    if answer.status == 404:
        raise TokenizationError(
            TokenizationReason.UNKNOWN_MODEL, "model", f"{endpoint.url}: {message}", "name a model that a renderer serves"
        )
    if refusal is not None and refusal.field in _TOO_LONG:
        raise TokenizationError(TokenizationReason.TOO_MANY_TOKENS, field, f"{endpoint.url}: {message}", "send less")
    named = remote_text(refusal.field) if refusal is not None and refusal.field else field
    raise TokenizationError(
        TokenizationReason.REFUSED, named, f"{endpoint.url} refuses it: {message}", "send what the engine would take"
    )


def _said(message: str) -> str:
    return remote_text(message).rstrip(".")


def _unavailable(
    endpoint: _Endpoint, problem: str, remedy: str = "see that it runs, and that the address is right"
) -> NoReturn:
    raise TokenizationError(TokenizationReason.UNAVAILABLE, "prompt", f"{endpoint.url}: {problem}", remedy) from None
