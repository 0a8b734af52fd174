"""The scorers in a router that is built from llm-d's configuration: what each is for comes out in where requests go."""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from pathlib import Path

import pytest

from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import EngineReport
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.plugins import plugin_types
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Router
from kvatlas.types import PodId

SCORERS = [
    "active-request-scorer",
    "context-length-aware",
    "kv-cache-utilization-scorer",
    "latency-scorer",
    "load-aware-scorer",
    "lora-affinity-scorer",
    "no-hit-lru-scorer",
    "prefix-cache-scorer",
    "queue-scorer",
    "running-requests-size-scorer",
    "session-affinity-scorer",
    "token-load-scorer",
]


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def router(*plugins: str, clock: Clock | None = None) -> Router:
    """Build one with three endpoints. ``plugins``: as entries of ``plugins``, all of them in the only profile."""
    entries = "".join(f"- {one}\n" for one in plugins)
    made = build_router(
        read_config(f"apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n{entries}"),
        clock=clock or Clock(),
        random=random.Random(1),
    )
    made.set_endpoints(endpoints())
    return made


def endpoints() -> list[Endpoint]:
    return [Endpoint(name=EndpointName(f"ns/{name}"), address="10.0.0.1", port=8000, pod=PodId(name)) for name in "abc"]


def ask(router: Router, number: int, prompt: int = 0, **headers: str) -> str:
    request = RouteRequest(
        id=str(number),
        model="m",
        token_ids=array("I", [prompt] * 640),
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )
    return str(router.decide(request).decision.target.name)


PAGE = Path(__file__).parents[4] / "docs" / "scorers.md"


def test_the_page_names_all_of_them() -> None:
    own = {name for name, point in plugin_types().items() if point.value.startswith("kvatlas.route.scorers.")}
    rows = set(re.findall(r"^\| `([a-z]+-[a-z-]+)` \|", PAGE.read_text(), re.MULTILINE))
    assert own == rows | {"session-affinity-scorer", "session-affinity-filter"}


def test_the_pages_example_decides_as_the_page_says() -> None:
    (example,) = re.findall(r"^```yml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    made = build_router(read_config(example), clock=Clock(), random=random.Random(1))
    made.set_endpoints(endpoints())
    prompt = array("I", [0] * 640)

    def totals(number: int, tokens: int) -> dict[str, float]:
        flight = made.decide(RouteRequest(id=str(number), model="m", token_ids=prompt[:tokens]))
        run = flight.decision.runs["default"]
        assert run is not None
        return {one.name: total for one, total in zip(run.candidates, run.totals, strict=True)}

    totals(0, 320)
    (busy,) = (one.name for one in made.endpoints if made.load(one.name).in_flight.requests)
    totals(1, 320)
    totals(2, 320)
    assert made.load(busy).in_flight.requests == 3
    found = totals(3, 640)
    assert found.pop(busy) == pytest.approx(2.0)
    assert list(found.values()) == pytest.approx([2.5, 2.5])


def test_all_of_them_together_route() -> None:
    made = router(*(f"{{type: {name}}}" for name in SCORERS))
    decision = made.decide(RouteRequest(id="r", model="m", token_ids=array("I", range(640)))).decision
    run = decision.runs["default"]
    assert run is not None
    assert {rating.scorer for rating in run.ratings} == set(SCORERS)
    assert all(len(rating.scores) == 3 for rating in run.ratings)


def test_requests_in_flight_spread_what_follows() -> None:
    made = router("{type: active-request-scorer}")
    assert Counter(ask(made, number) for number in range(9)) == {"ns/a": 3, "ns/b": 3, "ns/c": 3}


def test_prompts_that_nobody_holds_go_around() -> None:
    made = router("{type: no-hit-lru-scorer}")
    went = [ask(made, number, prompt=number) for number in range(9)]
    assert len(set(went[:3])) == 3
    assert went[3:6] == went[:3]
    assert went[6:] == went[:3]


def test_a_session_header_leads_back() -> None:
    made = router("{type: session-affinity-filter}")
    first = made.decide(RouteRequest(id="first", model="m"))
    headers = made.response_headers(first.decision, first.endpoint)
    for number in range(5):
        request = RouteRequest(id=str(number), model="m", headers=headers)
        assert made.decide(request).decision.target == first.decision.target


def test_a_session_id_leads_back_until_it_is_forgotten() -> None:
    clock = Clock()
    made = router("{type: session-affinity-filter, parameters: {strategy: session_id}}", clock=clock)
    first = ask(made, 0, x_session_id="s")
    assert {ask(made, number, x_session_id="s") for number in range(1, 9)} == {first}
    clock.now_s += 301
    assert len({ask(made, number) for number in range(20)}) == 3


def test_a_burst_of_one_prompt_meets_before_anything_is_cached() -> None:
    made = router(
        "{type: burst-prefix-cache-producer, parameters: {maxPerReplica: 4}}",
        "{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: burst-prefix-cache-producer}}",
    )
    assert sorted(Counter(ask(made, number) for number in range(12)).values()) == [4, 4, 4]
    assert sorted(Counter(ask(made, 100 + number, prompt=1) for number in range(6)).values()) == [2, 4]


@pytest.mark.parametrize("scorer", ["queue-scorer", "kv-cache-utilization-scorer", "load-aware-scorer", "latency-scorer"])
def test_busy_engines_are_passed_over(scorer: str) -> None:
    made = router(f"{{type: {scorer}}}")
    for name in "ab":
        made.report(EndpointName(f"ns/{name}"), EngineReport(at_s=100.0, waiting=9, kv_usage=0.9))
    assert {ask(made, number) for number in range(5)} == {"ns/c"}
