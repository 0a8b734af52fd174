"""Makes the pictures of docs/dashboard.md: a real router in front of engines with events, real traffic, a real Chromium.

python -m docs.screenshots           writes docs/images/dashboard-*.png; needs a Chromium (apt-get install chromium)
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx

from kvatlas.serve.service import Addresses
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.live.faults import Fault
from tests.integration.running import BLOCK, PROMPT, publish, running, stored
from tests.models.browser import Page, browser
from tests.models.chats import DATA
from tests.models.embedded import Watched, engine

IMAGES = Path(__file__).parent / "images"
TINY = DATA / "tinymodel"
ENGINES = 6
COSTS = EngineCosts(step_s=0.004, prefill_token_s=1 / 4_000)
SECONDS = 45
"""Of traffic, before the pictures are taken."""
USERS = 14
COMPANY = "You work for an airline that flies to every town with more than a hundred inhabitants, and never loses a bag. " * 8
ROLES = (
    "You book flights, and ask for what is missing before you book. " * 10,
    "You answer complaints, kindly, and never promise money. " * 8,
    "You write code in Rust for the booking system, with tests. " * 12,
    "You translate what passengers say into the language of the crew. " * 9,
    "You plan crews and their rest, and show the rule for each change. " * 9,
    "You sum up reports of flights for people who have one minute. " * 9,
)
SHOWN = "document.body.dataset.shown"


@asynccontextmanager
async def fleet() -> AsyncIterator[tuple[Addresses, list[Watched]]]:
    """Run engines, and a router in front of them; one of them sends no events, and another has blocks of another size."""
    async with AsyncExitStack() as stack:
        sizes = [16] * (ENGINES - 2) + [24, 16]
        specs = [EngineSpec(costs=COSTS, gpu_blocks=700, block_size_tokens=size) for size in sizes]
        engines = [await stack.enter_async_context(engine(spec)) for spec in specs]
        followed = [
            {"endpoint": one.running.started.events, "replayEndpoint": one.running.started.replay, "pod": f"engine-{number}"}
            for number, one in enumerate(engines[:-1])
        ]
        urls = [f"{one.url}?pod=engine-{number}&name=engine-{number}" for number, one in enumerate(engines)]
        settings = (
            *("proxy.port=0", 'route.frontDoors=["proxy"]', f"tokens.models.tiny={TINY}", "route.tokensTimeout=10s"),
            *(f"route.endpoints={json.dumps(urls)}", f"zmq.engines={json.dumps(followed)}"),
        )
        yield await stack.enter_async_context(running(*settings)), engines


async def user(addresses: Addresses, number: int) -> None:
    """Hold one conversation after the other."""
    drawn = random.Random(number)  # noqa: S311  the same users each time
    assert addresses.proxy is not None
    async with httpx.AsyncClient(base_url=addresses.proxy, timeout=60) as http:
        for conversation in itertools.count():
            messages = [{"role": "system", "content": COMPANY + drawn.choice(ROLES)}]
            for turn in range(drawn.randrange(1, 5)):
                words = " ".join(f"{drawn.randrange(10_000)}" for _ in range(drawn.randrange(10, 80)))
                messages.append({"role": "user", "content": f"{number} {conversation} {turn}: {words}"})
                body = {"model": "tiny", "messages": messages, "max_tokens": drawn.randrange(8, 60)}
                body |= {"stream": True, "stream_options": {"include_usage": True}}
                answer = await http.post("/v1/chat/completions", json=body)
                messages.append({"role": "assistant", "content": answer.text[:200]})
                await asyncio.sleep(drawn.expovariate(2.0))


async def take(page: Page, name: str) -> None:
    file = IMAGES / f"dashboard-{name}.png"
    file.write_bytes(await page.picture())
    print(file.name, file.stat().st_size)


async def busy_fleet() -> None:
    """Take the pictures of a router at work: light, dark, phone, and of a question."""
    async with fleet() as (addresses, engines), browser() as chromium:
        users = [asyncio.create_task(user(addresses, number)) for number in range(USERS)]
        async with chromium.page(f"{addresses.http}/dashboard", 1280, 1250) as page:
            await asyncio.sleep(SECONDS)
            engines[0].fail(Fault("lose-events", times=3))
            await page.until("document.querySelector('#engine-table').textContent.includes('▲ stale')")
            await take(page, "light")
            await page.prefer(dark=True)
            await take(page, "dark")
            await page.prefer(dark=False)
            await page.run("document.querySelector('#decision-list details').open = true")
            await page.run("document.getElementById('pause').click()")
            await page.run("document.getElementById('ask-prompt').focus()")
            await page.type("I want to change my flight.")
            await page.run("document.getElementById('ask-form').requestSubmit()")
            await page.until("document.querySelector('#ask-answer table')")
            await page.run("document.getElementById('decisions').scrollIntoView()")
            await take(page, "decisions")
        async with chromium.page(f"{addresses.http}/dashboard", 360, 1400) as page:
            await page.until(SHOWN)
            await take(page, "phone")
        for one in users:
            one.cancel()
        await asyncio.gather(*users, return_exceptions=True)


async def large_fleet() -> None:
    """Take the picture of five hundred engines."""
    async with running() as addresses, browser() as chromium:
        frames = [stored(f"engine-{number:03}", 0, PROMPT[:BLOCK], number * 10) for number in range(500)]
        await publish(addresses, frames)
        await publish(addresses, [stored(f"engine-{number:03}", 5, PROMPT, 90_000) for number in (17, 230)])
        async with chromium.page(f"{addresses.http}/dashboard", 1280, 1000) as page:
            await page.until("document.querySelector('#problem-cards').textContent.includes('Events were lost')")
            await page.until("document.getElementById('engines-summary').textContent.startsWith('500 engines')")
            await take(page, "500")


async def main() -> None:
    await busy_fleet()
    await large_fleet()


if __name__ == "__main__":
    asyncio.run(main())
