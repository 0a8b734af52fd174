"""Tokens of the completions that the benchmark of the proxy sends (``sides/completions.lua``): CPU time of a prompt.

64 beginnings of 6 KB that come again and again, each time with another question behind them. Ours is all that an event loop
asks for (``Tokenization.tokens``), with 32 prompts in flight: CPU time of the whole process, and of it the part of the loop's
own thread, for which the interpreter is taken (Python threads, which the stores of Python need, come on top of it). Baseline:
the ``tokenizers`` package alone, given the whole text.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

from benchmarks.result import Result, against
from kvatlas.tokens.prompts import TextPrompt
from kvatlas.tokens.tokenization import Tokenization

WORDS = ["the", "fleet", "holds", "every", "prefix", "that", "a", "request", "may", "need", "and", "router", "knows", "it"]
BEGINNINGS = 64
IN_FLIGHT = 32
ROUNDS = 3
CPU_US_MAX = 120
INTERPRETER_US_MAX = 100


def measure(name: str, store: str, tokenization: Tokenization, model: str, alone: Tokenizer, *, prompts: int) -> list[Result]:
    """Return what a prompt costs: the best of some rounds, of ``prompts`` each. AssertionError where a token is wrong."""
    texts = _texts()
    warm = list(itertools.islice(texts, 2 * BEGINNINGS))
    cpu_s, interpreter_s = asyncio.run(_ours(tokenization, model, warm, texts, prompts))
    for text in itertools.islice(texts, BEGINNINGS):
        found = tokenization.tokenize(TextPrompt(model=model, text=text, add_special_tokens=False)).token_ids
        if found.tolist() != alone.encode(text, add_special_tokens=False).ids:
            raise AssertionError("tokens differ from those of the whole text")
    base_s = min(_base(alone, warm) for _ in range(ROUNDS))
    what = f"completion of 6.9 KB, of which 6 KB came before, store {store}"
    baseline = "tokenizers alone"
    cpu = against(name, f"{what}, CPU", cpu_s * 1e6, "us", baseline, base_s * 1e6, higher_is_better=False)
    interpreter = against(
        name, f"{what}, interpreter", interpreter_s * 1e6, "us", baseline, base_s * 1e6, higher_is_better=False
    )
    for result, most in ((cpu, CPU_US_MAX), (interpreter, INTERPRETER_US_MAX)):
        result.target, result.met = f"<= {most} us", result.value <= most
    return [cpu, interpreter]


async def _ours(
    tokenization: Tokenization, model: str, warm: Sequence[str], texts: Iterator[str], prompts: int
) -> tuple[float, float]:
    """Return seconds of CPU time a prompt: of the process, and of this thread."""
    await _ask(tokenization, iter([TextPrompt(model=model, text=text) for text in warm]))
    cpu_s, interpreter_s = [], []
    for _ in range(ROUNDS):
        some = [TextPrompt(model=model, text=text) for text in itertools.islice(texts, prompts)]
        cpu, thread = time.process_time(), time.thread_time()
        await asyncio.gather(*[_ask(tokenization, iter(some[first::IN_FLIGHT])) for first in range(IN_FLIGHT)])
        interpreter_s.append((time.thread_time() - thread) / prompts)
        cpu_s.append((time.process_time() - cpu) / prompts)
    return min(cpu_s), min(interpreter_s)


async def _ask(tokenization: Tokenization, prompts: Iterator[TextPrompt]) -> None:
    for prompt in prompts:
        await tokenization.tokens(prompt)


def _base(alone: Tokenizer, texts: Sequence[str]) -> float:
    began = time.process_time()
    for text in texts:
        alone.encode(text, add_special_tokens=False)
    return (time.process_time() - began) / len(texts)


def _texts() -> Iterator[str]:
    beginnings = [_text(number, 6_000) for number in range(1, BEGINNINGS + 1)]
    for count in itertools.count(1):
        yield f"{beginnings[count * 7919 % BEGINNINGS]} {count} {_text(count, 880)}"


def _text(seed: int, size: int) -> str:
    parts = []
    length, at = 0, seed
    while length < size:
        at = (at * 1_103_515_245 + 12_345) % (1 << 31)
        parts.append(WORDS[at % len(WORDS)])
        length += len(parts[-1]) + 1
    return " ".join(parts)
