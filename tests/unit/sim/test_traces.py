"""Traces: what is in the file is what comes, and a bad line is refused with where and why."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from kvatlas.errors import RequestError
from kvatlas.sim.workloads.catalog import choose, kind_of_file
from kvatlas.sim.workloads.text_trace import pieces
from kvatlas.sim.workloads.workload import Arrival

DATA = Path(__file__).parents[2] / "data"
MOONCAKE = DATA / "traces" / "mooncake_conversations.jsonl"
TAUBENCH = DATA / "traces" / "lmcache_taubench.jsonl"


def arrivals(file: Path, scale: float = 1.0, **parameters: Any) -> list[Arrival]:
    return list(choose(str(file), parameters).open(seed=0, scale=scale).arrivals())


def written(file: Path, records: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


def record(at_ms: int = 0, **given: Any) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": 600, "output_length": 20, "hash_ids": [0, 7], **given}


# -- Mooncake -----------------------------------------------------------------------------------------------------------


def test_the_packaged_trace_is_played_as_it_is() -> None:
    records = [json.loads(line) for line in MOONCAKE.read_text().splitlines()]
    found = arrivals(MOONCAKE)
    assert [one.prompt_tokens for one in found] == [one["input_length"] for one in records]
    assert [one.output_tokens for one in found] == [one["output_length"] for one in records]
    assert [one.at_s for one in found] == [(one["timestamp"] - records[0]["timestamp"]) / 1000 for one in records]
    assert [one.session for one in found] == [one["conversation"] for one in records]


def test_prompts_share_tokens_as_far_as_they_share_hash_ids(tmp_path: Path) -> None:
    given = [[0, 7], [0, 8], [1, 7]]
    one, other, third = arrivals(written(tmp_path / "t.jsonl", [record(hash_ids=ids) for ids in given]))
    assert one.tokens[:512] == other.tokens[:512]
    assert one.tokens[512:600] != other.tokens[512:600]
    assert one.tokens[0] != third.tokens[0]
    assert one.tokens[600:] != other.tokens[600:]  # answers are nobody else's


def test_denser_arrivals(tmp_path: Path) -> None:
    file = written(tmp_path / "t.jsonl", [record(0), record(8000)])
    assert [one.at_s for one in arrivals(file, scale=4)] == [0.0, 2.0]


def test_a_gzipped_trace_is_read_as_it_goes(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl.gz"
    good = "".join(json.dumps(record(number)) + "\n" for number in range(1000))
    file.write_bytes(gzip.compress((good + "garbage\n").encode()))
    workload = choose(str(file), {}).open(seed=0)
    assert len(list(itertools.islice(workload.arrivals(), 1000))) == 1000
    with pytest.raises(RequestError, match=r"t\.jsonl\.gz line 1001"):
        list(workload.arrivals())


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (record(input_length=2000), "hash_ids: has 2, but 2000 tokens are 4 blocks of 512"),
        (record(input_length="x"), r"input_length"),
        (record(output_length=-1), r"output_length"),
        (record(hash_ids=[0, 1 << 40]), r"hash_ids"),
        (record(-5), "timestamp"),
        ({"timestamp": 1}, "input_length"),
    ],
)
def test_a_bad_line_is_refused_with_its_place_and_field(tmp_path: Path, bad: dict[str, Any], told: str) -> None:
    file = written(tmp_path / "t.jsonl", [record(), bad])
    with pytest.raises(RequestError, match=f"t.jsonl line 2.*{told}"):
        arrivals(file)


def test_lines_out_of_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"line 2: timestamp: 4 comes after 5; sort"):
        arrivals(written(tmp_path / "t.jsonl", [record(5), record(4)]))


def test_blocks_of_another_size(tmp_path: Path) -> None:
    file = written(tmp_path / "t.jsonl", [record(input_length=30, hash_ids=[4, 5])])
    assert arrivals(file, block_tokens=16)[0].tokens[:30].tolist() == [4] * 16 + [5] * 14


# -- texts --------------------------------------------------------------------------------------------------------------


def test_a_trace_of_texts_is_played_in_the_order_of_time() -> None:
    records = sorted((json.loads(line) for line in TAUBENCH.read_text().splitlines()), key=lambda one: one["timestamp"])
    found = arrivals(TAUBENCH)
    assert len(found) == 471
    assert [one.at_s for one in found] == [(one["timestamp"] - records[0]["timestamp"]) / 1e6 for one in records]
    assert len({one.session for one in found}) == 24
    assert all(one.output_tokens >= 1 for one in found)


def test_a_real_tokenizer_makes_its_own_tokens() -> None:
    from tokenizers import Tokenizer

    records = sorted((json.loads(line) for line in TAUBENCH.read_text().splitlines()), key=lambda one: one["timestamp"])
    tokenizer = Tokenizer.from_file(str(DATA / "tinymodel" / "tokenizer.json"))
    first = arrivals(TAUBENCH, tokenizer=str(DATA / "tinymodel"))[0]
    assert first.tokens[: first.prompt_tokens].tolist() == tokenizer.encode(records[0]["input"], add_special_tokens=False).ids
    with pytest.raises(RequestError, match="tokenizer"):
        arrivals(TAUBENCH, tokenizer="nowhere")


def test_the_stand_in_keeps_prefixes() -> None:
    said = "I'd like to change my reservation, please."
    answer = " Which one is it?"
    before, after = pieces(said), pieces(said + answer)
    assert after[: len(before)] == before
    assert after[len(before) :] == pieces(answer)
    assert 3 < len(said) / len(before) < 5
    assert pieces("") == pieces("")[:0]


def test_texts_out_of_order_can_be_sorted_unless_they_are_packed(tmp_path: Path) -> None:
    records = [{"timestamp": at, "input": f"text {at}", "output": "yes", "session_id": "s"} for at in (2_000_000, 1_000_000)]
    assert [one.at_s for one in arrivals(written(tmp_path / "t.jsonl", records))] == [0.0, 1.0]
    with pytest.raises(RequestError, match="unpack"):
        arrivals(written(tmp_path / "t.jsonl.gz", records))
    assert len(arrivals(written(tmp_path / "u.jsonl.gz", records[::-1]))) == 2


# -- files --------------------------------------------------------------------------------------------------------------


def test_the_first_line_says_what_a_trace_is(tmp_path: Path) -> None:
    assert (kind_of_file(str(MOONCAKE)), kind_of_file(str(TAUBENCH))) == ("mooncake", "text")
    with pytest.raises(RequestError, match="line 1: is of no trace"):
        kind_of_file(str(written(tmp_path / "t.jsonl", [{"prompt": "x"}])))
    (tmp_path / "e.jsonl").write_text("\n\n")
    with pytest.raises(RequestError, match="is empty"):
        kind_of_file(str(tmp_path / "e.jsonl"))
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(RequestError, match="cannot be read"):
        kind_of_file(str(tmp_path / "b.jsonl.gz"))
    with pytest.raises(RequestError, match="cannot be read"):
        kind_of_file(str(tmp_path))
