"""The demo's users, through a real router, before engines that fail."""

from __future__ import annotations

from kvatlas.demo.fleet import Router
from kvatlas.demo.trace import sessions
from kvatlas.demo.users import Sent, Traffic
from kvatlas.serve.service import Addresses
from kvatlas.sim.live.faults import Fault
from tests.integration.test_route_service import service
from tests.models.embedded import embedded


async def sent_to(addresses: Addresses, count: int) -> list[Sent]:
    """Let one user send so many requests."""
    assert addresses.proxy is not None
    sent: list[Sent] = []

    def told(one: Sent) -> None:
        sent.append(one)
        if len(sent) == count:
            traffic.end()

    traffic = Traffic(Router(addresses.http, addresses.proxy), sessions(1), 1, told)
    await traffic.run(1)
    return sent


async def test_a_request_whose_answer_breaks_off_is_sent_again() -> None:
    async with (
        embedded(faults=(Fault("cut", times=1, after=2),)) as (one, _),
        service(f'route.endpoints=["{one.started.url}"]') as addresses,
    ):
        (sent,) = await sent_to(addresses, 1)
    assert (sent.cut, sent.problem) == (1, None)
    assert sent.ttft_s > 0


async def test_a_request_that_nobody_answers_has_failed() -> None:
    async with (
        embedded(faults=(Fault("status", status=503),)) as (one, _),
        service(f'route.endpoints=["{one.started.url}"]') as addresses,
    ):
        (sent,) = await sent_to(addresses, 1)
    assert sent.problem is not None
    assert sent.problem.startswith("503")


async def test_what_was_cached_and_predicted_is_noted() -> None:
    async with embedded() as (running, _):
        one = running.started
        named = f"http://{one.pod}?kvEvents={one.events}&replayEndpoint={one.replay}&name=engine-1"
        async with service(f'route.endpoints=["{named}"]') as addresses:
            sent = await sent_to(addresses, 8)
    assert {each.engine for each in sent} == {"engine-1"}
    assert all(len(each.prompt) >= 12 for each in sent)
    compared = [each for each in sent if each.predicted_tokens is not None]
    assert len(compared) >= 6
    assert all(each.predicted_tokens == each.cached_tokens for each in compared)
    assert any(each.cached_tokens for each in compared)
