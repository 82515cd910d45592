"""`griffin mem-report`: what fits this machine, what a run would need, what the last run took."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import GriffinError
from ..options import Placement, Pruning
from ..small_json import need
from ..units import MIB, format_bytes, format_rate
from . import _console as console
from ._flags import count, flag, json_option, switch
from ._opening import open_engine
from ._options import Some, takes
from ._print import echo
from ._usage import given_options

if TYPE_CHECKING:
    import torch

    from ..memory.machine import Machine
    from ..planning.catalogue_fit import CatalogueRow
    from ..planning.plan import Plan
    from ..planning.request import Request
    from ..planning.sizes import ModelSizes

OF_PRUNING = ("sparsity", "resident_dtype", "rest", "fold", "method")
NEEDS_MODEL = (*OF_PRUNING, "prompt_tokens", "max_new_tokens", "dtype", "context")


@click.command("mem-report", short_help="What fits here, what a run needs, what the last one took.")
@click.option("--model", metavar="NAME", help="Plan a run of this model, row by row and layer by layer.")
@switch("--last", "Compare the prediction for the last run with what was measured.")
@count("--prompt-tokens", None, "With --model: tokens of the prompt. [default: 512]")
@count("--max-new-tokens", None, "With --model: longest answer, in tokens. [default: 256]")
@takes(Some(Pruning, only=OF_PRUNING), Some(Placement, without=("host_memory",)))
@json_option("Print one JSON object.")
def command(
    *, model: str | None, last: bool, pruning: Pruning, placement: Placement, as_json: bool, **tokens: Any
) -> None:
    """What fits this machine, what a run would need, what the last run took.

    Without options: this machine, and which models of the catalogue fit it. No weights are read.
    """
    given = given_options()
    if last and set(given) - {"last", "as_json"}:
        raise click.UsageError("--last shows the last run as it was: leave out the other options")
    if model is None and (lost := [name for name in given if name in NEEDS_MODEL]):
        raise click.UsageError(f"{flag(lost[0])} needs --model NAME")
    if last:
        show_last(as_json)
    elif model is not None:
        asked = tokens["prompt_tokens"] or 512, tokens["max_new_tokens"] or 256
        planned = plan_known_shape(model, placement, pruning, *asked) or plan_opened(model, placement, pruning, *asked)
        show_plan(planned, ladder(planned) if pruning.sparsity is None else [], as_json)
    else:
        show_machine(placement, as_json)


@dataclass(frozen=True)
class Planned:
    """The plan of a run of a model, and what it was made of. `path`: None where the model is not on this machine;
    `note`: a word on that."""

    plan: "Plan"
    request: "Request"
    sizes: "ModelSizes"
    name: str
    path: str | None
    dtype: "torch.dtype"
    note: str = ""


def plan_opened(model: str, placement: Placement, pruning: Pruning, prompt: int, answer: int) -> Planned:
    engine = open_engine(model, placement)
    plan, request = engine.plan(prompt, answer, pruning), engine.opened.request(prompt, answer)
    request = engine.opened.on_all_cards(request)
    return Planned(plan, request, engine.sizes, engine.name, str(engine.path), engine.skeleton.layout.dtype)


def plan_known_shape(model: str, placement: Placement, pruning: Pruning, prompt: int, answer: int) -> Planned | None:
    """The plan of a model that the catalogue knows and that is not on this machine; None for another one. Nothing is
    fetched."""
    from ..sources.resolve import only_known

    if (known := only_known(model)) is None:
        return None
    import torch

    from ..planning.catalogue_fit import catalogue_sizes
    from ..planning.ladder import best_plan, plan_at_speed
    from ..planning.sizes import bounded

    dtype = getattr(torch, placement.dtype or "bfloat16")
    sizes = bounded(catalogue_sizes(known.config, dtype), placement.context, known.alias)
    request = replace(request_here(placement), prompt_tokens=prompt, max_new_tokens=answer)
    asked = replace(request, fold=pruning.folds, fidelity=True)
    plan = plan_at_speed(best_plan, sizes, asked, pruning, known.alias, dtype)
    licence = f"{known.licence}, gated: accept it on the model's page first" if known.gated else known.licence
    note = (
        f"not on this machine: planned from its shape. `griffin pull {known.alias}` fetches {known.hub_id}, "
        f"{format_bytes(known.bytes)} in bfloat16 (licence: {licence})"
    )
    return Planned(plan, request, sizes, known.alias, None, dtype, note)


def request_here(placement: Placement) -> "Request":
    """What is planned for on this machine, on the device and in the budget that were asked for."""
    from ..memory.machine import devices_of
    from ..memory.upload import ring_for
    from ..planning.cards import card_here
    from ..planning.catalogue_fit import ANSWER_TOKENS, PROMPT_TOKENS
    from ..planning.request import Request

    cards = tuple(card_here(device, placement.device_memory) for device in devices_of(placement.device))
    device = cards[0].device
    return Request(
        PROMPT_TOKENS,
        ANSWER_TOKENS,
        0.0,
        sum(card.budget for card in cards),
        device,
        cards[0].runtime,
        cards[0].runtime_note,
        copies=device != "cpu",
        static=device == "cuda",
        ring=ring_for(device) if device != "cpu" else None,
        cards=cards if len(cards) > 1 else (),
    )


def show_plan(planned: Planned, rungs: Sequence[dict[str, Any]], as_json: bool) -> None:
    """The plan of one run, and what else could be kept in its budget."""
    plan = planned.plan
    if as_json:
        dtype = str(planned.dtype).removeprefix("torch.")
        facts = {"model": planned.name, "model_path": planned.path, "device": planned.request.where, "dtype": dtype}
        facts |= plan.to_json() | {"precision": plan.precision.to_json(dtype)}
        echo(json.dumps(facts | {"ladder": rungs}))
        return
    if planned.note:
        echo(f"{planned.name} is {planned.note}\n")
    console.plan(plan)
    console.table("Layers", ("layer", "neurons kept", "of", "full", "resident"), layer_rows(plan))
    if rungs:
        columns = ("", "kept", "resident", "peak", "tokens/s", "divergence (nats)")
        console.table(f"From the best to the smallest in {format_bytes(plan.budget)}", columns, ladder_cells(rungs))
    console.pairs(summary(plan), err=False)


def ladder(planned: Planned) -> list[dict[str, Any]]:
    """Every rung: what it needs, and what it gives on this machine, by the speed of each format here."""
    taken, device = planned.plan, planned.request.device
    from ..memory.out_of_memory import planned as within_plan
    from ..model.format_speeds import measured_speeds
    from ..planning.ladder import climb, describe

    with within_plan(device):
        speeds = measured_speeds(device, planned.dtype)
    request = replace(planned.request, speeds=speeds)
    return [
        {
            "kept": str(rung),
            "resident_bytes": plan.resident_bytes,
            "planned_peak_bytes": plan.peak,
            "tokens_per_s": plan.tokens_per_s,
            "tokens_per_s_limit": speeds.dense / plan.bytes_per_token,
            "divergence": rung.divergence,
            "fits": plan.fits,
            "taken": str(rung) == describe(taken),
        }
        for rung, plan in climb(planned.sizes, request)
    ]


def ladder_cells(rungs: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            "taken" if rung["taken"] else "fits" if rung["fits"] else "too large",
            rung["kept"],
            format_bytes(rung["resident_bytes"]),
            format_bytes(rung["planned_peak_bytes"]),
            f"{rung['tokens_per_s']:.1f}",
            f"{rung['divergence']:.2g}",
        )
        for rung in rungs
    ]


def layer_rows(plan: "Plan") -> Iterator[tuple[Any, ...]]:
    for index, layer in enumerate(plan.layers):
        sizes = format_bytes(layer.full_bytes), format_bytes(layer.resident_bytes)
        yield index, layer.kept, layer.neurons, *sizes


def summary(plan: "Plan") -> list[tuple[str, str]]:
    saved = plan.full_bytes - plan.resident_bytes
    fits = "yes: offloading is not needed" if plan.fits_whole else "no"
    return [
        ("full model", format_bytes(plan.full_bytes)),
        ("resident", f"{format_bytes(plan.resident_bytes)} (saves {format_bytes(saved)})"),
        *([("the rest", plan.rest_and_why)] if plan.rest else []),
        *([("fold", plan.fold_in_words)] if plan.fold_in_words else []),
        ("fits whole", fits),
        *([("expected", f"{plan.tokens_per_s:.1f} tokens/s")] if plan.tokens_per_s else []),
    ]


def show_machine(placement: Placement, as_json: bool) -> None:
    """This machine, and the catalogue against its budget."""
    from ..memory.machine import machine
    from ..paths import cache_folder
    from ..planning.catalogue_fit import plan_catalogue
    from ..sources.resolve import CATALOGUE

    request = request_here(placement)
    here, device, budget = machine(cache_folder(), largest_weights()), request.where, request.budget
    rows = [plan_catalogue(model.alias, model.config, request) for model in CATALOGUE.values()]
    if as_json:
        facts = {**here.to_json(), "device": device, "budget": budget}
        echo(json.dumps({"machine": facts, "models": [asdict(row) for row in rows]}))
        return
    console.pairs(machine_rows(here, device, budget), err=False)
    echo()
    columns = ("model", "full", "resident, 50 % dropped", "75 %", "the best that fits here", "resident")
    console.table(f"What fits in {format_bytes(budget)}", columns, catalogue_cells(rows))


def machine_rows(here: "Machine", device: str, budget: int) -> Iterator[tuple[str, str]]:
    for gpu in here.gpus:
        yield "GPU", f"{gpu.name}: {format_bytes(gpu.total)}, {format_bytes(gpu.free)} free"
    if not here.gpus:
        yield "GPU", "none that torch can use"
    ram = f"{format_bytes(here.ram_total)}, {format_bytes(here.ram_available)} available"
    limit = here.container_limit
    yield "RAM", ram if limit is None else f"{ram}, limited to {format_bytes(limit)} by the container"
    speed = here.disk_read_bandwidth
    yield "disk", f"{format_bytes(here.disk_free)} free, reads {format_rate(speed) if speed else 'at an unknown speed'}"
    yield "budget", f"{format_bytes(budget)} on {device}"


def catalogue_cells(rows: Sequence["CatalogueRow"]) -> list[tuple[str, ...]]:
    """Cells of each model; a chat model shares the line of its base: 'llama-2-7b, -chat'."""
    lines: dict[str, tuple[str, ...]] = {}
    for row in rows:
        sizes = [format_bytes(size) for size in (row.full_bytes, row.resident_50, row.resident_75)]
        best = "-" if row.best_bytes is None else format_bytes(row.best_bytes)
        cells = (*sizes, row.best or "does not fit", best)
        base = next(reversed(lines), None)
        if base and row.alias.startswith(f"{base}-") and lines[base][1:] == cells:
            lines[base] = (f"{lines[base][0]}, {row.alias.removeprefix(base)}", *cells)
        else:
            lines[row.alias] = (row.alias, *cells)
    return list(lines.values())


def largest_weights() -> Path | None:
    """The largest weights on this machine, if large enough to measure the disk with."""
    from ..sources.resolve import local_models, weight_files

    files = [file for model in local_models() if model.path.is_dir() for file in weight_files(model.path)]
    best = max(files, key=lambda file: file.stat().st_size, default=None)
    return best if best and best.stat().st_size >= 64 * MIB else None


def show_last(as_json: bool) -> None:
    """The last run: what was planned beside what was measured. Raises GriffinError if there was none."""
    from ..paths import cache_folder
    from ..report import load_last

    last = load_last(cache_folder())
    if as_json:
        echo(json.dumps(last))
        return
    try:
        title, rows = last_rows(last)
    except (ValueError, ZeroDivisionError) as error:
        raise GriffinError(
            f"the report of the last run is damaged, or of another version of Griffin ({error}): run again"
        ) from error
    console.table(title, ("", "predicted", "measured", ""), rows)


def card_rows(cards: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Cells of each of several devices, of a report's JSON. Raises ValueError."""
    for card in cards:
        planned, peak, budget = (
            need(card, f"{name}_bytes", float) for name in ("planned_peak", "measured_peak", "budget")
        )
        begin, end = need(card, "layers", list)
        layers = f"{end - begin} layers from {begin} on; " if end > begin else "no layer; "
        yield (need(card, "device", str), format_bytes(planned), format_bytes(peak), layers + within(peak, budget))


def within(peak: float, budget: float) -> str:
    """'1.2 GiB below the budget of 8 GiB'."""
    side = "below" if peak <= budget else "ABOVE"
    return f"{format_bytes(abs(budget - peak))} {side} the budget of {format_bytes(budget)}"


def last_rows(last: dict[str, Any]) -> tuple[str, list[tuple[str, ...]]]:
    """Title and cells: what, predicted, measured, how the two compare. Raises ValueError or ZeroDivisionError."""
    memory, io, times = (need(last, name, dict) for name in ("memory", "io", "timings"))
    planned, peak, budget = (
        need(memory, f"{name}_bytes", float) for name in ("planned_peak", "measured_peak", "budget")
    )
    left = within(peak, budget)
    whole, read = (need(io, name, float) for name in ("checkpoint_bytes", "bytes_read"))
    limit, pace = (need(times, f"{name}_tokens_per_s", float) for name in ("limit", "decode"))
    expected = need({**times, "expected": times.get("expected_tokens_per_s") or 0.0}, "expected", float)
    rows: list[tuple[str, ...]] = [
        ("peak memory", format_bytes(planned), format_bytes(peak), f"{peak / planned:.0%} of the prediction; {left}"),
        ("checkpoint read", format_bytes(whole), format_bytes(read), f"{read / whole:.3f} x"),
    ]
    if predicted := need(memory, "planned_host_peak_bytes", float):
        held = need(memory, "measured_host_peak_bytes", float)
        what = "layers for the next prompt, and buffers"
        if locked := need({"host_locked_bytes": 0.0, **memory}, "host_locked_bytes", float):
            what += f"; {format_bytes(locked)} page-locked"
        rows.insert(1, ("RAM", format_bytes(predicted), format_bytes(held), what))
        if stages := need({**io, "stages": io.get("stages") or {}}, "stages", dict):
            seconds = need(stages, need(stages, "longest", str), float)
            longest = f"bound by {need(stages, 'bound_by', str)}: {seconds:.2f} s"
            rows.append(("prompt pass", "", f"{need(stages, 'total_s', float):.2f} s", longest))
    rows[1:1] = card_rows(memory.get("cards") or [])
    if pace and limit:
        share = f"{pace / limit:.0%} of what memory bandwidth allows"
        rows.append(("tokens/s", f"{expected or limit:.1f}", f"{pace:.1f}", share))
    model, dtype, device = (need(last, name, str) for name in ("model", "dtype", "device"))
    title = f"{model} at {need(last, 'sparsity', float):.0%} sparsity, {dtype} on {device}"
    return title, rows
