"""Texts and chats become the tokens that a real vLLM 0.32 recorded, and what it refused is refused.

``python -m tests.live.tokens_against_vllm --record`` wrote ``tests/data/chats/expected-*.jsonl``: a request's number of tokens
and a hash over them, or the status of the refusal.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvatlas.errors import TokenizationError
from kvatlas.tokens.local.huggingface import HuggingFaceTokenizer, load_huggingface
from tests.models.chats import DATA, TEMPLATES, VARIANTS, corpus, digest, fingerprint, prompt_of, tokens_of, write_model

CASES = corpus()


def _tokenizer(directory: Path, variant: str) -> HuggingFaceTokenizer:
    how = VARIANTS[variant]
    template = (TEMPLATES / how.template).read_text() if how.template else None
    model = write_model(directory, how)
    return load_huggingface(model, name="tiny", revision=None, chat_template=template, trust_request_template=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_request_has_the_tokens_that_vllm_recorded(variant: str, tmp_path: Path) -> None:
    about, *expected = map(json.loads, (DATA / "chats" / f"expected-{variant}.jsonl").read_text().splitlines())
    cases = [case for case in CASES if case.variant == variant]
    assert about["requests"] == digest(cases), "the corpus is another than the recorded one: record again"
    assert len(cases) == len(expected)
    tokenizer = _tokenizer(tmp_path / "tinymodel", variant)
    limit = VARIANTS[variant].max_model_len or tokenizer.max_model_len
    different = []
    for case, right in zip(cases, expected, strict=True):
        try:
            tokens = tokens_of(tokenizer, prompt_of(case), limit)
        except TokenizationError as error:
            if "s" not in right:
                different.append(f"{case.name}: {right} but {error}")
        else:
            if right != {"n": len(tokens), "x": fingerprint(tokens)}:
                different.append(f"{case.name}: {right} but {len(tokens)} tokens")
    assert not different


def test_the_corpus_has_many_requests_that_vllm_takes() -> None:
    lines = [
        line for variant in VARIANTS for line in (DATA / "chats" / f"expected-{variant}.jsonl").read_text().splitlines()[1:]
    ]
    assert len(lines) >= 1500
    assert sum('"n"' in line for line in lines) >= 1000
