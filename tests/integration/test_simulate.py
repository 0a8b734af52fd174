"""``kvatlas simulate`` as a process: runs, sweeps, the page, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRACES = Path(__file__).parents[1] / "data" / "traces"
SMALL = ("--set", "duration_s=20", "--engines", "3")
KVATLAS = [sys.executable, "-m", "kvatlas", "simulate"]


def simulate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVATLAS, *map(str, arguments)], capture_output=True, text=True, timeout=110, check=False)


def lines(done: subprocess.CompletedProcess[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The runs' objects and the summary."""
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    return objects[:-1], objects[-1]["summary"]


def test_policies_are_compared_and_a_page_is_written(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = simulate("-p", "kvatlas", "-p", "random", *SMALL, "--report", page)
    assert done.returncode == 0, done.stderr
    assert "chats: 3 engines, seed 0" in done.stdout
    assert {"kvatlas", "random"} <= {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert f"report: {page}" in done.stderr
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "duration_s=20" in text


def test_a_seed_reproduces_runs_in_however_many_processes() -> None:
    asked = ("-p", "kvatlas", "-p", "random", *SMALL, "--sweep", "qps=5,10", "--json")
    one, several = simulate(*asked, "--jobs", "1"), simulate(*asked, "--jobs", "2")
    assert (one.returncode, several.returncode) == (0, 0), one.stderr + several.stderr
    (first, summary), (again, _) = lines(one), lines(several)
    for run in (*first, *again):
        del run["wall_s"]
    assert first == again
    assert [(run["policy"], run["label"]) for run in first] == [
        ("kvatlas", "qps=5"),
        ("random", "qps=5"),
        ("kvatlas", "qps=10"),
        ("random", "qps=10"),
    ]
    assert (summary["runs"], summary["finished"], summary["problems"]) == (4, 4, [])
    assert all(run["finished"] == run["arrived"] > 0 for run in first)


@pytest.mark.parametrize("trace", ["mooncake_conversations.jsonl", "lmcache_taubench.jsonl"])
def test_traces_are_played_by_their_files(trace: str) -> None:
    done = simulate("-w", TRACES / trace, "-p", "llm-d-default", "--limit", "60", "--scale", "5", "--json")
    assert done.returncode == 0, done.stderr
    (run,), _ = lines(done)
    assert (run["workload"], run["finished"], run["scale"]) == (trace, 60, 5)
    assert 0 < run["hit_ratio"] < 1


def test_a_ladder_tells_of_each_stage() -> None:
    settings = ("--set", "groups=5", "--set", "stages=2:5 5:5", "--set", "output_tokens=20", "--set", "warm_up=2:5")
    done = simulate("-w", "shared-prefix", "-p", "kvatlas", *settings, "--json")
    assert done.returncode == 0, done.stderr
    (run,), _ = lines(done)
    assert [(phase["name"], phase["finished"]) for phase in run["phases"]] == [("warm-up", 10), ("2 QPS", 10), ("5 QPS", 25)]
    assert all(0 < phase["duration_s"] < 60 and phase["ttft"]["p90"] > 0 for phase in run["phases"])


def test_lost_events_are_told() -> None:
    done = simulate("-p", "kvatlas", *SMALL, "--event-loss", "0.2", "--event-lag", "50ms")
    assert done.returncode == 0, done.stderr
    assert "note:" in done.stdout
    assert "lost" in done.stdout


def test_a_bad_line_of_a_trace_fails_its_run_and_others_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    good = '{"timestamp": 0, "input_length": 600, "output_length": 20, "hash_ids": [0, 7]}\n'
    file.write_text(good * 5 + "garbage\n")
    done = simulate("-w", file, "-p", "random", "--sweep", "limit=5,9", "--json")
    assert done.returncode == 1
    runs, summary = lines(done)
    assert [run["label"] for run in runs] == ["limit=5"]
    assert "trace.jsonl line 6" in summary["problems"][0]
    assert "failed: random limit=9" in done.stderr


def test_what_is_wrong_is_told_before_anything_runs() -> None:
    done = simulate("-w", "chats", "--set", "qsp=5")
    assert done.returncode == 2
    assert 'did you mean "qps"' in done.stderr


def test_the_list_names_everything() -> None:
    done = simulate("--list")
    assert done.returncode == 0
    for word in ("shared-prefix", "llm-d-precise", "Presets"):
        assert word in done.stdout
    assert "tools_tokens" in simulate("--list", "-w", "agents").stdout


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_shows_what_is_finished(jobs: str) -> None:
    """Two short runs, and one that would take days."""
    asked = [*KVATLAS, "-p", "random", "-w", "no-reuse", "--sweep", "limit=5,6,100000000", "--set", "duration_s=1e8", "--json"]
    with subprocess.Popen(
        [*asked, "--jobs", jobs], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        assert running.stderr is not None
        finished = [running.stderr.readline() for _ in range(2)]
        os.killpg(running.pid, signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 1
    assert len(out.splitlines()) == 3, (finished, err)
    assert "stopped: 2 of 3 runs are finished" in err
