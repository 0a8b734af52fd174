"""Plots as SVG for a page: colours are the page's own, and what they tell, shapes and dashes tell too."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvatlas.sim.report.curves import Curves, Point
from kvatlas.sim.report.markup import Markup
from kvatlas.sim.results import EngineResult, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INK, SOFT, LINE = "#010101", "#020202", "#030303"
_COLORS = tuple(f"#0101{number:02x}" for number in range(2, 12))
_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)"} | {
    color: f"var(--c{number})" for number, color in enumerate(_COLORS)
}
"""Colours that matplotlib is given, and what the page has for them: light and dark are not its concern."""
_MARKERS = "osD^vPX*<>"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_WIDTH = 5.0
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvatlas",
    "font.family": ["sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


class Plots:
    """Draws; each policy looks the same in all plots of a page."""

    def __init__(self, policies: Sequence[str]) -> None:
        self._places = {policy: place for place, policy in enumerate(policies)}
        self._drawn = 0

    def ttft(self, runs: Sequence[RunResult]) -> Markup:
        """Draw percentiles of the time to first token: a row a policy."""

        def draw(axes: Axes) -> None:
            for row, run in enumerate(runs):
                color = self._color(run.policy)
                values = [max(value, 1e-4) for value in (run.ttft.p50, run.ttft.p90, run.ttft.p99)]
                axes.plot(values, [row] * 3, color=color, linewidth=1.5)
                for value, marker, name in zip(values, "o|D", ("p50", "p90", "p99"), strict=True):
                    size = 11 if marker == "|" else 6
                    label = name if row == 0 else None
                    axes.plot(value, row, marker, color=color, markersize=size, markeredgewidth=2, label=label)
            axes.set_xscale("log")
            _plain_logarithms(axes.xaxis)
            axes.set_xlabel("time to first token, s")
            _rows(axes, [run.policy for run in runs])
            legend = axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
            for handle in legend.legend_handles:
                handle.set_color(INK)  # type: ignore[union-attr]

        return self._draw(draw, 0.9 + 0.32 * len(runs))

    def hits(self, runs: Sequence[RunResult]) -> Markup:
        """Draw hit ratios: a bar a policy."""

        def draw(axes: Axes) -> None:
            for row, run in enumerate(runs):
                axes.barh(row, 100 * run.hit_ratio, height=0.6, color=self._color(run.policy))
                axes.annotate(
                    f"{run.hit_ratio:.1%}", (100 * run.hit_ratio, row), (4, 0), textcoords="offset points", va="center"
                )
            axes.set_xlim(0, 112)
            axes.set_xticks(range(0, 101, 20))
            axes.set_xlabel("prompt tokens that were not computed, %")
            _rows(axes, [run.policy for run in runs])

        return self._draw(draw, 0.7 + 0.32 * len(runs))

    def balance(self, runs: Sequence[RunResult]) -> Markup:
        """Draw what each engine computed over the mean: a row a policy, a mark an engine."""

        def draw(axes: Axes) -> None:
            axes.axvline(1, color=SOFT, linewidth=1)
            for row, run in enumerate(runs):
                computed = [_computed(engine) for engine in run.engines]
                mean = sum(computed) / len(computed) if sum(computed) else 1.0
                places = [one / mean for one in computed]
                marker = self._marker(run.policy)
                axes.plot(places, [row] * len(places), marker, color=self._color(run.policy), markersize=6, alpha=0.7)
            axes.set_xlim(left=0)
            axes.set_xlabel("tokens computed by an engine over the mean of all")
            _rows(axes, [run.policy for run in runs])

        return self._draw(draw, 0.7 + 0.32 * len(runs))

    def queue(self, runs: Sequence[RunResult]) -> Markup:
        """Draw the requests in all queues over time."""

        def draw(axes: Axes) -> None:
            for run in runs:
                at_s = [moment.from_s for moment in run.moments]
                self._line(axes, run.policy, at_s, [moment.waiting for moment in run.moments], every=max(1, len(at_s) // 8))
            _from_zero(axes)
            axes.set_xlabel("virtual time, s")
            axes.set_ylabel("requests that wait")
            axes.grid(visible=True, axis="y")
            self._legend(axes, len(runs))

        return self._draw(draw, 2.6 + 0.16 * ((len(runs) + 2) // 3))

    def over(self, shown: Curves, what: str, of: Callable[[Point], float], *, log: bool = False) -> Markup:
        """Draw one figure of each policy over what was varied."""

        def draw(axes: Axes) -> None:
            for policy, points in shown.by_policy.items():
                values = [max(of(point), 1e-4) if log else of(point) for point in points]
                self._line(axes, policy, [point.at for point in points], values)
            if log:
                axes.set_yscale("log")
                _plain_logarithms(axes.yaxis)
            else:
                _from_zero(axes)
            axes.set_xlabel(shown.over)
            axes.set_ylabel(what)
            axes.grid(visible=True, axis="y")
            self._legend(axes, len(shown.by_policy))

        return self._draw(draw, 2.6 + 0.16 * ((len(shown.by_policy) + 2) // 3))

    def _line(self, axes: Axes, policy: str, at: list[float], values: Sequence[float], every: int = 1) -> None:
        place = self._places[policy]
        axes.plot(
            at,
            values,
            color=self._color(policy),
            marker=self._marker(policy),
            markersize=4.5,
            markevery=(place * every // max(1, len(self._places)), every),
            linestyle=_DASHES[place % len(_DASHES)],
            linewidth=1.6,
            label=policy,
        )

    def _color(self, policy: str) -> str:
        return _COLORS[self._places[policy] % len(_COLORS)]

    def _marker(self, policy: str) -> str:
        return _MARKERS[self._places[policy] % len(_MARKERS)]

    def _legend(self, axes: Axes, lines: int) -> None:
        if lines > 1:
            axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1), handlelength=2.5, columnspacing=1.2)

    def _draw(self, draw: Callable[[Axes], None], height: float) -> Markup:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self._drawn += 1
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(_WIDTH, height), layout="constrained")
            draw(figure.subplots())
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _for_page(text.getvalue(), f"plot{self._drawn}")


def _from_zero(axes: Axes) -> None:
    """Let an axis begin at 0, and leave some room above what is drawn."""
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05 or 1)


def _plain_logarithms(axis: Axis) -> None:
    """Write a logarithmic axis's numbers as people do; those between powers of ten where there are few of these."""

    def between(value: float, place: float) -> str:
        low, high = axis.get_view_interval()
        return f"{value:g}" if high < 10 * low and f"{value:e}"[0] in "235" else ""

    axis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.set_minor_formatter(between)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), labels=list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x")


def _computed(engine: EngineResult) -> int:
    return engine.prompt_tokens - engine.cached_tokens + engine.output_tokens


def _for_page(svg: str, name: str) -> Markup:
    """Return the drawing without its head, with ids that no other drawing has, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)\bwidth="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r'<svg ([^>]*?)\bheight="[^"]*"', r'<svg aria-hidden="true" \1', svg)
    return Markup(re.sub("#0[0-9a-f]{5}", lambda found: _VARIABLES.get(found[0], found[0]), svg))
