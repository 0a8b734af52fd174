"""Metrics: exact names, bounded labels, values read when scraped."""

from __future__ import annotations

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvatlas.observe.metrics import Metrics
from kvatlas.results import PodStatus
from kvatlas.types import ApplyReport, DpRank, GroupIdx, IndexStats, PodId, StaleReason

Sample = tuple[str, frozenset[tuple[str, str]]]


def samples(metrics: Metrics) -> dict[Sample, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


def stats(**sizes: int) -> IndexStats:
    zero = dict.fromkeys(IndexStats.__struct_fields__, 0)
    return IndexStats(**{**zero, **sizes})


def stream(pod: str, rank: int = 0, stale: StaleReason | None = None, depth: int = 0) -> PodStatus:
    return PodStatus(
        pod=PodId(pod),
        dp_rank=DpRank(rank),
        model="m",
        state="fresh" if stale is None else "stale",
        stale_reason=stale,
        blocks=10,
        orphans=1,
        block_sizes_tokens=(16,),
        groups={GroupIdx(0): "full"},
        next_seq=1,
        queue_depth=depth,
        gaps=0,
        replays=0,
        replay_answers=None,
        restarts=0,
        last_event_age_s=None,
        source="tcp://x:1",
    )


def test_the_promised_names_are_there_with_their_kinds() -> None:
    metrics = Metrics()
    metrics.observe_index(lambda: stats(blocks=7, pods=2), list)
    metrics.events("a", "BlockStored", 3)
    metrics.query("score", 0.001, 4, 2)
    text = metrics.render().decode()
    assert "# TYPE kv_cache_blocks_total gauge\n" in text
    assert "\nkv_cache_blocks_total 7.0\n" in text
    assert "# TYPE kv_cache_events_received_total counter\n" in text
    assert 'kv_cache_events_received_total{pod="a",type="BlockStored"} 3.0' in text
    assert "# TYPE kv_cache_query_duration histogram\n" in text
    assert 'kv_cache_query_duration_count{operation="score"} 1.0' in text
    assert "# TYPE kv_cache_hit_ratio gauge\n" in text
    assert "\nkv_cache_hit_ratio 0.5\n" in text
    assert "# TYPE kv_cache_pods_tracked gauge\n" in text
    assert "\nkv_cache_pods_tracked 2.0\n" in text
    assert 'kv_cache_core_info{core="reference"} 1.0' in text
    assert "_created" not in text


def test_the_hit_ratio_is_that_of_the_last_1000_queries_that_asked_for_blocks() -> None:
    metrics = Metrics()
    assert metrics.hit_ratio == 0.0
    for _ in range(500):
        metrics.query("score", 0.0, 10, 10)
    assert metrics.hit_ratio == 1.0
    metrics.query("score", 0.0, 0, 0)
    for _ in range(500):
        metrics.query("score", 0.0, 10, 0)
    assert metrics.hit_ratio == 0.5
    for _ in range(500):
        metrics.query("score", 0.0, 30, 0)
    assert metrics.hit_ratio == 0.0


def test_a_forgotten_pod_leaves_no_series_behind_and_may_come_back() -> None:
    metrics = Metrics()
    for pod in ("gone", "kept"):
        metrics.frame(pod, "applied")
        metrics.events(pod, "BlockStored", 1)
        metrics.applied(pod, ApplyReport(stored=4, orphaned=2))
        metrics.gap(pod, 3)
        metrics.replay(pod, "healed", 3)
        metrics.restart(pod)
        metrics.decode_fault(pod, "truncated")
        metrics.lag(pod, 0.25)
    metrics.forget_pod("gone")
    assert not [sample for sample in samples(metrics) if ("pod", "gone") in sample[1]]
    assert value(metrics, "kv_cache_block_changes_total", pod="kept", change="stored") == 4
    assert value(metrics, "kv_cache_frames_missed_total", pod="kept") == 3
    assert value(metrics, "kv_cache_event_last_lag_seconds", pod="kept") == 0.25
    metrics.restart("gone")
    assert value(metrics, "kv_cache_engine_restarts_total", pod="gone") == 1


def test_pods_beyond_the_bound_are_counted_together() -> None:
    metrics = Metrics(pods_max=2)
    for number in range(100):
        metrics.frame(f"pod-{number}", "applied")
    metrics.observe_index(stats, lambda: [stream(f"pod-{number}", depth=1) for number in range(100)])
    assert value(metrics, "kv_cache_frames_total", pod="pod-1", outcome="applied") == 1
    assert value(metrics, "kv_cache_frames_total", pod="other", outcome="applied") == 98
    assert value(metrics, "kv_cache_queue_depth", pod="other") == 98
    metrics.forget_pod("pod-0")
    metrics.frame("pod-99", "applied")
    assert value(metrics, "kv_cache_frames_total", pod="pod-99", outcome="applied") == 1


def test_streams_are_counted_by_state_and_stale_reason_when_scraped() -> None:
    streams = [stream("a", 0), stream("a", 1, StaleReason.GAP, 5), stream("b", 0, StaleReason.GAP)]
    metrics = Metrics()
    metrics.observe_index(lambda: stats(evicted_ttl=5, bytes_estimated=99), lambda: streams)
    assert value(metrics, "kv_cache_streams", state="stale") == 2
    assert value(metrics, "kv_cache_streams", state="connecting") == 0
    assert value(metrics, "kv_cache_streams_stale", reason="gap") == 2
    assert value(metrics, "kv_cache_streams_stale", reason="queue_full") == 0
    assert value(metrics, "kv_cache_pod_stale", pod="a") == 1
    assert value(metrics, "kv_cache_pod_blocks", pod="a") == 20
    assert value(metrics, "kv_cache_queue_depth", pod="a") == 5
    assert value(metrics, "kv_cache_evictions_total", reason="ttl") == 5
    assert value(metrics, "kv_cache_index_bytes") == 99
    streams.clear()
    assert value(metrics, "kv_cache_streams", state="stale") == 0


def test_a_scrape_that_cannot_read_the_index_fails_rather_than_show_less() -> None:
    def broken() -> IndexStats:
        raise RuntimeError("index is broken")

    metrics = Metrics()
    metrics.observe_index(broken, list)
    with pytest.raises(RuntimeError, match="index is broken"):
        metrics.render()


def test_connected_sources_are_those_that_did_not_disconnect() -> None:
    metrics = Metrics()
    metrics.connection("tcp://a:1", "connected")
    metrics.connection("tcp://a:1", "connected")
    metrics.connection("tcp://b:1", "connected")
    metrics.connection("tcp://a:1", "disconnected")
    metrics.connection("tcp://a:1", "retry")
    assert value(metrics, "kv_cache_sources_connected") == 1
    assert value(metrics, "kv_cache_source_connections_total", source="tcp://a:1", event="retry") == 1


def test_hostile_label_values_stay_inside_their_quotes() -> None:
    metrics = Metrics()
    hostile = 'x"} 1\nfaked_metric 1\\'
    metrics.frame(hostile, "applied")
    metrics.http("/v1/score", "BREW", 200, 0.1)
    assert value(metrics, "kv_cache_frames_total", pod=hostile, outcome="applied") == 1
    assert value(metrics, "kv_cache_http_requests_total", route="/v1/score", method="other", status="200") == 1
    assert value(metrics, "faked_metric") is None


def test_a_clock_that_is_behind_counts_as_no_lag() -> None:
    metrics = Metrics()
    metrics.lag("a", -5.0)
    assert value(metrics, "kv_cache_event_last_lag_seconds", pod="a") == 0
    assert value(metrics, "kv_cache_event_lag_seconds_sum") == 0


def test_two_sets_of_metrics_live_in_one_process() -> None:
    one, other = Metrics(), Metrics(core="native")
    one.restart("a")
    assert value(other, "kv_cache_engine_restarts_total", pod="a") is None
    assert value(other, "kv_cache_core_info", core="native") == 1


def test_counts_from_many_threads_add_up() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics.frame("a", "applied")
            metrics.query("score", 0.0, 2, 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "kv_cache_frames_total", pod="a", outcome="applied") == 2000
    assert metrics.hit_ratio == 0.5
