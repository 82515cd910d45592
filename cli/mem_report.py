"""`griffin mem-report`: what fits this machine, what a run would need, what the last run took."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import GriffinError
from ..options import Placement, Pruning
from ..units import MIB, format_bytes, format_rate, parse_bytes
from . import _console as console
from ._options import Some, count, flag, given_options, json_option, open_engine, switch, takes

if TYPE_CHECKING:
    from ..engine import Engine
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
        run = Run(tokens["prompt_tokens"] or 512, tokens["max_new_tokens"] or 256, pruning)
        planned = plan_from_catalogue(model, placement, run) or plan_of_engine(open_engine(model, placement), run)
        show_plan(planned, as_json)
    else:
        show_machine(placement, as_json)


@dataclass(frozen=True)
class Run:
    """A run to plan."""

    prompt_tokens: int
    max_new_tokens: int
    pruning: Pruning


@dataclass(frozen=True)
class Planned:
    """The plan of a run, what it is of, and every rung of the ladder where the run leaves open what is kept."""

    facts: dict[str, Any]
    plan: "Plan"
    rungs: Sequence[dict[str, Any]]


def plan_of_engine(engine: "Engine", run: Run) -> Planned:
    plan = engine.plan(run.prompt_tokens, run.max_new_tokens, run.pruning)
    facts = {"model": engine.name, "model_path": str(engine.path), "device": engine.device, "dtype": engine.dtype}
    rungs: Sequence[dict[str, Any]] = []
    if run.pruning.sparsity is None:
        request = engine.opened.request(plan.prompt_tokens, plan.max_new_tokens)
        rungs = ladder(engine.sizes, request, plan, engine.skeleton.layout.dtype)
    return Planned(facts, plan, rungs)


def plan_from_catalogue(model: str, placement: Placement, run: Run) -> Planned | None:
    """The plan of a known model that is not on this machine, from its shapes; None for any other."""
    from ..sources.resolve import CATALOGUE, find

    known = CATALOGUE.get(model.lower())
    if known is None or find(model) is not None:
        return None
    if placement.dtype not in (None, "bfloat16"):
        raise GriffinError(f"{model} is not on this machine, and its shapes are known in bfloat16: leave out --dtype")
    import torch

    from ..memory.machine import best_device, check_device, device_budget
    from ..planning.catalogue_fit import catalogue_sizes
    from ..planning.ladder import best_plan
    from ..planning.sizes import bounded

    device = check_device(placement.device) if placement.device else best_device()
    size = placement.device_memory
    budget = device_budget(device) if size is None else parse_bytes(size)
    request = replace(
        request_on(device, budget), prompt_tokens=run.prompt_tokens, max_new_tokens=run.max_new_tokens, fidelity=True
    )
    sizes = bounded(catalogue_sizes(known.config), placement.context, known.alias)
    asked = replace(request, fold=run.pruning.folds)
    plan = best_plan(sizes, asked, replace(run.pruning, prior=None), known.alias)
    rungs = ladder(sizes, request, plan, torch.bfloat16) if run.pruning.sparsity is None else []
    licence = f", which is gated by its licence ({known.licence})" if known.gated else ""
    console.note(f"planned from the shapes of {known.alias}{licence}; it is not on this machine")
    return Planned({"model": known.alias, "model_path": None, "device": device, "dtype": "bfloat16"}, plan, rungs)


def request_on(device: str, budget: int) -> "Request":
    """What a run of the catalogue's size is planned for on a device of this machine."""
    from ..memory.machine import held_memory, how_known
    from ..planning.catalogue_fit import ANSWER_TOKENS, PROMPT_TOKENS
    from ..planning.request import Request

    runtime, known = held_memory(device), how_known(device)
    return Request(PROMPT_TOKENS, ANSWER_TOKENS, 0.0, budget, device, runtime, known, copies=device != "cpu")


def show_plan(planned: Planned, as_json: bool) -> None:
    """The plan of one run, and what else could be kept in its budget."""
    plan, rungs = planned.plan, planned.rungs
    if as_json:
        precision = plan.precision.to_json(planned.facts["dtype"])
        click.echo(json.dumps(planned.facts | plan.to_json() | {"precision": precision, "ladder": rungs}))
        return
    console.plan(plan)
    console.table("Layers", ("layer", "neurons kept", "of", "full", "resident"), layer_rows(plan))
    if rungs:
        columns = ("", "kept", "resident", "peak", "tokens/s", "divergence (nats)")
        console.table(f"From the best to the smallest in {format_bytes(plan.budget)}", columns, ladder_cells(rungs))
    console.pairs(summary(plan), err=False)


def ladder(sizes: "ModelSizes", request: "Request", taken: "Plan", dtype: Any) -> list[dict[str, Any]]:
    """Every rung: what it needs, and what it gives on this machine, by the speed of each format here."""
    from ..memory.out_of_memory import planned
    from ..model.format_speeds import measured_speeds
    from ..planning.ladder import climb, describe

    with planned(request.device):
        speeds = measured_speeds(request.device, dtype)
    request = replace(request, speeds=speeds)
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
        for rung, plan in climb(sizes, request)
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
    from ..memory.machine import check_device, device_budget, machine
    from ..paths import cache_folder
    from ..planning.catalogue_fit import plan_catalogue
    from ..sources.resolve import CATALOGUE

    device, size = placement.device, placement.device_memory
    budget = parse_bytes(size) if size is not None else None
    if device is not None:
        check_device(device)
    here = machine(cache_folder(), largest_weights())
    device = device or here.device
    budget = budget or (here.budget if device == here.device else device_budget(device))
    request = request_on(device, budget)
    rows = [plan_catalogue(model.alias, model.config, request) for model in CATALOGUE.values()]
    if as_json:
        facts = {**here.to_json(), "device": device, "budget": budget}
        click.echo(json.dumps({"machine": facts, "models": [asdict(row) for row in rows]}))
        return
    console.pairs(machine_rows(here, device, budget), err=False)
    click.echo("")
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
        click.echo(json.dumps(last))
        return
    try:
        title, rows = last_rows(last)
    except (KeyError, TypeError, AttributeError) as error:
        raise GriffinError("the report of the last run was written by another version of Griffin: run again") from error
    console.table(title, ("", "predicted", "measured", ""), rows)


def last_rows(last: dict[str, Any]) -> tuple[str, list[tuple[str, ...]]]:
    """Title and cells: what, predicted, measured, how the two compare."""
    memory, io, times = last["memory"], last["io"], last["timings"]
    planned, peak = memory["planned_peak_bytes"], memory["measured_peak_bytes"]
    budget = memory["budget_bytes"]
    side = "below" if peak <= budget else "ABOVE"
    within = f"{format_bytes(abs(budget - peak))} {side} the budget of {format_bytes(budget)}"
    whole, read = io["checkpoint_bytes"], io["bytes_read"]
    limit, pace, expected = times["limit_tokens_per_s"], times["decode_tokens_per_s"], times["expected_tokens_per_s"]
    rows: list[tuple[str, ...]] = [
        ("peak memory", format_bytes(planned), format_bytes(peak), f"{peak / planned:.0%} of the prediction; {within}"),
        ("checkpoint read", format_bytes(whole), format_bytes(read), f"{read / whole:.3f} x"),
    ]
    if predicted := memory["planned_host_peak_bytes"]:
        held = memory["measured_host_peak_bytes"]
        rows.insert(1, ("RAM", format_bytes(predicted), format_bytes(held), "layers for the next prompt, and buffers"))
        if stages := io["stages"]:
            longest = f"bound by {stages['bound_by']}: {stages[stages['longest']]:.2f} s"
            rows.append(("prompt pass", "", f"{stages['total_s']:.2f} s", longest))
    if pace and limit:
        share = f"{pace / limit:.0%} of what memory bandwidth allows"
        rows.append(("tokens/s", f"{expected or limit:.1f}", f"{pace:.1f}", share))
    title = f"{last['model']} at {last['sparsity']:.0%} sparsity, {last['dtype']} on {last['device']}"
    return title, rows
