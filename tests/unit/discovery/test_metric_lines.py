"""Single metrics out of a page: the same as Prometheus' own parser reads, for any page of that format."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kvatlas.discovery.metric_lines import MalformedLineError, samples

NAMES = ["vllm:num", "vllm:num_requests", "num", "vllm:num_requests_total"]
LABEL_TEXT = st.text(st.sampled_from('ab\\"\n{},= #é_1'), max_size=8)
LABELS = st.dictionaries(st.sampled_from(["engine", "model_name", "a", "_b1"]), LABEL_TEXT, max_size=3)
VALUE = st.floats() | st.integers(-5, 10**12)
GAPS = st.sampled_from([" ", "\t", "  "])
COMMENTS = ["\n", "# HELP vllm:num says vllm:num 1\n", "# TYPE vllm:num gauge\n", "# vllm:num 3\n"]
PIECES = [b"vllm:num", b"{", b"}", b'"', b"\\", b"a=", b",", b" ", b"1", b"\n", b"\xff", b"#"]


def written(name: str, labels: dict[str, str], value: float, gap: str, timestamp: str) -> str:
    inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
    return f"{name}{gap if not labels else ''}{'{' + inside + '}' if labels else ''}{gap or ' '}{shown(value)}{timestamp}\n"


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def shown(value: float) -> str:
    return {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN" if math.isnan(value) else repr(float(value)))


LINES = st.builds(written, st.sampled_from(NAMES), LABELS, VALUE, GAPS, st.sampled_from(["", " 1"]))


@given(st.lists(LINES | st.sampled_from(COMMENTS), max_size=8))
def test_reads_what_prometheus_reads(lines: list[str]) -> None:
    page = "".join(lines)
    wanted = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    for name in NAMES:
        found = [(sample.labels, shown(sample.value)) for sample in samples(page.encode(), name.encode())]
        assert found == [(one.labels, shown(one.value)) for one in wanted if one.name == name]


@given(st.lists(st.sampled_from(PIECES), max_size=20))
def test_any_bytes_are_samples_or_malformed(parts: list[bytes]) -> None:
    try:
        for sample in samples(b"".join(parts), b"vllm:num"):
            assert isinstance(sample.value, float)
            assert isinstance(sample.labels, dict)
    except MalformedLineError:
        pass


@pytest.mark.parametrize(
    "line",
    [
        "x{}",
        "x{a} 1",
        'x{a="b} 1',
        'x{a="b"',
        'x{a="b"} one',
        "x 1_000",
        "x 1 2 3",
        'x{="b"} 1',
        'x{a="b" c="d"} 1',
        "x{ 1",
    ],
)
def test_a_line_that_is_none_of_the_format_is_malformed(line: str) -> None:
    with pytest.raises(MalformedLineError):
        assert [sample.labels for sample in samples(f"y 1\n{line}\n".encode(), b"x")]


def test_a_long_line_without_an_end_is_found_out_at_once() -> None:
    with pytest.raises(MalformedLineError):
        list(samples(b"x{" + b'a="' * 300_000, b"x"))
