"""The page: what was run, tables, plots, how to read them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import msgspec

from kvatlas.errors import RequestError
from kvatlas.sim.comparison import PHASE_FIGURES, best, figures, groups, phase_rows
from kvatlas.sim.plan import Plan
from kvatlas.sim.report.curves import curves
from kvatlas.sim.report.markup import Markup, joined, tag
from kvatlas.sim.report.plots import Plots
from kvatlas.sim.results import RunResult

GROUPS_DRAWN_MAX = 6
"""Groups of runs with plots of their own; of more, tables and curves have to do."""


def check(file: Path) -> None:
    """Raise RequestError where the page could not be written, before hours are spent on what it shows."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--report", "needs matplotlib", "pip install 'kvatlas[sim]'")
    if not file.parent.is_dir():
        raise RequestError("--report", f"{file.parent} is no directory", "name a file in one that there is")


def write(file: Path, done: Sequence[tuple[Plan, RunResult]], command: str) -> None:
    """Write the page. RequestError where that fails."""
    try:
        file.write_text(page(done, command), "utf-8")
    except OSError as error:
        raise RequestError("--report", f"{file} cannot be written: {error.strerror}", "name another file") from None


def page(done: Sequence[tuple[Plan, RunResult]], command: str) -> str:
    """Return a page about runs, of which there is one at least. Equal runs give the same page."""
    runs = [result for _, result in done]
    title = f"{runs[0].workload}: {_listed(list(dict.fromkeys(run.policy for run in runs)))}"
    plots = Plots(list(dict.fromkeys(run.policy for run in runs)))
    body = tag(
        "main",
        tag("h1", title),
        tag("p", _lead(done), class_="lead"),
        tag("pre", command),
        *_notes(runs),
        tag("h2", "Results"),
        _results(runs),
        *_curves(runs, plots),
        *(part for group in groups(runs)[:GROUPS_DRAWN_MAX] for part in _group(group, plots)),
        tag("h2", "What the figures are"),
        tag("dl", *(part for figure in figures(runs) for part in (tag("dt", figure.name), tag("dd", figure.what)))),
        tag("h2", "Parameters"),
        tag("p", "Equal parameters give equal results."),
        *_parameters(done),
        tag("footer", f"kvatlas {version('kvatlas')}, kvatlas simulate"),
    )
    style = files("kvatlas.sim.report").joinpath("style.css").read_text("utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"kvatlas simulate: {title}"),
        tag("style", Markup(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} policies"


def _lead(done: Sequence[tuple[Plan, RunResult]]) -> str:
    """Return what all runs have in common, in a line."""
    runs = [result for _, result in done]
    told = (
        ("{} engines", {f"{plan.engines}" for plan, _ in done}),
        ("{} KV blocks each", {f"{plan.spec.gpu_blocks:,}" for plan, _ in done}),
        ("seed {}", {f"{plan.seed}" for plan, _ in done}),
    )
    same = [text.format(*values) for text, values in told if len(values) == 1]
    requests, virtual_s = sum(run.finished for run in runs), sum(run.duration_s for run in runs)
    whole = f"{len(runs)} runs, {requests:,} requests, {virtual_s:,.0f} s of virtual time"
    return "; ".join([", ".join(same), whole]) + "." if same else f"{whole}."


def _notes(runs: Sequence[RunResult]) -> Iterator[Markup]:
    notes = list(dict.fromkeys(f"{run.policy}: {note}" for run in runs for note in run.notes))
    if notes:
        yield tag("h2", "What was degraded")
        yield tag("ul", *(tag("li", note) for note in notes), class_="notes")


def _results(runs: Sequence[RunResult]) -> Markup:
    varied, columns = any(run.label for run in runs), figures(runs)
    heads = ["policy", *(["varied"] if varied else []), *(figure.name for figure in columns)]
    rows = []
    for number, group in enumerate(groups(runs)):
        leading = [best(figure, group) for figure in columns]
        for place, run in enumerate(group):
            cells = [tag("th", run.policy, scope="row"), *([tag("td", run.label, class_="text")] if varied else [])]
            for figure, who in zip(columns, leading, strict=True):
                shown = figure.shown(figure.of(run))
                cells.append(tag("td", shown, class_="best") if place in who else tag("td", shown))
            rows.append(tag("tr", *cells, class_="next") if number and not place else tag("tr", *cells))
    caption = "★ is the best of its column" + (", among runs that differ in the policy alone" if varied else "")
    return _table(caption, heads, rows)


def _table(caption: str, heads: Sequence[str], rows: Sequence[Markup]) -> Markup:
    cells = (tag("th", name, scope="col", class_="text" if name == "varied" else "figure") for name in heads)
    head = tag("thead", tag("tr", *cells))
    table = tag("table", tag("caption", caption), head, tag("tbody", *rows))
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _figure(title: str, what: str, drawing: Markup) -> Markup:
    return tag("figure", tag("figcaption", tag("strong", title), what), drawing)


def _curves(runs: Sequence[RunResult], plots: Plots) -> Iterator[Markup]:
    for shown in curves(runs)[:GROUPS_DRAWN_MAX]:
        yield tag("h2", f"Over {shown.over}" + (f" ({shown.besides})" if shown.besides else ""))
        yield tag(
            "div",
            _figure(
                "Throughput",
                "Output tokens a second; more is better.",
                plots.over(shown, "output tokens/s", lambda point: point.output_tokens_per_s),
            ),
            _figure(
                "Time to first token, p90",
                "Seconds, on a logarithmic axis; less is better.",
                plots.over(shown, "TTFT p90, s", lambda point: point.ttft_p90_s, log=True),
            ),
            _figure(
                "Hit ratio",
                "Share of prompt tokens that were not computed.",
                plots.over(shown, "hit ratio, %", lambda point: 100 * point.hit_ratio),
            ),
            class_="figures",
        )


def _group(group: Sequence[RunResult], plots: Plots) -> Iterator[Markup]:
    yield tag("h2", "Policies" + (f" ({group[0].label})" if group[0].label else ""))
    yield tag(
        "div",
        _figure("Time to first token", "p50, p90 and p99, on a logarithmic axis; left is better.", plots.ttft(group)),
        _figure("Hit ratio", "Share of prompt tokens that were not computed.", plots.hits(group)),
        _figure("Balance", "A mark is an engine; all at 1 is even.", plots.balance(group)),
        _figure("Queues", "Requests that wait in all engines' queues.", plots.queue(group)),
        class_="figures",
    )
    for figure in PHASE_FIGURES:
        rows = phase_rows(group, figure)
        if rows:
            cells = [tag("tr", tag("th", name, scope="row"), *(tag("td", one) for one in shown)) for name, shown in rows]
            yield _table(f"{figure.name} by phase", ["phase", *(run.policy for run in group)], cells)


def _parameters(done: Sequence[tuple[Plan, RunResult]]) -> Iterator[Markup]:
    """Yield what runs have in common: a block for each group of runs that differ in their policies alone."""
    seen: dict[bytes, str] = {}
    for plan, _ in done:
        tree = {name: value for name, value in msgspec.to_builtins(plan).items() if name not in ("policy", "label")}
        seen.setdefault(msgspec.json.format(msgspec.json.encode(tree)), plan.label)
    for text, label in list(seen.items())[:GROUPS_DRAWN_MAX]:
        yield joined(tag("h3", label) if label else Markup(), tag("pre", text.decode()))
    if len(seen) > GROUPS_DRAWN_MAX:
        yield tag("p", f"And {len(seen) - GROUPS_DRAWN_MAX} more, which differ in what their names say.")
