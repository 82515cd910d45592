"""A run's report, its memory over time and its answer -> one HTML page."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any

from ..foreign import printable
from ..memory.timeline import Sample
from ..planning.plan import Plan
from ..planning.rows import MOMENTS, Moment, Row
from ..report import Report
from ..units import GIB, format_bytes
from ..version import __version__
from .charts import LEFT, RIGHT, WIDTH, Scale, box, legend, line, path, svg, table, text

MARK = '<meta name="generator" content="Griffin Offload">'
WORDS = {"prompt": "prompt pass", "fidelity": "fidelity", "answer": "answer"}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d5dbe3; --ground: #fff; --panel: #f4f6f9;
  --a: #2563a8; --b: #e08a1e; --c: #5a9e6f; --d: #9467a8; --e: #b5533c; --f: #7f8ea3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --soft: #98a4b5; --line: #38424f; --ground: #14191f;
  --panel: #1d242d; --a: #6aa9ea; --b: #f0ad57; --c: #84c79a; --d: #c29ad4; --e: #e08670; --f: #8d9bb0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 960px; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } p { margin: .4rem 0; }
.soft { color: var(--soft); } .panel { background: var(--panel); border-radius: 6px; padding: .8rem 1rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .6rem; margin: 1rem 0; }
.facts div { background: var(--panel); border-radius: 6px; padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.05rem; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: inherit; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); } .axis { stroke: var(--line); } .budget { stroke: var(--e); stroke-dasharray: 6 4; }
.plan { stroke: var(--b); fill: none; stroke-width: 2; } .measured { stroke: var(--a); fill: none; stroke-width: 2; }
.device { stroke: var(--d); fill: none; stroke-width: 2; } .moment { stroke: var(--soft); stroke-dasharray: 2 3; }
.k0 { fill: var(--a); } .k1 { fill: var(--b); } .k2 { fill: var(--c); } .k3 { fill: var(--d); } .k4 { fill: var(--e); }
.k5 { fill: var(--f); } i { display: inline-block; width: .7em; height: .7em; margin-right: .5em; }
i.k0 { background: var(--a); } i.k1 { background: var(--b); } i.k2 { background: var(--c); }
i.k3 { background: var(--d); } i.k4 { background: var(--e); } i.k5 { background: var(--f); }
.peak { stroke: var(--ink); stroke-dasharray: 4 3; } .empty { fill: var(--line); }
"""


def html_page(
    report: Report, samples: Sequence[Sample], prompt: str, answer: str, ended: str, settings: Mapping[str, Any]
) -> str:
    """The page of one run. `ended`: why the answer did; `settings`: options by name, as they were asked for."""
    title = f"{report.model}: {report.tokens} tokens on {report.device}"
    said = {name: value for name, value in settings.items() if value is not None and value is not False}
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">Griffin Offload {__version__}</p>',
        facts(report),
        *section("Answer", panel(answer or "(empty)"), f'<p class="soft">It ended: {escape(ended)}.</p>'),
        *section("Memory over time", over_time(report, samples)),
        *section("Plan against measurement", plan_chart(report.plan, report.measured_peak), plan_table(report)),
        *section("Layers", layers_chart(report)),
        *section("The run", table(("", ""), report.rows())),
        *section("Settings", table(("option", "value"), [(name, str(value)) for name, value in said.items()])),
        *section("Prompt", panel(prompt)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = [
        '<meta charset="utf-8">',
        MARK,
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    body = "\n".join(sections)
    return printable(
        f'<!doctype html>\n<html lang="en">\n<head>\n{chr(10).join(head)}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def section(title: str, *parts: str) -> Iterable[str]:
    return (f"<h2>{escape(title)}</h2>", *parts)


def panel(words: str) -> str:
    return f'<div class="panel"><pre>{escape(words)}</pre></div>'


def facts(report: Report) -> str:
    """The figures that one looks for first."""
    plan = report.plan
    told = [
        ("resident", format_bytes(plan.resident_bytes), f"of {format_bytes(plan.full_bytes)}"),
        ("peak", format_bytes(report.measured_peak), f"{format_bytes(plan.peak)} planned"),
        ("first token", f"{report.time_to_first_token_s:.2f} s", f"{plan.prompt_tokens} tokens of prompt"),
        ("decoding", f"{report.decode_tokens_per_s:.1f} tokens/s", f"{report.tokens} tokens"),
        (
            "read",
            format_bytes(report.bytes_read),
            f"{report.bytes_read / report.checkpoint_bytes:.2f} x the checkpoint",
        ),
    ]
    if report.fidelity and not report.fidelity.why_not:
        told.append(("fidelity", f"{report.fidelity.kept:.2f}", "of the full model's choices"))
    cells = (f'<div><span class="soft">{name}</span><b>{value}</b>{escape(more)}</div>' for name, value, more in told)
    return f'<div class="facts">{"".join(cells)}</div>'


def over_time(report: Report, samples: Sequence[Sample]) -> str:
    """Measured memory, the plan of each moment, the budget."""
    plan, cuda = report.plan, any(sample.device is not None for sample in samples)
    end = samples[-1].seconds
    first = report.time_to_first_token_s
    fidelity = report.fidelity.seconds if report.fidelity else 0.0
    spans: dict[Moment, tuple[float, float]]
    spans = {"prompt": (0.0, first), "fidelity": (first, first + fidelity), "answer": (first + fidelity, end)}
    planned = {moment: moment_bytes(plan, moment) for moment in MOMENTS}
    top = max([sample.process for sample in samples] + [sample.device or 0 for sample in samples] + [plan.peak])
    x, y = Scale(end, LEFT, WIDTH - RIGHT), Scale(top * 1.05 / GIB, 260, 20)
    parts = [*grid(x, y, 260, " s", " GiB")]
    for moment, (begin, until) in spans.items():
        if until > begin:
            height = y(planned[moment] / GIB)
            told = f"planned for the {WORDS[moment]}: {format_bytes(planned[moment])}"
            parts.append(path([(x(begin), height), (x(until), height)], "plan", told))
            parts.append(line(x(until), 20, x(until), 260, "moment"))
            if x(until) - x(begin) > 70:
                parts.append(text((x(begin) + x(until)) / 2, 14, WORDS[moment], "middle", "soft"))
    if plan.budget <= top * 1.05:
        parts.append(line(LEFT, y(plan.budget / GIB), WIDTH - RIGHT, y(plan.budget / GIB), "budget"))
    ram = [(x(sample.seconds), y(sample.process / GIB)) for sample in samples]
    parts.append(path(ram, "measured", "RAM of the process, measured"))
    if cuda:
        parts.append(
            path([(x(s.seconds), y((s.device or 0) / GIB)) for s in samples], "device", "on the GPU, measured")
        )
    entries = [("k0", "RAM of the process, measured"), ("k1", f"planned on {report.device}")]
    entries += [("k3", "torch's allocator on the GPU, measured")] if cuda else []
    entries += [
        ("k4", f"budget {format_bytes(plan.budget)}{'' if plan.budget <= top * 1.05 else ' (above the chart)'}")
    ]
    return svg(310, "Memory over time", *parts, *legend(entries, 300))


def moment_bytes(plan: Plan, moment: str) -> int:
    return sum(row.bytes for row in plan.rows if row.when in ("always", moment))


def plan_chart(plan: Plan, measured: int) -> str:
    """For each moment, the rows of the plan behind one another; where the measured peak is."""
    moments = [moment for moment in MOMENTS if any(row.when == moment for row in plan.rows)] or ["answer"]
    x = Scale(max(plan.peak, measured) * 1.05 / GIB, LEFT, WIDTH - RIGHT)
    height, kinds = 34 * len(moments) + 10, colours(plan.rows)
    parts = [*grid(x, None, height, " GiB", "")]
    for number, moment in enumerate(moments):
        at, done = 34 * number + 8, 0
        parts.append(text(LEFT - 6, at + 16, WORDS[moment], "end"))
        for row in (row for row in plan.rows if row.when in ("always", moment) and row.bytes):
            told = f"{row.name}: {format_bytes(row.bytes)}{f' ({row.note})' if row.note else ''}"
            begin, done = done, done + row.bytes
            parts.append(box(x(begin / GIB), at, x(done / GIB) - x(begin / GIB), 22, kinds[row.name], told))
    parts.append(line(x(measured / GIB), 0, x(measured / GIB), height, "peak"))
    parts.append(text(x(measured / GIB) - 4, height + 32, f"peak measured: {format_bytes(measured)}", "end"))
    return svg(height + 40, "Plan against measurement", *parts)


def colours(rows: Iterable[Row]) -> dict[str, str]:
    """The colour of each part, the same at every moment."""
    names = dict.fromkeys(row.name for row in rows if row.bytes and row.when != "host")
    return dict(zip(names, cycle(f"k{number}" for number in range(6)), strict=False))


def plan_table(report: Report) -> str:
    kinds = colours(report.plan.rows)
    rows: list[tuple[str, ...]] = [(r.name, format_bytes(r.bytes), r.when, r.note) for r in report.plan.rows]
    rows.append(("peak, the largest of the moments", format_bytes(report.plan.peak), "", "planned"))
    rows.append(("peak", format_bytes(report.measured_peak), "", "measured"))
    return table(("part", "memory", "counts", ""), rows, [kinds.get(row[0], "") for row in rows])


def layers_chart(report: Report) -> str:
    """For each layer: the share of its neurons that is kept, and what its prompt pass took."""
    layers, times = report.plan.layers, report.stages.layers if report.stages else ()
    times = times[: len(layers)]
    longest = max((wait + after for wait, after in times), default=0.0)
    middle, step = 430, max(6.0, min(18.0, 700 / len(layers)))
    share, took = Scale(1.0, LEFT, middle - 20), Scale(longest, middle + 20, WIDTH - RIGHT)
    height = 24 + step * len(layers)
    parts = [text(LEFT, 14, "neurons kept"), text(middle + 20, 14, "prompt pass" if times else "nothing was read")]
    for index, layer in enumerate(layers):
        y = 24 + step * index
        if index % 5 == 0 or step >= 12:
            parts.append(text(LEFT - 6, y + step - 2, str(index), "end", "soft"))
        kept = layer.kept / layer.neurons if layer.neurons else 1.0
        told = f"layer {index}: {layer.kept} of {layer.neurons} neurons, {format_bytes(layer.resident_bytes)} resident"
        parts.append(box(share(0), y, share(1) - share(0), step - 2, "empty", told))
        parts.append(box(share(0), y, share(kept) - share(0), step - 2, "k0", told))
        if index < len(times):
            wait, after = times[index]
            parts.append(
                box(took(0), y, took(wait) - took(0), step - 2, "k1", f"layer {index}: {wait:.3f} s of waiting")
            )
            computed = f"layer {index}: {after:.3f} s of computing"
            parts.append(box(took(wait), y, took(wait + after) - took(wait), step - 2, "k2", computed))
    marks = [("k0", "kept as they are")]
    if times:
        marks += [("k1", "waiting for the disk or the bus"), ("k2", f"computing (longest layer {longest:.3f} s)")]
    chart = svg(height + 24, "Layers", *parts, *legend(marks, height + 18))
    return chart + (stages_table(report) if report.stages else "")


def stages_table(report: Report) -> str:
    """Seconds of the stages of the prompt pass, which work at the same time."""
    assert report.stages
    told = report.stages.to_json()
    names = {
        "read_s": "reading from disk",
        "host_copy_s": "copies in RAM",
        "bus_s": "the bus",
        "compute_s": "computing",
    }
    rows = [(words, f"{told[name]:.3f} s") for name, words in names.items() if told[name]]
    rows += [("waiting for layers", f"{told['wait_s']:.3f} s"), ("in all", f"{told['total_s']:.3f} s")]
    return table(("stages of the prompt pass, at the same time", ""), rows)


def grid(x: Scale, y: Scale | None, height: float, unit_x: str, unit_y: str) -> Iterable[str]:
    """Lines and figures at round values."""
    for value in x.ticks():
        yield line(x(value), 20 if y else 0, x(value), height, "axis")
        yield text(x(value), height + 16, f"{value:g}{unit_x}", "middle", "soft")
    for value in y.ticks() if y else ():
        assert y
        yield line(LEFT, y(value), WIDTH - RIGHT, y(value), "axis")
        yield text(LEFT - 6, y(value) + 4, f"{value:g}{unit_y}", "end", "soft")
