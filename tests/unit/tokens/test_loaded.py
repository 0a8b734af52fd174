"""Tokenizers in memory: loaded once, bounded, broken ones left alone for a while."""

from __future__ import annotations

import shutil
import threading
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from kvatlas.config import TokenSettings
from kvatlas.errors import ConfigError, TokenizationError, TokenizationReason
from kvatlas.tokens.local.catalog import Catalog
from kvatlas.tokens.local.huggingface import load_huggingface
from kvatlas.tokens.local.loaded import LoadedTokenizers
from kvatlas.tokens.local.mistral import load_mistral
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt

TINY = Path(__file__).parents[2] / "data" / "tinymodel"
TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"


class Tokenizer:
    """A LocalTokenizer that remembers how it was loaded."""

    text = None
    max_model_len = None
    chars_per_token_max = 1

    def __init__(self, name: str, revision: str | None, chat_template: str | None) -> None:
        self.name = name
        self.revision = revision
        self.chat_template = chat_template

    def render(self, chat: ChatPrompt) -> str:
        raise NotImplementedError

    def tokenize(self, prompt: Prompt) -> array[int]:
        return array("I", [1])


class Loader:
    """Counts what it loads; waits at a gate, and fails for what is in ``broken``."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.gates: dict[str, threading.Event] = {}
        self.broken: dict[str, Exception] = {}
        self.begun = threading.Event()

    def __call__(
        self,
        directory: Path,
        *,
        name: str,
        revision: str | None,
        chat_template: str | None = None,
        trust_request_template: bool = False,
    ) -> Tokenizer:
        self.loads[directory.name] += 1
        self.begun.set()
        if directory.name in self.gates:
            assert self.gates[directory.name].wait(20)
        if directory.name in self.broken:
            raise self.broken[directory.name]
        return Tokenizer(name, revision, chat_template)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def loader() -> Loader:
    return Loader()


def tokenizers(at: Path, loader: Loader, names: str = "abcde", loaded_max: int = 8, **more: Any) -> LoadedTokenizers:
    for name in names:
        (at / "models" / name).mkdir(parents=True, exist_ok=True)
        (at / "models" / name / "tokenizer.json").write_text("{}")
    settings = TokenSettings(directories=(str(at / "models"),), models=more.pop("models", {}))
    return LoadedTokenizers(Catalog(settings), {"huggingface": loader}, loaded_max, **more)


def test_many_threads_that_ask_at_a_time_share_one_load(tmp_path: Path, loader: Loader) -> None:
    of = tokenizers(tmp_path, loader)
    loader.gates["a"] = threading.Event()
    with ThreadPoolExecutor(32) as threads:
        futures = [threads.submit(of.get, "a") for _ in range(32)]
        assert loader.begun.wait(10)
        loader.gates["a"].set()
        assert len({id(future.result(20)) for future in futures}) == 1
    assert loader.loads == {"a": 1}
    assert of.loads == 1


def test_others_are_to_be_had_while_one_loads(tmp_path: Path, loader: Loader) -> None:
    of = tokenizers(tmp_path, loader)
    of.get("b")
    loader.begun.clear()
    loader.gates["a"] = threading.Event()
    slow = threading.Thread(target=of.get, args=("a",))
    slow.start()
    assert loader.begun.wait(10)
    assert of.get("b").tokenize
    assert of.get("c").tokenize
    assert {status.models for status in of.loaded()} == {("b",), ("c",)}
    loader.gates["a"].set()
    slow.join(10)


def test_a_peek_never_loads_and_never_waits(tmp_path: Path, loader: Loader) -> None:
    of = tokenizers(tmp_path, loader, loaded_max=1)
    assert of.peek("a") is None
    loader.gates["a"] = threading.Event()
    slow = threading.Thread(target=of.get, args=("a",))
    slow.start()
    assert loader.begun.wait(10)
    assert of.peek("a") is None
    loader.gates["a"].set()
    slow.join(10)
    assert of.peek("a") is of.get("a")
    of.get("b")
    assert of.peek("a") is None
    assert loader.loads == {"a": 1, "b": 1}


def test_the_least_recently_used_goes(tmp_path: Path, loader: Loader) -> None:
    of = tokenizers(tmp_path, loader, loaded_max=2)
    for name in "abac":
        of.get(name)
    assert [status.models for status in of.loaded()] == [("c",), ("a",)]
    assert of.evictions == 1
    of.get("a")
    assert loader.loads["a"] == 1
    of.get("b")
    assert loader.loads["b"] == 2


def test_models_with_the_same_tokenizer_share_it_unless_their_templates_differ(tmp_path: Path, loader: Loader) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    of = tokenizers(tmp_path, loader, models={"x": "a", "y": "a"}, chat_templates={"y": str(template)})
    assert of.get("a") is of.get("x")
    other = of.get("y")
    assert isinstance(other, Tokenizer)
    assert other.chat_template == "{{ messages }}"
    assert other is not of.get("a")
    assert {status.models for status in of.loaded()} == {("a", "x"), ("y",)}


def test_a_broken_tokenizer_is_left_alone_for_a_while_then_tried_again(tmp_path: Path, loader: Loader) -> None:
    clock = Clock()
    of = tokenizers(tmp_path, loader, clock=clock, retry_after_s=10)
    loader.broken["a"] = RuntimeError("no tokenizer at all")
    errors = []
    for _ in range(5):
        with pytest.raises(TokenizationError, match="no tokenizer at all") as caught:
            of.get("a")
        errors.append(caught.value)
    assert loader.loads["a"] == 1
    assert {error.reason for error in errors} == {TokenizationReason.BROKEN_TOKENIZER}
    assert len({id(error) for error in errors}) == 5
    del loader.broken["a"]
    clock.now = 10
    assert of.get("a").tokenize
    assert (of.loads, of.load_failures) == (1, 1)


def test_all_who_wait_for_a_load_that_fails_are_told(tmp_path: Path, loader: Loader) -> None:
    of = tokenizers(tmp_path, loader)
    loader.gates["a"] = threading.Event()
    problem = TokenizationError(TokenizationReason.NOT_INSTALLED, "model", "no package", "install it")
    loader.broken["a"] = problem
    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(of.get, "a") for _ in range(8)]
        assert loader.begun.wait(10)
        loader.gates["a"].set()
        errors = [future.exception(20) for future in futures]
    assert {getattr(error, "reason", None) for error in errors} == {TokenizationReason.NOT_INSTALLED}
    assert len({id(error) for error in errors}) == 8
    assert loader.loads["a"] == 1


def test_an_unknown_model_is_not_remembered_as_broken(tmp_path: Path, loader: Loader) -> None:
    of = tokenizers(tmp_path, loader)
    for number in range(1000):
        with pytest.raises(TokenizationError) as caught:
            of.get(f"no-{number}")
        assert caught.value.reason is TokenizationReason.UNKNOWN_MODEL
    assert (of.load_failures, loader.loads) == (0, {})


def test_a_format_without_a_loader_is_told(tmp_path: Path, loader: Loader) -> None:
    of = tokenizers(tmp_path, loader)
    (tmp_path / "models" / "m").mkdir()
    (tmp_path / "models" / "m" / "tekken.json").write_text("{}")
    with pytest.raises(TokenizationError, match="mistral") as caught:
        of.get("m")
    assert caught.value.reason is TokenizationReason.NOT_INSTALLED


def test_warm_loads_and_says_what_failed(tmp_path: Path, loader: Loader) -> None:
    of = tokenizers(tmp_path, loader)
    assert set(of.warm(["a", "nothing", "b"])) == {"nothing"}
    (b, a) = of.loaded()
    assert (a.models, b.models, a.kind) == (("a",), ("b",), "huggingface")
    assert a.revision is not None
    assert a.revision.startswith("sha256:")
    assert a.name == "a"


def test_an_interrupt_while_loading_goes_through_and_leaves_nothing_behind(tmp_path: Path, loader: Loader) -> None:
    clock = Clock()
    of = tokenizers(tmp_path, loader, clock=clock)

    def interrupted(*_: Any, **__: Any) -> Tokenizer:
        raise KeyboardInterrupt

    of._loaders["huggingface"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        of.get("a")
    of._loaders["huggingface"] = loader
    clock.now = 100
    assert of.get("a").tokenize


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"x" * (4 << 20) + b"x"])
def test_a_template_file_that_cannot_be_read_stops_the_start(tmp_path: Path, loader: Loader, content: bytes | None) -> None:
    file = tmp_path / "template.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        tokenizers(tmp_path, loader, chat_templates={"a": str(file)})
    assert caught.value.path == "tokens.chatTemplates.a"


def test_random_requests_from_many_threads_never_exceed_the_bound(tmp_path: Path, loader: Loader) -> None:
    of = tokenizers(tmp_path, loader, loaded_max=2)
    most = 0

    def ask(number: int) -> None:
        nonlocal most
        tokenizer = of.get("abcde"[number * 7 % 5])
        assert tokenizer.name.endswith("abcde"[number * 7 % 5])
        most = max(most, len(of.loaded()))

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(ask, range(2000)))
    assert most <= 2
    assert of.loads == of.evictions + 2


def test_real_tokenizers_of_both_formats_are_found_and_loaded(tmp_path: Path) -> None:
    commit = "a" * 40
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(TINY / name, snapshot)
    (tmp_path / "group" / "m").mkdir(parents=True)
    shutil.copy(TEKKEN, tmp_path / "group" / "m" / "tekken.json")
    settings = TokenSettings(directories=(str(tmp_path),), models={"served": "org/tiny"})
    of = LoadedTokenizers(Catalog(settings), {"huggingface": load_huggingface, "mistral": load_mistral}, 8)
    assert of.warm(["org/tiny", "served", "group/m"]) == {}
    (mistral, tiny) = of.loaded()
    assert (tiny.name, tiny.revision, tiny.models) == ("org/tiny", commit, ("org/tiny", "served"))
    assert (mistral.name, mistral.kind) == ("m", "mistral")
    assert len(of.get("served").tokenize(TextPrompt(model="served", text="Hello"))) > 0
    chat = ChatPrompt(model="group/m", messages=[{"role": "user", "content": "Hi"}])
    assert of.get("group/m").tokenize(chat)[0] == 1
