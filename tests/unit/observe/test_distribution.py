"""Histograms of what happens with every request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from kvatlas.observe.distribution import Distribution

bounds = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6, unique=True).map(sorted)
observed = st.lists(st.tuples(st.sampled_from(["a", 'b"\\\n']), st.integers(0, 5), st.floats(0, 1e7)), max_size=30)


def exposed(registry: CollectorRegistry) -> list[str]:
    """Return what a scrape sees, but for when series were made, which is not told here."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(bounds, observed)
def test_a_scrape_sees_what_prometheus_client_would_show(buckets: list[float], seen: list[tuple[str, int, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    distribution = Distribution("seen", "What was seen.", ("where",), buckets, ours)
    histogram = Histogram("seen", "What was seen.", ("where",), buckets=buckets, registry=theirs)
    for where, at, value in seen:
        exact = buckets[at] if at < len(buckets) else value  # a bound belongs to its bucket
        distribution.series(where).observe(exact)
        histogram.labels(where).observe(exact)
    assert exposed(ours) == exposed(theirs)


def test_without_labels_there_is_a_series_from_the_start() -> None:
    registry = CollectorRegistry()
    Distribution("seen", "What was seen.", (), (1.0,), registry)
    assert "seen_count 0.0" in exposed(registry)
