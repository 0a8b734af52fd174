"""The page of runs: whole, in one file, safe, the same for the same runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvatlas.errors import RequestError
from kvatlas.sim.report import check, write
from kvatlas.sim.report import page as page_module
from kvatlas.sim.results import RunResult
from tests.models.runs import phase, planned, run_result

VOID = {"meta", "br"}


class Structure(HTMLParser):
    """Elements that are open, ids, and words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(*runs: RunResult, command: str = "kvatlas simulate") -> str:
    return page_module.page([planned(run) for run in runs], command)


def test_a_page_is_whole_and_loads_nothing() -> None:
    text = shown(run_result("kvatlas"), run_result("random", 0.5))
    structure = Structure(text)
    assert structure.open == []
    assert len(structure.ids) == len(set(structure.ids))
    assert structure.targets
    assert all(target.startswith("#") and target[1:] in structure.ids for target in structure.targets)
    assert "script" not in structure.tags
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/)", text)


def test_a_page_has_what_reproduces_it_and_all_figures() -> None:
    text = Structure(shown(run_result("kvatlas"), run_result("random", 0.5), command="kvatlas simulate --seed 3")).text
    for word in ("kvatlas simulate --seed 3", "TTFT p90", "hit ratio", "imbalance", '"seed": 3', '"gpu_blocks": 2000', "50.0%"):
        assert word in text
    assert re.search(r"kvatlas \d+\.\d+", text)


def test_names_and_commands_are_text_whatever_they_hold() -> None:
    nasty = "<script>alert(1)</script>&\"'"
    text = shown(run_result(nasty, workload=nasty, notes=(nasty,), label=f"qps=1 name={nasty}"), command=nasty)
    structure = Structure(text)
    assert structure.open == []
    assert "script" not in structure.tags
    assert structure.text.count(nasty) >= 4


def test_the_same_runs_give_the_same_page() -> None:
    runs = [run_result("kvatlas"), run_result("random", 0.5, wall_s=3.0)]
    assert shown(*runs) == shown(*runs)
    assert shown(runs[0], run_result("random", 0.5, wall_s=9.0)) == shown(*runs)


def test_colours_are_the_pages_so_that_light_and_dark_work() -> None:
    text = shown(run_result("kvatlas"), run_result("random", 0.5))
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 4
    assert all("var(--c0)" in drawing and "var(--ink)" in drawing for drawing in drawings)
    assert not re.search(r"#0[01]0[0-9a-f]{3}\b", "".join(drawings))
    assert "prefers-color-scheme: dark" in text


def test_curves_are_drawn_of_ladders_and_sweeps() -> None:
    ladder = (phase("warm-up", 1), phase("3 QPS", 1000), phase("10 QPS", 2000))
    text = shown(run_result("kvatlas", phases=ladder), run_result("random", phases=ladder))
    assert "Over offered load" in text
    assert "output tokens/s by phase" in text
    swept = shown(*(run_result(policy, label=f"qps={qps}") for qps in (1, 2) for policy in ("kvatlas", "random")))
    assert "Over qps" in swept


@pytest.mark.parametrize(
    "empty",
    [
        run_result("kvatlas", 0.0, moments=(), finished=0, cached_tokens=0, prompt_tokens=0, duration_s=0.0, output_tokens=0),
        run_result("kvatlas", engines=()),
    ],
    ids=["nothing was answered", "no engines"],
)
def test_a_run_in_which_nothing_happened_has_a_page_too(empty: RunResult) -> None:
    assert Structure(shown(empty)).open == []


def test_many_policies_and_groups_are_drawn_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "GROUPS_DRAWN_MAX", 1)
    runs = [run_result(f"policy-{number}", 0.1 * (number + 1), label=f"mode={mode}") for mode in "ab" for number in range(14)]
    text = shown(*runs)
    assert text.count("<svg") == 4
    assert text.count("mode=b") >= 14


def test_where_it_cannot_be_written_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="is no directory"):
        check(tmp_path / "nowhere" / "r.html")
    with pytest.raises(RequestError, match="cannot be written"):
        write(tmp_path, [planned(run_result("kvatlas"))], "kvatlas simulate")
    check(tmp_path / "r.html")
    monkeypatch.setattr(page_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'kvatlas\[sim\]'"):
        check(tmp_path / "r.html")
