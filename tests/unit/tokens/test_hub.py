"""What is fetched from a hub: a real HTTP server with the few routes that huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from kvatlas.config import TokenSettings
from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.local import hub as hub_module
from kvatlas.tokens.local.catalog import Catalog
from kvatlas.tokens.local.hub import Hub

COMMIT = "c" * 40
FILES = {
    "tokenizer.json": b'{"a": 1}',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "config.json": b"{}",
    "model.safetensors": b"w" * 1000,
    "pytorch_model.bin": b"w" * 1000,
    "tokenization_custom.py": b"import os",
    "README.md": b"#",
    "original/tokenizer.model": b"x",
}


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, dict[str, bytes]] = {"org/name": dict(FILES)}
        self.sizes: dict[str, int] = {}
        """Sizes that are told instead of the true ones."""
        self.asked: list[str] = []
        self.hangs = threading.Event()
        self.slow = threading.Event()
        self.slow.set()
        self.status: int | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files_asked(self) -> set[str]:
        return {path.rpartition(f"/resolve/{'main'}/")[2] for path in self.asked if "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if self.server.hangs.is_set():
            time.sleep(5)
            return
        self.server.slow.wait(10)
        if self.server.status is not None:
            self._answer(self.server.status, b"{}")
        elif path.startswith("/api/models/"):
            self._info(path.removeprefix("/api/models/"))
        else:
            name, _, rest = path.strip("/").partition("/resolve/")
            content = self.server.models.get(name, {}).get(rest.partition("/")[2])
            if content is None:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                self._answer(200, content, {"ETag": f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"'})

    def _info(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        if name == "org/gated":
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif name not in self.server.models:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("", "main", COMMIT):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [
                {"rfilename": file, "size": self.server.sizes.get(file, len(content)), "blobId": "0" * 40}
                for file, content in self.server.models[name].items()
            ]
            self._answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield serving
        serving.slow.set()
        serving.shutdown()
        thread.join(10)


@pytest.fixture(autouse=True)
def _asks_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def hub(server: HubServer, at: Path, timeout_s: float = 30, answer_timeout_s: float = 10) -> Hub:
    return Hub(cache_directory=at, endpoint=server.endpoint, timeout_s=timeout_s, answer_timeout_s=answer_timeout_s)


def refusal(of: Hub, name: str, revision: str | None = None) -> TokenizationError:
    with pytest.raises(TokenizationError) as caught:
        of.fetch(name, revision)
    return caught.value


def test_tokenizer_files_come_and_nothing_else_is_asked_for(server: HubServer, tmp_path: Path) -> None:
    directory = hub(server, tmp_path).fetch("org/name", None)
    wanted = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"}
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == {name: FILES[name] for name in wanted}
    assert server.files_asked() == wanted
    assert directory == tmp_path / "models--org--name" / "snapshots" / COMMIT
    assert (tmp_path / "models--org--name" / "refs" / "main").read_text() == COMMIT


def test_what_makes_a_tokenizer_comes_last(server: HubServer, tmp_path: Path) -> None:
    server.models["org/name"]["tekken.json"] = b"{}"
    hub(server, tmp_path).fetch("org/name", None)
    order = [path.rpartition("/")[2] for path in server.asked if "/resolve/" in path]
    assert list(dict.fromkeys(order))[-2:] == ["tekken.json", "tokenizer.json"]


def test_the_catalog_notes_the_commit_and_does_not_ask_again(server: HubServer, tmp_path: Path) -> None:
    settings = TokenSettings(hub=True)
    found = Catalog(settings, hub=hub(server, tmp_path)).find("org/name")
    assert (found.revision, found.kind, found.name) == (COMMIT, "huggingface", "org/name")
    asked = len(server.asked)
    assert Catalog(settings, hub=hub(server, tmp_path)).find("org/name") == found
    assert len(server.asked) == asked


def test_a_revision_is_asked_for_by_its_name(server: HubServer, tmp_path: Path) -> None:
    assert hub(server, tmp_path).fetch("org/name", COMMIT).name == COMMIT
    assert any(path.endswith(f"/revision/{COMMIT}") for path in server.asked)
    error = refusal(hub(server, tmp_path), "org/name", "v9")
    assert error.reason is TokenizationReason.UNKNOWN_MODEL
    assert "tokens.revisions" in error.remedy


@pytest.mark.parametrize(("name", "remedy"), [("org/absent", "name"), ("org/gated", "HF_TOKEN")])
def test_a_model_that_the_hub_does_not_give_is_unknown(server: HubServer, tmp_path: Path, name: str, remedy: str) -> None:
    error = refusal(hub(server, tmp_path), name)
    assert error.reason is TokenizationReason.UNKNOWN_MODEL
    assert remedy in error.remedy


@pytest.mark.parametrize("name", ["../x", "a/b/c", "/etc", "a b", "x" * 300, "", "a--b", "a/..", "http://x/y", "a?b=c", "a#b"])
def test_names_that_the_hub_cannot_have_are_not_asked_for(server: HubServer, tmp_path: Path, name: str) -> None:
    assert refusal(hub(server, tmp_path), name).reason is TokenizationReason.UNKNOWN_MODEL
    assert server.asked == []


def test_a_model_without_a_tokenizer_is_told(server: HubServer, tmp_path: Path) -> None:
    server.models["org/weights"] = {"model.safetensors": b"w"}
    assert "no tokenizer files" in refusal(hub(server, tmp_path), "org/weights").problem


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": hub_module.FILE_BYTES_MAX + 1},
        dict.fromkeys(("tokenizer.json", "tekken.json", "tokenizer.model"), 100 << 20),
    ],
)
def test_large_files_are_not_fetched(server: HubServer, tmp_path: Path, files: dict[str, int]) -> None:
    server.models["org/name"].update(dict.fromkeys(files, b"x"))
    server.sizes.update(files)
    assert refusal(hub(server, tmp_path), "org/name").reason is TokenizationReason.BROKEN_TOKENIZER
    assert server.files_asked() == set()


def test_a_hub_that_does_not_answer_is_given_up(server: HubServer, tmp_path: Path) -> None:
    server.hangs.set()
    begun = time.monotonic()
    error = refusal(hub(server, tmp_path, answer_timeout_s=0.3), "org/name")
    assert error.reason is TokenizationReason.UNAVAILABLE
    assert error.reason.transient
    assert time.monotonic() - begun < 4


def test_a_slow_download_goes_on_for_the_next_caller(server: HubServer, tmp_path: Path) -> None:
    server.slow.clear()
    of = hub(server, tmp_path, timeout_s=0.3)
    assert refusal(of, "org/name").reason is TokenizationReason.TIMEOUT
    server.slow.set()
    deadline = time.monotonic() + 20
    while not (tmp_path / "models--org--name" / "snapshots" / COMMIT / "tokenizer.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_hub_that_fails_or_is_not_there_is_told(server: HubServer, tmp_path: Path) -> None:
    server.status = 500
    assert refusal(hub(server, tmp_path), "org/name").reason is TokenizationReason.UNAVAILABLE
    of = Hub(cache_directory=tmp_path, endpoint="http://127.0.0.1:9", answer_timeout_s=2)
    assert refusal(of, "org/name").reason is TokenizationReason.UNAVAILABLE


def test_an_offline_hub_is_told(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refusal(hub(server, tmp_path), "org/name")
    assert error.reason is TokenizationReason.UNKNOWN_MODEL
    assert "HF_HUB_OFFLINE" in error.problem
    assert server.asked == []


def test_many_callers_share_one_download_and_few_run_at_a_time(server: HubServer, tmp_path: Path) -> None:
    of = hub(server, tmp_path)
    server.slow.clear()
    server.models.update({f"org/m{number}": dict(FILES) for number in range(10)})
    with ThreadPoolExecutor(32) as threads:
        same = [threads.submit(of.fetch, "org/name", None) for _ in range(8)]
        time.sleep(0.2)
        others = [threads.submit(of.fetch, f"org/m{number}", None) for number in range(10)]
        time.sleep(0.3)
        server.slow.set()
        assert len({future.result(30) for future in same}) == 1
        reasons = [getattr(future.exception(30), "reason", None) for future in others]
    assert reasons.count(TokenizationReason.BUSY) == 10 - (hub_module.IN_FLIGHT_MAX - 1)
    assert sum(path.startswith("/api/models/org/name") for path in server.asked) == 1
