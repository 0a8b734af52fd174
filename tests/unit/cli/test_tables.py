"""What `pods` and `score` show on narrow and wide screens, with names as long as real ones."""

from __future__ import annotations

import io
from typing import Any

import httpx
import msgspec
import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from kvatlas.cli import client as client_module
from kvatlas.cli import pods, score
from kvatlas.cli.app import app
from kvatlas.cli.columns import shortened
from kvatlas.results import PodScore, PodStatus, ScoreResult

POD = "vllm-llama-3-70b-instruct-decode-7f9c6d5b8-x0k9k:8000"
STALE_POD = "vllm-llama-3-70b-instruct-decode-7f9c6d5b8-abcde:8000"
MODEL = "meta-llama/Llama-3.1-70B-Instruct"


def status(**fields: Any) -> PodStatus:
    given = {
        "pod": POD,
        "dp_rank": 0,
        "model": MODEL,
        "state": "fresh",
        "stale_reason": None,
        "blocks": 123456,
        "orphans": 0,
        "block_sizes_tokens": (16,),
        "groups": {},
        "next_seq": 7,
        "queue_depth": 0,
        "gaps": 0,
        "replays": 0,
        "replay_answers": None,
        "restarts": 0,
        "last_event_age_s": 3.0,
        "source": "tcp://vllm-decode-0.vllm.svc:5557",
    }
    return msgspec.convert({**given, **fields}, PodStatus)


def scored(pod: str, stale_reason: str | None) -> PodScore:
    given = {"pod": pod, "model": MODEL, "score": 120.5, "matched_blocks": 125, "matched_tokens": 2000}
    given |= {"predicted_cached_tokens": 1984, "tiers": {"gpu": 125}, "dp_rank": 0, "predicted_by_rank": {0: 1984}}
    stale = {"speculative_blocks": 0, "stale": stale_reason is not None, "stale_reason": stale_reason}
    return msgspec.convert({**given, **stale}, PodScore)


def printed(shown: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), markup=False, highlight=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return "\n".join(lines)


STREAMS = [status(), status(pod=STALE_POD, state="stale", stale_reason="history_incomplete")]
RESULT = ScoreResult((scored(POD, None), scored(STALE_POD, "history_incomplete")), "longest-prefix", 2000, 125, 125, 1.0)


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_pods_tells_pod_model_and_state_on_any_screen(width: int) -> None:
    text = printed(pods._shown(STREAMS, width), width)
    for part in ("7f9c6d5b8-x0k9k:8000", "7f9c6d5b8-abcde:8000", MODEL, "123456", "fresh", "stale:", "history_incomplete"):
        assert part in text


def test_pods_ranks_stay_where_they_tell_streams_apart() -> None:
    text = printed(pods._shown([*STREAMS, status(dp_rank=1)], 80), 80)
    assert "rank" in text
    assert "rank" not in printed(pods._shown(STREAMS, 80), 80)


def test_pods_with_short_names_keep_a_line_each() -> None:
    short = status(pod="10.0.0.7:8000", model="llama")
    (row,) = [line for line in printed(pods._shown([short], 80), 80).splitlines() if "10.0.0.7" in line]
    for part in ("llama", "123456", "3.0 s", "fresh"):
        assert part in row


@pytest.mark.parametrize("width", [None, 250])
def test_pods_shows_all_where_there_is_room(width: int | None) -> None:
    text = printed(pods._shown(STREAMS, width), 250)
    for part in (POD, STALE_POD, "block size", "queue", "gaps", "replays", "restarts", "last event", "source", "5557"):
        assert part in text


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_score_tells_pod_model_prediction_and_staleness_on_any_screen(width: int) -> None:
    text = printed(score._shown(RESULT, None, width), width)
    for part in ("-x0k9k:8000", "-abcde:8000", MODEL, "120.50", "1984", "history_incomplete"):
        assert part in text


def test_score_shows_all_where_there_is_room() -> None:
    text = printed(score._shown(RESULT, None, None), 250)
    for part in (POD, STALE_POD, "matched tokens", "2000", "gpu 125", "stale"):
        assert part in text


def test_a_shortened_name_keeps_both_ends() -> None:
    assert shortened("decode-7f9c6d5b8-x0k9k", 11) == "decod…x0k9k"
    assert shortened("short", 5) == "short"


class Service:
    """A service with given streams that scores no pod."""

    def __init__(self, *streams: PodStatus) -> None:
        self._streams = streams

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/pods":
            return httpx.Response(200, content=msgspec.json.encode({"pods": self._streams}))
        return httpx.Response(200, content=msgspec.json.encode(ScoreResult((), "longest-prefix", 3, 0, 0, 0.0)))


def run(monkeypatch: pytest.MonkeyPatch, service: Service, *arguments: str) -> str:
    class Client(client_module.ServiceClient):
        def __init__(self, url: str, token: str | None = None) -> None:
            super().__init__(url, token, transport=httpx.MockTransport(service))

    monkeypatch.setattr(pods, "ServiceClient", Client)
    monkeypatch.setattr(score, "ServiceClient", Client)
    monkeypatch.delenv("COLUMNS", raising=False)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(
    ("service", "arguments", "told"),
    [
        (Service(*STREAMS), (), f"no pod serves model 'typo'; models seen: {MODEL}\n"),
        (Service(status(model=None)), (), "models seen: none, as no event has told one yet"),
        (Service(status(model="typo")), ("--pods", "elsewhere"), f"pods that do: {POD}"),
        (Service(), (), "No engine is known yet"),
    ],
)
def test_score_without_a_pod_says_why(
    monkeypatch: pytest.MonkeyPatch, service: Service, arguments: tuple[str, ...], told: str
) -> None:
    shown = run(monkeypatch, service, "score", "--model", "typo", "--tokens", "1,2,3", *arguments)
    assert told in shown
    assert "best first" not in shown


def test_what_goes_to_a_program_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run(monkeypatch, Service(*STREAMS), "pods")
    (row,) = [line for line in shown.splitlines() if STALE_POD in line]
    for part in (MODEL, "stale: history_incomplete", "tcp://vllm-decode-0.vllm.svc:5557"):
        assert part in row
