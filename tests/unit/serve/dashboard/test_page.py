"""The page's files: small, from nowhere else, and readable."""

from __future__ import annotations

import re
from importlib import resources
from itertools import product

import pytest

from kvatlas.serve.dashboard.http import FILES

ASSETS = resources.files("kvatlas.serve.dashboard") / "assets"
BYTES_MAX = 60_000
CONTRAST_MIN = 4.5
"""Of text. Source: WCAG 2.2, 1.4.3."""
CONTRAST_MIN_GRAPHICS = 3.0
"""Of lines and borders that carry meaning. Source: WCAG 2.2, 1.4.11."""


def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def test_all_files_are_there_and_together_small() -> None:
    sizes = [len(asset(name).encode()) for name, _ in FILES.values()]
    assert all(sizes)
    assert sum(sizes) < BYTES_MAX


def test_nothing_is_fetched_from_elsewhere_and_nothing_is_inline() -> None:
    page = asset("dashboard.html")
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon[a-z]+=", page) == []
    for name in ("dashboard.html", "dashboard.css", "dashboard.js"):
        addresses = re.findall(r"https?://[^\s'\")]+", asset(name))
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    assert "innerHTML" not in asset("dashboard.js")
    assert "eval(" not in asset("dashboard.js")


def themes() -> list[dict[str, str]]:
    """Return the colors of the light page and of the dark one."""
    colors = re.findall(r"--([a-z-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", asset("dashboard.css"))
    return [{name: light for name, light, _ in colors}, {name: dark for name, _, dark in colors}]


def luminance(color: str) -> float:
    def linear(channel: float) -> float:
        return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(color[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_text_can_be_read_on_all_it_stands_on(theme: dict[str, str]) -> None:
    inks = ("text", "muted", "accent", "second", "good", "warning", "error")
    weak = {(ink, ground): contrast(theme[ink], theme[ground]) for ink, ground in product(inks, ("page", "card"))}
    weak["on-accent", "accent"] = contrast(theme["on-accent"], theme["accent"])
    assert {pair: ratio for pair, ratio in weak.items() if ratio < CONTRAST_MIN} == {}
    assert contrast(theme["accent"], theme["track"]) >= CONTRAST_MIN_GRAPHICS
