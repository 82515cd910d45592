"""The rows of a plan: what is in memory, how many bytes, and at which of the two moments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..quant.weight import Scratch
from ..units import MIB
from .request import Request
from .sizes import Kept, ModelSizes

STAGING_LAYERS = 2
Moment = Literal["always", "prompt", "answer"]


@dataclass(frozen=True)
class Row:
    """One line of the plan. `when`: at which of the two moments it counts."""

    name: str
    bytes: int
    when: Moment = "always"
    note: str = ""


def plan_rows(sizes: ModelSizes, request: Request, kept: Kept) -> tuple[Row, ...]:
    sequences, sets, how = request.sequences, request.sets, request.precision
    layers = list(zip(sizes.layers, kept, strict=True))
    fixed = sum(layer.fixed_in(how) for layer in sizes.layers)
    experts = sum(layer.feed_forward(k, how) for layer, k in layers)
    staged = sizes.staged(kept, how)
    whole = max(layer.fixed + layer.feed_forward(layer.whole) for layer in sizes.layers)
    rows = [Row("Python and libraries", request.runtime, note="measured")]
    rows.append(Row("embeddings, final norm, head", sizes.outer_in(how), note=how.head))
    if request.export:
        rows.append(Row("one compact layer", max(layer.feed_forward(k) for layer, k in layers)))
        rows.append(Row("staging, two layers", STAGING_LAYERS * whole, "prompt"))
    else:
        rows.append(Row("attention and norms", fixed, note=how.others))
        rows.append(Row("experts (kept feed-forward)", sets * experts, note=_experts_note(sizes, request, kept)))
        if request.copies:
            rows.append(Row("two dense layers", STAGING_LAYERS * whole, "prompt"))
        elif staged:
            rows.append(Row("staging, two layers", STAGING_LAYERS * staged, "prompt"))
    if request.converts:
        rows.append(Row("conversion buffer", request.converts, "prompt"))
    if how.quantized:
        rows.append(Row("rows on their way into packed weights", Scratch.bytes(sizes.widest, sizes.item), "prompt"))
    together = sequences if sets == 1 else 1
    activations = sizes.activations(request.prompt_tokens, together)
    rows.append(Row("activations of the prompt", activations, "prompt"))
    waiting = request.waiting + (sets if sets > 1 else 0) * 3 * request.prompt_tokens * sizes.hidden * sizes.item
    if waiting:
        rows.append(Row("prompts that wait for a layer", waiting, "prompt"))
    if needs_steady_heap(sizes, request):
        rows.append(Row("holes in the heap", max(activations * 3 // 2, 48 * MIB), "prompt", "measured"))
    if not request.export:
        tokens = request.prompt_tokens + request.max_new_tokens
        note = f"{request.prompt_tokens} tokens" + (f", {sequences} prompts" if sequences > 1 else "")
        rows.append(Row("KV cache of the prompt", sequences * sizes.cache(request.prompt_tokens), "prompt", note))
        rows.append(Row("KV cache with the answer", sequences * sizes.cache(tokens), "answer", f"{tokens} tokens"))
        rows.append(Row("activations of a token", sizes.activations(1, together), "answer"))
    matrices = [block.per_neuron * block.neurons for layer in sizes.layers for block in layer.blocks]
    packed = max(matrices, default=0)  # a product may copy its matrix
    rows.append(Row("margin", packed + _margin(request.runtime), note="allocator, threads, kernels' scratch"))
    return tuple(rows)


def _experts_note(sizes: ModelSizes, request: Request, kept: Kept) -> str:
    how, rest = request.precision.kept, request.precision.rest
    parts = [f"{_share(sizes, kept):.0%} of the neurons" + (f" in {how}" if how else "")]
    parts += [f"the rest in {rest}"] if rest else []
    parts += [f"{request.sets} sets"] if request.sets > 1 else []
    return ", ".join(parts)


def held_layers(request: Request, rows: Sequence[Row], staged: int, layers: int) -> int:
    """How many layers stay in RAM for the next prompt: as `host_memory` allows and, on the CPU, the budget."""
    if request.export or not staged:
        return 0
    room = request.host_memory if request.copies else min(request.host_memory, request.budget - peak_bytes(rows))
    return max(0, min(room // staged, layers))


def needs_steady_heap(sizes: ModelSizes, request: Request) -> bool:
    """Whether the heap should keep what activations leave (see memory.steady_heap): where they are large, or many.

    Not in float32, where the products' own buffers would leave holes without end (measured)."""
    large = sizes.activations(request.prompt_tokens) >= 32 * MIB
    return sizes.item < 4 and (large or request.waiting > 0)


def peak_bytes(rows: Sequence[Row]) -> int:
    moments: tuple[Moment, ...] = ("prompt", "answer")
    return max(sum(row.bytes for row in rows if row.when in ("always", moment)) for moment in moments)


def _margin(runtime: int) -> int:
    return 48 * MIB if runtime else 32 * MIB


def _share(sizes: ModelSizes, kept: Kept) -> float:
    there = sum(layer.count(layer.whole) for layer in sizes.layers)
    return sum(layer.count(k) for layer, k in zip(sizes.layers, kept, strict=True)) / max(1, there)
