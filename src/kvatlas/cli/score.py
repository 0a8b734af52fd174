"""``kvatlas score``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.text import Text

from kvatlas.cli.client import ServiceClient
from kvatlas.cli.columns import Column, Gives, fitted
from kvatlas.cli.options import DEFAULT_URL, AsJson, ServiceToken, ServiceUrl
from kvatlas.cli.screen import show_table
from kvatlas.errors import RequestError
from kvatlas.results import PodScore, PodStatus, ScoreResult, TokensInfo

GIVING_WAY = ("matched tokens", "model", "tiers (blocks)", "predicted cached", "pod")
"""What a narrow screen does without, the first one first. Each pod's score and prediction, and whether it is stale, stays."""


def score(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The served model's name; may be left out where there is only one.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="The prompt's token ids, with commas between them.", metavar="1,2,3")
    ] = None,
    tokens_file: Annotated[
        Path | None,
        typer.Option(help="A file (- is standard input) with a JSON list of token ids, or one line of a *.requests.jsonl."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="The prompt as text; @FILE takes it from a file, @- from standard input.", metavar="TEXT")
    ] = None,
    chat: Annotated[
        Path | None,
        typer.Option(help="A file (- is standard input) with a chat completion request: messages, tools, ...", metavar="FILE"),
    ] = None,
    lora: Annotated[str | None, typer.Option(help="The LoRA adapter's name.", metavar="NAME")] = None,
    salt: Annotated[str | None, typer.Option(help="The request's cache_salt.", metavar="SALT")] = None,
    pods: Annotated[str | None, typer.Option(help="Only these pods, with commas between them.", metavar="A,B")] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="longest-prefix, highest-block-hit, coverage, ... By default the service's.", metavar="NAME"),
    ] = None,
    url: ServiceUrl = DEFAULT_URL,
    token: ServiceToken = None,
    json: AsJson = False,
) -> None:
    """Ask a running service which pods hold a prompt's prefix: best first.

    Predicted cached tokens are what the engine would report: whole blocks of its own, and never the last token, which it
    always computes. A pod that may be wrong says why under "stale".

    Examples:

        kvatlas score --model llama --tokens 1,2,3,4
        kvatlas score --model llama --text "Once upon a time"
        kvatlas score --chat request.json
        kvatlas score --tokens-file prompt.json --pods 10.0.0.7:8000,10.0.0.8:8000
        sed -n 7p truth-base.requests.jsonl | kvatlas score --tokens-file - --json
    """
    body = _prompt(tokens, tokens_file, text, chat)
    given = {"model": model, "lora_name": lora, "cache_salt": salt, "scorer": scorer}
    body.update({name: value for name, value in given.items() if value is not None})
    if pods is not None:
        body["pods"] = [pod.strip() for pod in pods.split(",") if pod.strip()]
    client = ServiceClient(url, token)
    if "model" not in body:
        body["model"] = _only_model(client)
    result, answer = client.score(body)
    if json:
        sys.stdout.write(answer.decode() + "\n")
        return
    nobody = None if result.pods else _nobody(body["model"], pods, client.pods()[0])
    show_table(lambda width: _shown(result, nobody, width))


def _prompt(tokens: str | None, file: Path | None, text: str | None, chat: Path | None) -> dict[str, Any]:
    """Return the fields of the request that the prompt comes with."""
    forms = {"--tokens": tokens, "--tokens-file": file, "--text": text, "--chat": chat}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) != 1:
        problem = f"is given with {given[1]}" if given else "is missing"
        raise RequestError(given[0] if given else "--text", problem, f"give one of {', '.join(forms)}")
    if tokens is not None:
        return {"token_ids": [_token(part, position) for position, part in enumerate(tokens.split(","))]}
    if text is not None:
        return {"text": _read_text(Path(text[1:])) if text.startswith("@") else _utf8(text)}
    if chat is not None:
        return _chat_of_file(chat)
    assert file is not None
    return _prompt_of_file(file)


def _chat_of_file(file: Path) -> dict[str, Any]:
    try:
        request = msgspec.json.decode(_read(file), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(str(file), f"is no chat completion request: {error}", 'write {"messages": [...]}') from None
    model = request.get("model")
    return {"chat": request} | ({"model": model} if isinstance(model, str) else {})


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("--text", f"is not UTF-8 at character {error.start}", "pass text in UTF-8") from None
    return text


def _read_text(file: Path) -> str:
    try:
        return _read(file).decode()
    except UnicodeDecodeError as error:
        raise RequestError("--text", f"{file} is not UTF-8: byte {error.start}", "save it as UTF-8") from None


def _read(file: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise RequestError(str(file), f"cannot be read: {error.strerror}", "name a file, or - for standard input") from None


def _prompt_of_file(file: Path) -> dict[str, Any]:
    from kvatlas.backtest import read_request

    content = _read(file).strip()
    if content.startswith(b"["):
        try:
            return {"token_ids": msgspec.json.decode(content, type=list[int])}
        except msgspec.DecodeError as error:
            raise RequestError(str(file), f"is no list of token ids: {error}", "write [1, 2, 3]") from None
    if b"\n" in content:
        lines = content.count(b"\n") + 1
        raise RequestError(str(file), f"holds {lines} lines", f"pass one: sed -n 7p {file} | kvatlas score --tokens-file -")
    request = read_request(content, str(file))
    known = {"model": request.model, "cache_salt": request.cache_salt}
    return {"token_ids": list(request.token_ids)} | {name: value for name, value in known.items() if value is not None}


def _token(text: str, position: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise RequestError("--tokens", f"{text!r:.40} at position {position} is no integer", "write 1,2,3") from None


def _only_model(client: ServiceClient) -> str:
    models = sorted({pod.model for pod in client.pods()[0] if pod.model})
    if len(models) != 1:
        known = f"the service knows {', '.join(models)}" if models else "the service knows none yet"
        raise RequestError("--model", f"is missing, and {known}", "name the model")
    return models[0]


def _shown(result: ScoreResult, nobody: str | None, width: int | None) -> RenderableType:
    """``nobody``: what is said instead of an empty table."""
    about = Text(
        f"{result.prompt_tokens} prompt tokens{_origin(result.tokens)}, {result.blocks} whole blocks; {result.cache_hits} of "
        f"them held by some pod ({result.coverage:.0%}). Scorer: {result.scorer}."
    )
    if nobody is not None:
        return Group(Text(nobody), about)
    pods = result.pods
    columns = [
        Column("pod", [Text(_name(pod)) for pod in pods], Gives.SHORTEN),
        Column("model", [Text(pod.model or "?") for pod in pods], Gives.FOLD),
        Column("score", [Text(f"{pod.score:.2f}") for pod in pods], right=True),
        Column("matched tokens", [Text(str(pod.matched_tokens)) for pod in pods], Gives.DROP, right=True),
        Column("predicted cached", [Text(str(pod.predicted_cached_tokens)) for pod in pods], Gives.WRAP, right=True),
        Column("tiers (blocks)", [Text(_tiers(pod)) for pod in pods], Gives.DROP),
        Column("stale", [Text(pod.stale_reason.value if pod.stale_reason else "", "yellow") for pod in pods]),
    ]
    return Group(fitted("Pods, best first", columns, width, GIVING_WAY), about)


def _origin(tokens: TokensInfo | None) -> str:
    """Say where the tokens of a text come from."""
    if tokens is None:
        return ""
    stored = f", {tokens.from_store} of them known" if tokens.from_store else ""
    begin = "" if tokens.complete else ": the beginning only"
    return f" ({tokens.source}, {tokens.tokenizer}{stored}{begin})"


def _name(pod: PodScore) -> str:
    return pod.pod if len(pod.predicted_by_rank) <= 1 else f"{pod.pod} rank {pod.dp_rank}"


def _nobody(model: str, asked: str | None, streams: Sequence[PodStatus]) -> str:
    """Say why no pod could be scored."""
    if not streams:
        return "No engine is known yet; `kvatlas pods` shows what the service listens to."
    serving = sorted({stream.pod for stream in streams if stream.model == model})
    if serving and asked is not None:
        return f"none of the pods {asked} serves model {model!r}; pods that do: {', '.join(serving)}"
    seen = sorted({stream.model for stream in streams if stream.model})
    return f"no pod serves model {model!r}; models seen: {', '.join(seen) or 'none, as no event has told one yet'}"


def _tiers(pod: PodScore) -> str:
    tiers = [f"{tier} {blocks}" for tier, blocks in sorted(pod.tiers.items())]
    if pod.speculative_blocks:
        tiers.append(f"{pod.speculative_blocks} promised")
    return ", ".join(tiers)
