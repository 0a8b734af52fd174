"""Endpoints from a real file that changes in the ways in which files change."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvatlas.config import EngineSettings
from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.discovery.file import FileDiscovery
from kvatlas.discovery.static import StaticDiscovery
from kvatlas.errors import ConfigError
from kvatlas.route.endpoint import Endpoint
from tests.models.following import beside, write_at_once


class Told:
    """What a discovery told."""

    def __init__(self) -> None:
        self.pools: asyncio.Queue[list[str]] = asyncio.Queue()
        self.engines: list[Sequence[EngineSettings]] = []
        self.failures = 0
        self.failure = asyncio.Event()

    def changed(self, endpoints: Sequence[Endpoint]) -> None:
        self.pools.put_nowait([endpoint.name.removeprefix("default/") for endpoint in endpoints])

    def failed(self) -> None:
        self.failures += 1
        self.failure.set()

    async def next(self) -> list[str]:
        async with asyncio.timeout(30):
            return await self.pools.get()

    async def next_failure(self) -> None:
        async with asyncio.timeout(30):
            await self.failure.wait()
        self.failure.clear()


@asynccontextmanager
async def watching(path: Path, watch: bool = True) -> AsyncIterator[Told]:
    told = Told()
    discovery = FileDiscovery(path, watch=watch, interval_s=0.005, subscribe=told.engines.append, failed=told.failed)
    async with beside(discovery.run(told.changed)):
        yield told


def content(*names: str) -> str:
    return "endpoints:\n" + "".join(f"- {{name: {name}, address: 10.0.0.7, port: 8000}}\n" for name in names)


def overwrite(path: Path, text: str) -> None:
    """Write in place; size and time of the file stay what they were."""
    before = path.stat()
    assert before.st_size == len(text)
    with path.open("r+") as opened:
        opened.write(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(path: Path) -> None:
    path.unlink()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "endpoints.yaml"
    path.write_text(content("a", "b"))
    return path


async def test_what_is_written_in_place_is_seen_even_at_the_same_size_and_time(file: Path) -> None:
    async with watching(file) as told:
        assert await told.next() == ["a", "b"]
        overwrite(file, content("a", "c"))
        assert await told.next() == ["a", "c"]


async def test_a_file_renamed_over_it_is_seen(file: Path) -> None:
    async with watching(file) as told:
        await told.next()
        write_at_once(file, content("c"))
        assert await told.next() == ["c"]


async def test_a_config_map_that_swaps_its_symlinks_is_seen(tmp_path: Path) -> None:
    for version, name in (("..1", "a"), ("..2", "b")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "endpoints.yaml").write_text(content(name))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "endpoints.yaml").symlink_to("..data/endpoints.yaml")
    async with watching(tmp_path / "endpoints.yaml") as told:
        assert await told.next() == ["a"]
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        assert await told.next() == ["b"]


async def test_a_bad_file_leaves_endpoints_as_they_were_and_says_so_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with watching(file) as told:
        await told.next()
        write_at_once(file, "endpoints: [")
        await told.next_failure()
        remove(file)
        await told.next_failure()
        write_at_once(file, content("a") + "- {name: b}\n")
        await told.next_failure()
        write_at_once(file, content("a"))
        assert await told.next() == ["a"]
        assert told.pools.empty()
    assert told.failures == 3, "once for each problem, however often it was looked at"
    assert sum("the endpoints file is bad" in record.getMessage() for record in caplog.records) == 3
    assert "endpoints[1] (b).address: is missing" in caplog.text


async def test_a_file_that_comes_back_is_told_again(file: Path) -> None:
    async with watching(file) as told:
        await told.next()
        remove(file)
        await told.next_failure()
        write_at_once(file, content("a", "b"))
        assert await told.next() == ["a", "b"]


async def test_a_file_that_is_not_watched_is_read_once(file: Path) -> None:
    async with watching(file, watch=False) as told:
        assert await told.next() == ["a", "b"]
        remove(file)
    assert told.failures == 0


async def test_engines_whose_events_it_names_are_told_before_its_endpoints(file: Path) -> None:
    write_at_once(file, 'endpoints: [{name: a, address: h, port: 1, kvEvents: {endpoint: "tcp://h:5557"}}]')
    async with watching(file) as told:
        await told.next()
        assert [[engine.endpoint for engine in engines] for engines in told.engines] == [["tcp://h:5557"]]


@pytest.mark.parametrize("bad", ["missing", "directory", "content"])
async def test_a_file_that_is_bad_at_the_start_is_an_error(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "endpoints.yaml"
    if bad == "directory":
        path.mkdir()
    elif bad == "content":
        path.write_text("endpoints: 3")
    with pytest.raises(ConfigError, match=r"endpoints\.yaml: is no"):
        await FileDiscovery(path).run(lambda _: None)


async def test_endpoints_of_flags_are_told_once() -> None:
    told = Told()
    task = asyncio.create_task(StaticDiscovery(pool_from_urls(["http://a", "http://b"]).endpoints).run(told.changed))
    assert await told.next() == ["a:80", "b:80"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert told.pools.empty()
