"""Where tokenizers are found: layouts, revisions, hostile names, bounds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvatlas.config import TokenSettings
from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.local import catalog as catalog_module
from kvatlas.tokens.local.catalog import Catalog
from kvatlas.tokens.local.formats import digest, kind_of
from kvatlas.tokens.local.hub import Hub

COMMIT = "a" * 40
OTHER = "b" * 40


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def catalog(*directories: Path, clock: Clock | None = None, **settings: Any) -> Catalog:
    return Catalog(TokenSettings(directories=tuple(map(str, directories)), **settings), clock=clock or Clock())


def model(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names or ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text("{}")
    return directory


def cached(root: Path, repository: str, commit: str = COMMIT, refs: tuple[str, ...] = ("main",)) -> Path:
    """Write a repository as huggingface_hub does: files are links to blobs."""
    folder = root / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "blobs" / f"{commit[:4]}-{name}").write_text("{}")
        (snapshot / name).symlink_to(f"../../blobs/{commit[:4]}-{name}")
    for ref in refs:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


def refusal(of: Catalog, name: str) -> TokenizationError:
    with pytest.raises(TokenizationError) as caught:
        of.find(name)
    assert caught.value.field == "model"
    return caught.value


# -- layouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [".", "hub"])
def test_a_hugging_face_cache_is_read_as_it_is(tmp_path: Path, below: str) -> None:
    snapshot = cached(tmp_path / below, "org/name")
    found = catalog(tmp_path).find("org/name")
    assert (found.directory, found.revision, found.kind, found.name) == (snapshot, COMMIT, "huggingface", "org/name")


@pytest.mark.parametrize("name", ["name", "org/name", "group/sub/org/name"])
def test_nested_directories_are_named_by_their_path(tmp_path: Path, name: str) -> None:
    directory = model(tmp_path / name)
    found = catalog(tmp_path).find(name)
    assert (found.directory, found.revision, found.name) == (directory, None, "name")


def test_a_directory_can_be_a_model_itself(tmp_path: Path) -> None:
    directory = model(tmp_path / "org" / "name")
    of = catalog(directory)
    assert of.find("org/name").directory == of.find("name").directory == directory
    assert [found.model for found in of.models()] == ["org/name"]
    snapshot = cached(tmp_path / "cache", "a/b")
    assert catalog(snapshot).find("a/b").revision == COMMIT
    assert catalog(snapshot.parents[1]).find("a/b").directory == snapshot


def test_tokens_models_come_first_and_may_name_a_directory_or_another_model(tmp_path: Path) -> None:
    model(tmp_path / "all" / "org" / "name")
    elsewhere = model(tmp_path / "elsewhere")
    of = catalog(tmp_path / "all", models={"org/name": str(elsewhere), "short": "org/name", "gone": str(tmp_path / "gone")})
    assert of.find("org/name").directory == elsewhere
    assert of.find("short").directory == tmp_path / "all" / "org" / "name"
    assert "gone" in refusal(of, "gone").problem


def test_earlier_directories_win_and_later_ones_help_out(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    model(first / "a")
    model(second / "a")
    cached(first, "org/b", refs=("other",))
    cached(first, "org/b", OTHER, refs=("third",))
    snapshot = cached(second, "org/b")
    of = catalog(first, second)
    assert of.find("a").directory == first / "a"
    assert of.find("org/b").directory == snapshot


def test_one_directory_within_another_counts_by_both_names(tmp_path: Path) -> None:
    directory = model(tmp_path / "outer" / "name")
    of = catalog(tmp_path, tmp_path / "outer")
    assert of.find("outer/name").directory == of.find("name").directory == directory


def test_models_lists_what_can_be_used(tmp_path: Path) -> None:
    model(tmp_path / "org" / "a")
    model(tmp_path / "m", "tekken.json", "params.json")
    model(tmp_path / "bare", "config.json")
    cached(tmp_path, "org/b")
    listed = {found.model: (found.kind, found.revision) for found in catalog(tmp_path, models={"c": "org/a"}).models()}
    assert listed == {
        "org/a": ("huggingface", None),
        "m": ("mistral", None),
        "org/b": ("huggingface", COMMIT),
        "c": ("huggingface", None),
    }


# -- revisions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("refs/pr/1", OTHER), (OTHER, OTHER)])
def test_a_revision_is_a_branch_a_tag_or_a_commit(tmp_path: Path, revision: str | None, commit: str) -> None:
    cached(tmp_path, "org/name")
    cached(tmp_path, "org/name", OTHER, refs=("refs/pr/1",))
    revisions = {} if revision is None else {"org/name": revision}
    assert catalog(tmp_path, revisions=revisions).find("org/name").revision == commit


@pytest.mark.parametrize("revision", ["other", "../../x", "/etc/passwd", "c" * 40])
def test_a_revision_that_is_not_there_is_refused_with_what_is(tmp_path: Path, revision: str) -> None:
    cached(tmp_path, "org/name")
    error = refusal(catalog(tmp_path, revisions={"org/name": revision}), "org/name")
    assert error.reason is TokenizationReason.UNKNOWN_MODEL
    assert revision in error.problem


def test_a_copied_cache_without_refs_serves_its_only_snapshot(tmp_path: Path) -> None:
    cached(tmp_path, "org/name", refs=())
    assert catalog(tmp_path).find("org/name").revision == COMMIT
    cached(tmp_path, "org/name", OTHER, refs=())
    assert "main" in refusal(catalog(tmp_path), "org/name").problem


def test_a_digest_tells_names_and_contents_of_tokenizer_files_only(tmp_path: Path) -> None:
    directory = model(tmp_path / "a")
    before = digest(directory)
    assert before.startswith("sha256:")
    assert len(before) == len("sha256:") + 12
    model(directory, "model.safetensors", "README.md")
    assert digest(directory) == before
    (directory / "tokenizer.json").write_text("[]")
    changed = digest(directory)
    model(directory, "chat_template.jinja")
    assert len({before, changed, digest(directory)}) == 3


# -- formats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ({"tokenizer.json"}, "huggingface"),
        ({"config.json", "tokenizer.model"}, "huggingface"),
        ({"tokenizer_config.json", "vocab.json", "merges.txt"}, "huggingface"),
        ({"tekken.json"}, "mistral"),
        ({"tekken.json", "config.json", "tokenizer_config.json"}, "mistral"),
        ({"tokenizer.model.v3"}, "mistral"),
        ({"mistral_instruct_tokenizer_240323.model.v3"}, "mistral"),
        ({"tokenizer.model", "params.json", "consolidated.00.safetensors"}, "mistral"),
        ({"tokenizer.json", "tekken.json", "consolidated.safetensors"}, "mistral"),
        ({"tokenizer.json", "tekken.json", "model.safetensors", "params.json"}, "huggingface"),
        ({"tokenizer.json", "tekken.json", "params.json"}, "mistral"),
        ({"tokenizer.json", "tekken.json"}, "huggingface"),
        ({"tokenizer.json", "tokenizer.model", "consolidated.safetensors"}, "huggingface"),
        ({"config.json", "model.safetensors"}, None),
        ({"tokenizer_config.json"}, None),
        (set(), None),
    ],
)
def test_a_format_is_chosen_as_vllm_does(names: set[str], kind: str | None) -> None:
    assert kind_of(names) == kind


# -- what is missing or broken ------------------------------------------------------------------------------------------


def test_an_unknown_model_is_told_with_what_was_looked_through(tmp_path: Path) -> None:
    error = refusal(catalog(tmp_path, tmp_path / "absent"), "org/name")
    assert error.reason is TokenizationReason.UNKNOWN_MODEL
    assert str(tmp_path) in error.problem
    assert "is not there" in error.problem
    assert "tokens.hub" in error.remedy


def test_a_directory_without_a_tokenizer_is_told_with_the_files_looked_for(tmp_path: Path) -> None:
    model(tmp_path / "org" / "name", "config.json", "model.safetensors")
    problem = refusal(catalog(tmp_path), "org/name").problem
    assert "tokenizer.json" in problem
    assert "tekken.json" in problem


def test_a_link_to_a_missing_blob_is_told(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "org/name")
    (snapshot / "tokenizer.json").resolve().unlink()
    assert "broken link" in refusal(catalog(tmp_path), "org/name").problem


# -- hostile names ------------------------------------------------------------------------------------------------------

HOSTILE = [
    "",
    "..",
    "../secret",
    "a/../../secret",
    "/etc",
    "~",
    "./a",
    "a/",
    "//",
    "a\0b",
    "a\nb",
    "x" * 100_000,
    "models--org--b",
    "snapshots",
    "org/b/snapshots",
    ".hidden",
    "%2e%2e/secret",
    "..\\secret",
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name[:20]))
def test_no_name_leads_out_of_the_directories(tmp_path: Path, name: str) -> None:
    model(tmp_path / "secret")
    model(tmp_path / "all" / "a")
    model(tmp_path / "all" / ".hidden")
    cached(tmp_path / "all", "org/b")
    error = refusal(catalog(tmp_path / "all"), name)
    assert error.reason is TokenizationReason.UNKNOWN_MODEL
    assert len(str(error)) < 1000


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "x" * 100_000], ids=lambda name: repr(name[:20]))
def test_what_is_no_name_is_neither_asked_for_nor_remembered(tmp_path: Path, name: str) -> None:
    hub = FakeHub(tmp_path / "cache")
    of = Catalog(TokenSettings(hub=True), hub=hub, clock=Clock())
    refusal(of, name)
    assert hub.asked == []
    assert not of._misses


def test_links_out_of_the_directories_are_refused_unless_they_are_configured(tmp_path: Path) -> None:
    secret = model(tmp_path / "secret")
    inside = model(tmp_path / "all" / "real")
    (tmp_path / "all" / "out").symlink_to(secret)
    (tmp_path / "all" / "alias").symlink_to(inside)
    model(tmp_path / "all" / "file", "tokenizer_config.json")
    (tmp_path / "all" / "file" / "tokenizer.json").symlink_to(secret / "tokenizer.json")
    of = catalog(tmp_path / "all")
    assert "leads out" in refusal(of, "out").problem
    assert "leads out" in refusal(of, "file").problem
    both = catalog(tmp_path / "all", secret)
    assert both.find("out").directory.resolve() == secret
    assert both.find("file").kind == "huggingface"
    assert catalog(models={"x": str(tmp_path / "all" / "out")}).find("x").kind == "huggingface"


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    model(tmp_path / "a" / "b")
    for number in range(9):  # followed to the end of six levels, these are half a million directories
        (tmp_path / "a" / f"loop{number}").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "a" / "b" / "chat_template.jinja").symlink_to("chat_template.jinja")
    of = catalog(tmp_path)
    assert of.find("a/b").kind == "huggingface"
    assert "not all was looked at" not in refusal(of, "a/c").problem


def test_a_link_within_the_directories_is_another_name(tmp_path: Path) -> None:
    directory = model(tmp_path / "org" / "name")
    (tmp_path / "alias").symlink_to(directory)
    of = catalog(tmp_path)
    assert of.find("alias").directory.resolve() == of.find("org/name").directory == directory


# -- bounds -------------------------------------------------------------------------------------------------------------


def test_unknown_names_cost_a_walk_now_and_then_only(tmp_path: Path) -> None:
    clock = Clock()
    of = catalog(tmp_path, clock=clock)
    for number in range(100):
        refusal(of, f"name-{number}")
    assert of.walks == 1
    model(tmp_path / "late")
    refusal(of, "late")
    clock.now += catalog_module.RESCAN_S
    assert of.find("late").kind == "huggingface"
    for number in range(100):
        refusal(of, f"name-{number}")
    assert of.walks == 2


def test_a_walk_ends_at_its_bounds_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path.joinpath(*("d" for _ in range(catalog_module.DEPTH_MAX + 1)))
    model(deep)
    refusal(catalog(tmp_path), str(deep.relative_to(tmp_path)))
    monkeypatch.setattr(catalog_module, "ENTRIES_MAX", 3)
    for number in range(5):
        model(tmp_path / f"m{number}")
    assert "not all was looked at" in refusal(catalog(tmp_path), "m9").problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_directory_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    model(tmp_path / "a")
    locked = model(tmp_path / "locked")
    locked.chmod(0)
    try:
        assert catalog(tmp_path).find("a").kind == "huggingface"
    finally:
        locked.chmod(0o755)


# -- the hub ------------------------------------------------------------------------------------------------------------


class FakeHub(Hub):
    """Has org/name; counts what it is asked."""

    def __init__(self, cache_directory: Path) -> None:
        super().__init__(cache_directory=cache_directory)
        self.asked: list[tuple[str, str | None]] = []

    def fetch(self, name: str, revision: str | None) -> Path:
        self.asked.append((name, revision))
        if name.startswith("org/"):
            return cached(self.cache_directory, name)
        raise TokenizationError(TokenizationReason.UNKNOWN_MODEL, "model", "the hub does not have it", "correct the name")


def test_the_hub_is_asked_only_where_allowed_and_for_what_is_not_here(tmp_path: Path) -> None:
    model(tmp_path / "all" / "here")
    hub = FakeHub(tmp_path / "cache")
    settings = {"directories": (str(tmp_path / "all"),), "revisions": {"org/name": "v1"}}
    refusal(Catalog(TokenSettings(**settings), hub=hub, clock=Clock()), "org/name")  # type: ignore[arg-type]
    of = Catalog(TokenSettings(**settings, hub=True), hub=hub, clock=Clock())  # type: ignore[arg-type]
    of.find("here")
    assert hub.asked == []
    found = of.find("org/name")
    assert hub.asked == [("org/name", "v1")]
    assert (found.revision, found.name) == (COMMIT, "org/name")


def test_what_is_in_the_hubs_cache_is_found_without_asking(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "cache")
    cached(tmp_path / "cache", "org/name")
    assert Catalog(TokenSettings(hub=True), hub=hub, clock=Clock()).find("org/name").revision == COMMIT
    assert hub.asked == []


def test_a_name_that_the_hub_does_not_have_is_not_asked_for_again_for_a_while(tmp_path: Path) -> None:
    clock, hub = Clock(), FakeHub(tmp_path / "cache")
    of = Catalog(TokenSettings(hub=True), hub=hub, clock=clock)
    for _ in range(5):
        assert "the hub does not have it" in refusal(of, "x").problem
    assert len(hub.asked) == 1
    clock.now += catalog_module.RESCAN_S
    refusal(of, "x")
    assert len(hub.asked) == 2


def test_nobody_has_the_hub_asked_at_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, hub = Clock(), FakeHub(tmp_path / "cache")
    of = Catalog(TokenSettings(hub=True), hub=hub, clock=clock)
    reasons = [refusal(of, f"name-{number}").reason for number in range(100)]
    assert len(hub.asked) == catalog_module.HUB_ASKS_MAX
    assert reasons[-1] is TokenizationReason.BUSY
    clock.now += catalog_module.RESCAN_S
    monkeypatch.setattr(catalog_module, "FETCHED_MAX", 1)
    of.find("org/a")
    assert "fetched" in refusal(of, "org/b").problem
