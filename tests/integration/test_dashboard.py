"""The dashboard in a real Chromium, in front of real services: what it shows, and that everybody can use it."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from kvatlas.serve.service import Addresses
from tests.integration.running import BLOCK, MODEL, PROMPT, client, filled, publish, running, stored
from tests.integration.test_route_service import chat, fleet
from tests.models.browser import NAMES, Browser, Page, browser, chromium_path

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(
        chromium_path() is None and os.environ.get("NEED_CHROMIUM") != "1",
        reason=f"no Chromium here ({', '.join(NAMES)}, or its path in CHROMIUM): apt-get install chromium",
    ),
    pytest.mark.timeout(300),
]

ELEMENTS_MAX = 2_500
CONTROLS = {"button", "textbox", "searchbox", "combobox", "radio", "link", "checkbox"}
ROWS = "[...document.querySelectorAll('#engine-table tbody tr')]"
HERE = """(() => { const one = document.activeElement; return one.id || one.getAttribute('href') || one.tagName.toLowerCase()
  + (one.getAttribute('aria-label') ?? '') })()"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with browser() as opened:
        yield opened


@asynccontextmanager
async def dashboard(chromium: Browser, addresses: Addresses, width: int = 1280) -> AsyncIterator[Page]:
    """Open the page, once it shows something."""
    async with chromium.page(f"{addresses.http}/", width) as page:
        await page.until("document.body.dataset.shown")
        yield page


# -- data -----------------------------------------------------------------------------------------------------------------


async def test_the_page_and_its_files_say_what_may_run_there_and_are_not_sent_twice() -> None:
    async with running() as addresses, client(addresses) as http:
        assert (await http.get("/")).headers["location"] == "dashboard"
        for path in ("/dashboard", "/dashboard/dashboard.css", "/dashboard/dashboard.js"):
            answer = await http.get(path)
            assert answer.headers["content-security-policy"].startswith(
                "default-src 'none'; script-src 'self'; style-src 'self'"
            )
            again = await http.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")


async def test_the_data_is_told_in_part_and_once() -> None:
    async with running() as addresses, client(addresses) as http:
        await filled(addresses)
        while True:  # what was looked at a moment ago is told again
            found = (await http.get("/v1/dashboard", params={"find": "pod-b"})).json()
            if found["engines"]:
                break
        assert [row["name"] for row in found["engines"]] == ["pod-b"]
        assert (found["engines_found"], found["fleet"]["totals"]["engines"]) == (1, 2)
        refused = await http.get("/v1/dashboard", params={"since": "yesterday"})
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, "since")


async def test_without_the_setting_there_is_no_page() -> None:
    async with running("api.dashboard=false") as addresses, client(addresses) as http:
        assert {(await http.get(path)).status_code for path in ("/", "/dashboard", "/v1/dashboard")} == {404}


async def test_a_preview_is_the_decision_that_a_request_gets_and_leaves_no_trace() -> None:
    async with fleet(3) as (addresses, _), client(addresses) as http:
        first = await chat(addresses, "one", "r1")
        messages = [{"role": "user", "content": "hello"}]
        shown = (await http.post("/v1/preview?candidates=2", json={"model": "tiny", "messages": messages})).json()["decisions"][
            0
        ]
        (profile,) = shown["profiles"]
        assert (len(profile["candidates"]), profile["candidates_count"]) == (2, 3)
        assert shown["outcome"] == {}
        kept = (await http.get("/v1/decisions?candidates=1")).json()["decisions"]
        assert [one["id"] for one in kept] == ["r1"]
        assert kept[0]["endpoint"] == first.headers["x-kvatlas-endpoint"]
        assert len(kept[0]["profiles"][0]["candidates"]) == 1
        loads = (await http.get("/v1/endpoints")).json()["endpoints"]
        assert sum(one["load"]["in_flight_requests"] for one in loads) == 0
        counted = re.findall(r"^kvatlas_route_decisions_total.* (\S+)$", (await http.get("/metrics")).text, re.MULTILINE)
        assert sum(map(float, counted)) == 1
        refused = await http.post("/v1/preview", json={"messages": messages})
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, "model")


# -- what is shown --------------------------------------------------------------------------------------------------------


async def test_engines_are_shown_as_their_events_say_and_stale_ones_with_what_to_do(chromium: Browser) -> None:
    async with running() as addresses:
        await filled(addresses)
        async with dashboard(chromium, addresses) as page:
            await page.until(f"{ROWS}.map(row => row.cells[0].firstChild.data).join() === 'pod-a,pod-b'")
            await page.until(f"{ROWS}.every(row => row.cells[1].textContent === '● fresh')")
            assert await page.run(f"{ROWS}.map(row => row.cells[2].textContent)") == ["5", "2"]
            await publish(addresses, [stored("pod-b", 7, PROMPT[:BLOCK], 900)])  # frames 1 to 6 are missing
            await page.until(f"{ROWS}[0].textContent.includes('pod-b') && {ROWS}[0].cells[1].textContent.includes('▲ stale')")
            card = "document.querySelector('#problem-cards li.warning')"
            await page.until(f"{card}?.textContent.includes('pod-b')")
            assert "What to do: " in await page.run(f"{card}.textContent")
            assert page.errors == []


async def test_routed_requests_show_as_figures_prefixes_and_decisions(chromium: Browser) -> None:
    async with fleet(2) as (addresses, _), dashboard(chromium, addresses) as page:
        for number in range(6):
            await chat(addresses, f"question {number}", f"r{number}")
        await page.until("document.querySelectorAll('#decision-list > li').length === 6")
        await page.until("document.querySelector('#prefix-tree .node')?.textContent.includes('6.0 requests')")
        await page.until("document.querySelector('#tiles').textContent.includes('as engines told')")
        await page.until("document.querySelectorAll('#charts svg').length === 4")
        await page.run("document.querySelector('#decision-list details').open = true")
        await page.until("document.querySelector('#decision-list table')?.textContent.includes('✓ picked')")
        await page.run("document.getElementById('figures').open = true")
        await page.until("document.querySelectorAll('#figure-table tbody tr').length > 0")
        assert page.errors == []


async def test_nothing_moves_while_paused(chromium: Browser) -> None:
    async with running() as addresses, dashboard(chromium, addresses) as page:
        await page.run("document.getElementById('pause').click()")
        await page.until("document.getElementById('connection').textContent.startsWith('Paused')")
        await filled(addresses)
        assert await page.run(f"{ROWS}.length") == 0
        await page.run("document.getElementById('pause').click()")
        await page.until(f"{ROWS}.length === 2")


async def test_five_hundred_engines_are_a_bounded_page_in_which_each_is_found(chromium: Browser) -> None:
    async with running() as addresses:
        frames = [stored(f"pod-{number:03}", 0, PROMPT[:BLOCK], number * 10) for number in range(500)]
        assert (await publish(addresses, frames)).accepted == 500
        async with dashboard(chromium, addresses) as page:
            await page.until("document.getElementById('engines-summary').textContent.startsWith('500 engines; shown are 60')")
            assert await page.run(f"{ROWS}.length") == 60
            assert await page.run("document.querySelectorAll('*').length") < ELEMENTS_MAX
            await page.run("document.getElementById('find').focus()")
            await page.type("pod-499")
            await page.until(f"{ROWS}.length === 1 && {ROWS}[0].textContent.startsWith('pod-499')")
            assert page.errors == []


# -- who would get a prompt -----------------------------------------------------------------------------------------------


async def asked(page: Page, kind: str, prompt: str, model: str = MODEL) -> str:
    """Ask with the form, and return the answer's text."""
    await page.run(f"document.querySelector('[name=kind][value={kind}]').click()")
    await page.run(f"document.getElementById('ask-model').value = '{model}'")
    await page.run("document.getElementById('ask-prompt').value = ''; document.getElementById('ask-prompt').focus()")
    await page.type(prompt)
    await page.run(
        "document.getElementById('ask-answer').textContent = ''; document.getElementById('ask-form').requestSubmit()"
    )
    await page.until("!['', 'Asking'].includes(document.getElementById('ask-answer').textContent)")
    return str(await page.run("document.getElementById('ask-answer').innerText"))


async def test_a_service_without_a_router_says_who_holds_a_prompt(chromium: Browser) -> None:
    async with running() as addresses:
        await filled(addresses)
        async with dashboard(chromium, addresses) as page:
            assert "pod-a holds the most: 80 of 80 tokens" in await asked(page, "tokens", ", ".join(map(str, PROMPT)))
            assert "holds any of its 3 tokens" in await asked(page, "tokens", "[1 2 3]")
            assert "no token id" in await asked(page, "tokens", "1, two, 3")
            assert page.errors == []
            assert "no tokenizer is configured" in await asked(page, "text", "hello")  # the console notes that 501


async def test_a_router_says_who_would_get_a_prompt_and_why(chromium: Browser) -> None:
    async with fleet(2) as (addresses, _):
        first = await chat(addresses, "one", "r1")
        async with dashboard(chromium, addresses) as page:
            for kind, prompt in (("chat", "hello"), ("chat", '[{"role": "user", "content": "hello"}]'), ("text", "hello")):
                answer = await asked(page, kind, prompt, "tiny")
                assert "would get it" in answer
                assert "✓ picked" in answer
            assert first.headers["x-kvatlas-endpoint"] in answer  # among the candidates
            assert page.errors == []


# -- a token --------------------------------------------------------------------------------------------------------------


async def test_with_a_token_the_page_asks_for_it_and_keeps_it_in_its_tab_alone(chromium: Browser) -> None:
    async with running("api.token=secret") as addresses:
        async with httpx.AsyncClient(base_url=addresses.http) as http:
            assert (await http.get("/dashboard")).status_code == 200
            assert (await http.get("/v1/dashboard")).status_code == 401
        async with chromium.page(f"{addresses.http}/dashboard") as page:
            await page.until("document.getElementById('token-dialog').open")
            await page.until("document.activeElement.id === 'token'")
            await page.type("wrong")
            await page.press("Enter")
            await page.until("document.getElementById('token-problem').textContent.includes('not accepted')")
            await page.until("document.activeElement.id === 'token'")
            await page.type("secret")
            await page.press("Enter")
            await page.until("document.body.dataset.shown")
            assert await page.run("[localStorage.length, document.cookie, location.search]") == [0, "", ""]
        async with chromium.page(f"{addresses.http}/dashboard") as another:
            await another.until("document.getElementById('token-dialog').open")


# -- for everybody --------------------------------------------------------------------------------------------------------


async def test_all_can_be_done_with_the_keyboard(chromium: Browser) -> None:
    async with running() as addresses:
        await filled(addresses)
        async with dashboard(chromium, addresses) as page:
            await page.press("Tab")
            assert await page.run(HERE) == "#main"
            assert await page.run("document.activeElement.getBoundingClientRect().left >= 0")
            stops = []
            while "metrics" not in stops and len(stops) < 60:
                stops.append(await page.run(HERE))
                outline = await page.run("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"focus cannot be seen on {stops[-1]}"
                await page.press("Tab")
            wanted = ["#main", "pause", "theme", "#problems", "#ask", "find", "ask-model", "ask-prompt", "docs", "metrics"]
            assert [stop for stop in stops if stop in wanted] == wanted
            await page.until("document.getElementById('ask-model').value")
            await page.run("document.getElementById('ask-prompt').focus()")
            await page.run("document.querySelector('[value=tokens]').checked = true")
            await page.type(" ".join(map(str, PROMPT)))
            await page.press("Tab")
            await page.press("Enter")
            await page.until("document.getElementById('ask-answer').textContent.includes('pod-a holds the most')")
            await page.run("document.getElementById('figures').querySelector('summary').focus()")
            await page.press("Enter")
            await page.until("document.getElementById('figures').open")


async def test_focus_stays_where_it_is_while_figures_change(chromium: Browser) -> None:
    async with fleet(2) as (addresses, _), dashboard(chromium, addresses) as page:
        await chat(addresses, "one", "r1")
        await page.until("document.querySelector('#decision-list summary')")
        await page.run("document.querySelector('#decision-list summary').focus()")
        await page.press("Enter")
        await page.until("document.querySelector('#decision-list details').open")
        await chat(addresses, "two", "r2")
        await page.until("document.querySelectorAll('#decision-list > li').length === 2")
        assert await page.run(f"{HERE} + document.activeElement.closest('li')?.dataset.key") == "summaryr1"
        assert await page.run("document.activeElement.parentElement.open")


async def test_assistive_technology_finds_names_headings_and_tables(chromium: Browser) -> None:
    async with fleet(2) as (addresses, _), dashboard(chromium, addresses) as page:
        await chat(addresses, "one", "r1")
        await page.until("document.querySelectorAll('#decision-list > li').length === 1")
        nodes = await page.accessible()
        nameless = [
            node["role"]["value"]
            for node in nodes
            if node["role"]["value"] in {*CONTROLS, "img", "table", "region", "navigation", "dialog"}
            and not node.get("name", {}).get("value")
        ]
        assert nameless == []
        levels = [
            next(one["value"]["value"] for one in node["properties"] if one["name"] == "level")
            for node in nodes
            if node["role"]["value"] == "heading"
        ]
        assert levels[0] == 1
        assert all(later <= earlier + 1 for earlier, later in pairwise(levels)), levels
        roles = {node["role"]["value"] for node in nodes}
        assert {"banner", "navigation", "main", "contentinfo", "columnheader", "rowheader", "status"} <= roles
        assert await page.run("document.documentElement.lang") == "en"
        twice = "[...document.querySelectorAll('[id]')].map(one => one.id).filter((id, at, all) => all.indexOf(id) !== at)"
        assert await page.run(twice) == []


async def test_where_routing_goes_by_history_alone_the_page_says_why_there_are_no_prefixes(
    chromium: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "epp.yaml"
    file.write_text(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
        "plugins: [{type: approx-prefix-cache-producer}, {type: prefix-cache-scorer}]\n"
        "schedulingProfiles: [{name: default, plugins: [{pluginRef: prefix-cache-scorer}]}]\n"
    )
    async with fleet(1, f"route.pickerConfig={file}") as (addresses, _), dashboard(chromium, addresses) as page:
        await chat(addresses, "one", "r1")
        await page.until("document.getElementById('prefixes-note').textContent.includes('no prompt is looked up in the index')")


async def test_a_phone_shows_all_without_scrolling_sideways(chromium: Browser) -> None:
    async with fleet(2) as (addresses, _), dashboard(chromium, addresses, 360) as page:
        for number in range(3):
            await chat(addresses, f"question {number}", f"r{number}")
        await page.until("document.querySelectorAll('#decision-list > li').length === 3")
        await page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
        await page.until("document.querySelector('#decision-list table')")
        assert await page.run("document.documentElement.scrollWidth") == 360


async def test_colors_are_the_systems_until_chosen_and_a_choice_stays(chromium: Browser) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    async with running() as addresses, dashboard(chromium, addresses) as page:
        light = await page.run(ground)
        await page.prefer(dark=True)
        dark = await page.run(ground)
        assert dark != light
        await page.run("document.getElementById('theme').value = 'light'")
        await page.run("document.getElementById('theme').dispatchEvent(new Event('change'))")
        assert await page.run(ground) == light
        await page.call("Page.reload")
        await page.until("document.readyState === 'complete' && document.body.dataset.shown")
        assert await page.run(ground) == light
