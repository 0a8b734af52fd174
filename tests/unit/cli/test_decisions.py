"""`kvatlas explain` finds decisions whichever worker made them, and says whose are missing."""

from __future__ import annotations

import httpx
import msgspec
import pytest

from kvatlas.cli.client import ServiceClient
from kvatlas.cli.decisions import Found, decisions_of_all
from kvatlas.errors import RequestError
from kvatlas.serve.routing.explain import DecisionsAnswer, DecisionShown, OutcomeShown

PORTS = (8080, 8081, 8082)


def made(name: str, at_s: float) -> DecisionShown:
    return DecisionShown(
        id=name,
        at_s=at_s,
        model="m",
        prompt_tokens=1,
        prompt_tokens_estimated=False,
        endpoint="default/a",
        address="10.0.0.1:8000",
        why="",
        predicted_cached_tokens=None,
        outcome=OutcomeShown(),
        took_us=1.0,
        notes=(),
        prefill=None,
        encoders=(),
        profiles=(),
    )


class Service:
    """Workers at :data:`PORTS`, each with decisions of its own; some of them down."""

    def __init__(
        self, decisions: dict[int, list[DecisionShown]], *, ports: str = "8080 8081 8082", down: frozenset[int] = frozenset()
    ):
        self.decisions = decisions
        self.ports = ports
        self.down = down
        self.asked: list[int] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        port = request.url.port or 80
        if port in self.down:
            raise httpx.ConnectError("refused", request=request)
        assert request.headers["authorization"] == "Bearer t"
        headers = {"x-kvatlas-worker": f"{port - 8080} of 3", "x-kvatlas-api-ports": self.ports}
        found, wanted = self.decisions.get(port, []), request.url.params.get("id")
        if wanted is not None:
            self.asked.append(port)
            found = [one for one in found if one.id == wanted]
            if not found:
                told = {"field": "id", "problem": "none is kept", "remedy": "this is worker"}
                return httpx.Response(422, content=msgspec.json.encode({"error": told}))
        limit = int(request.url.params["limit"])
        return httpx.Response(200, content=msgspec.json.encode(DecisionsAnswer(tuple(found[:limit]))), headers=headers)

    def find(self, request_id: str | None = None, limit: int = 20, port: int = 8081) -> Found:
        client = ServiceClient(f"http://kvatlas:{port}", "t", transport=httpx.MockTransport(self.answer))
        return decisions_of_all(client, request_id, None, limit)


SPREAD = {8080: [made("a", 5.0), made("b", 1.0)], 8081: [made("c", 3.0)], 8082: [made("d", 4.0)]}


def test_decisions_of_all_workers_are_listed_newest_first() -> None:
    assert [one.id for one in Service(SPREAD).find().decisions] == ["a", "d", "c", "b"]
    assert [one.id for one in Service(SPREAD).find(limit=2).decisions] == ["a", "d"]


@pytest.mark.parametrize("request_id", ["a", "c", "d"])
def test_one_decision_is_found_whichever_worker_made_it(request_id: str) -> None:
    service = Service(SPREAD)
    found = service.find(request_id)
    assert ([one.id for one in found.decisions], found.missing) == ([request_id], ())
    assert sorted(service.asked) == list(PORTS)


def test_a_decision_that_no_worker_made_is_refused_for_all_of_them() -> None:
    with pytest.raises(RequestError, match="none is kept; all 3 workers were asked"):
        Service(SPREAD).find("nobody")


def test_a_worker_that_does_not_answer_is_named() -> None:
    service = Service(SPREAD, down=frozenset({8082}))
    found = service.find()
    assert [one.id for one in found.decisions] == ["a", "c", "b"]
    (missing,) = found.missing
    assert "http://kvatlas:8082" in missing
    with pytest.raises(RequestError, match="not all workers answered: http://kvatlas:8082"):
        service.find("d")


def test_where_workers_have_free_ports_the_answer_says_that_it_is_ones_own() -> None:
    found = Service(SPREAD, ports="").find()
    assert [one.id for one in found.decisions] == ["c"]
    assert "this is worker 1 of 3" in found.missing[0]
