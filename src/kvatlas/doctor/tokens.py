"""Where prompts become tokens: are the tokenizers there that the settings name, and do remote ones answer."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from kvatlas.config import RendererSettings, TokenSettings
from kvatlas.doctor.check import Check, CheckList
from kvatlas.errors import KvatlasError, TokenizationError
from kvatlas.tokens.encoding import LocalTokenizer
from kvatlas.tokens.local.backend import LocalBackend
from kvatlas.tokens.prompts import ChatPrompt
from kvatlas.tokens.setup import make_local

NAMES_SHOWN = 12
CONNECT_S = 2.0


def check_tokens(settings: TokenSettings) -> list[Check]:
    """Check what the settings name. Loads the tokenizers of tokens.models, at most tokens.loadedMax of them."""
    found = CheckList("tokens")
    local = bool(settings.models or settings.directories or settings.hub)
    if not (local or settings.renderer.endpoints or settings.service.address):
        remedy = "to score text and chats: tokens.directories, tokens.models, tokens.renderer or tokens.service"
        found.skip("tokenizers", "none is configured in these settings: queries need token ids", remedy)
    if local:
        _local(found, settings)
    for endpoint in settings.renderer.endpoints:
        _renderer(found, endpoint, settings.renderer)
    if settings.service.address is not None:
        _service(found, settings.service.address)
    return found.checks


def _local(found: CheckList, settings: TokenSettings) -> None:
    try:
        backend = make_local(settings)
    except KvatlasError as error:
        found.fail("tokenizers", str(error), "correct the setting")
        return
    for directory in settings.directories:
        if not Path(directory).expanduser().is_dir():
            found.fail(f"directory {directory}", "is not there", "correct tokens.directories")
    names = [tokenizer.model for tokenizer in backend.tokenizers.catalog.models()]
    shown = ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
    if names:
        found.ok("tokenizers", f"{len(names)} found: {shown}")
    elif settings.hub:
        found.ok("tokenizers", "none here yet: they are fetched from the hub when they are asked for")
    else:
        places = ", ".join((*settings.directories, *settings.models.values()))
        found.fail("tokenizers", f"none found in {places}", "name directories that hold a tokenizer.json or tekken.json")
    for model in list(settings.models)[: settings.loaded_max]:
        _one(found, backend, model)


def _one(found: CheckList, backend: LocalBackend, model: str) -> None:
    name = f"tokenizer {model}"
    try:
        tokenizer = backend.tokenizers.get(model)
    except TokenizationError as error:
        found.fail(name, error.problem, error.remedy)
        return
    limit = "does not say how many tokens it takes" if tokenizer.max_model_len is None else f"{tokenizer.max_model_len} tokens"
    about = f"{tokenizer.name} ({tokenizer.revision}), {limit}; {_store(tokenizer)}"
    problem = _chat_problem(tokenizer, model)
    if problem is None:
        found.ok(name, f"{about}; chats work")
    else:
        found.warn(name, f"{about}; chats do not work: {problem.problem}", problem.remedy)


def _chat_problem(tokenizer: LocalTokenizer, model: str) -> TokenizationError | None:
    try:
        tokenizer.tokenize(ChatPrompt(model=model, messages=[{"role": "user", "content": "hello"}]))
    except TokenizationError as error:
        return error
    return None


def _store(tokenizer: LocalTokenizer) -> str:
    """Say whether a prefix store can help."""
    if tokenizer.text is None:
        return "no prefix store (prompts become tokens in one step)"
    seams = tokenizer.text.seams()
    if seams.text:
        return "prefix store works"
    reason = "; ".join(seams.reasons)
    return f"prefix store between messages only ({reason})" if seams else f"no prefix store ({reason})"


def _renderer(found: CheckList, endpoint: str, settings: RendererSettings) -> None:
    name = f"renderer {endpoint}"
    headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
    try:
        answer = httpx.get(f"{endpoint.rstrip('/')}/health", headers=headers, timeout=settings.timeout)
        render = httpx.post(f"{endpoint.rstrip('/')}/v1/completions/render", json={}, headers=headers, timeout=settings.timeout)
    except httpx.HTTPError as error:
        found.fail(name, f"does not answer: {type(error).__name__}", "start it: vllm launch render MODEL --port PORT")
        return
    if answer.status_code != 200:
        found.warn(name, f"/health answers with status {answer.status_code}", "is it a vLLM?")
    elif render.status_code in (403, 404, 405):
        remedy = "start it with --enable-scale-out, or run vllm launch render"
        found.warn(name, "answers, but does not render: /tokenize has to do, which knows no images and no truncation", remedy)
    else:
        found.ok(name, "answers, and renders")


def _service(found: CheckList, address: str) -> None:
    name = f"service {address}"
    try:
        if address.startswith("unix:"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(CONNECT_S)
                connection.connect(address.removeprefix("unix:").removeprefix("//"))
        else:
            parts = urlsplit(f"//{address}")
            socket.create_connection((parts.hostname or "", parts.port or 0), CONNECT_S).close()
    except OSError as error:
        found.fail(name, f"nothing listens: {error.strerror or error}", "start it: kvatlas tokenizer --listen ADDRESS")
    else:
        found.ok(name, "listens")
