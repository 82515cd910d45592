"""The rows of a plan: what is in memory, how many bytes, and when.

One of three moments is the peak: the end of the prompt pass (staging and the prompt's activations beside all kept
neurons), the measurement of the fidelity behind it, or the end of the answer (the whole KV cache, no staging). Beside a
GPU, rows of the host's RAM are told, and count for none."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..model.recurrent import KEPT_STATES
from ..quant.weight import Scratch
from ..units import MIB
from .fidelity import meter_bytes, tokens_again
from .request import Request
from .sizes import Kept, ModelSizes

STAGING_LAYERS = 2
KEPT_STATISTICS = 6  # sets of statistics that a conversation keeps, each up to one point in its last turns
HOLES = 48 * MIB  # that activations leave in the heap, among blocks that stay, at least
DRAFT_LOGITS = 5  # copies in float32 that transformers and the drafts make of the logits and their probabilities
WORKSPACE = 32 * MIB  # of cuBLAS, for products that a CUDA graph records (its default on Hopper; elsewhere 8 MiB)
WORKSPACES = 64 * MIB  # of cuBLAS and cuBLASLt on the largest cards: torch allocates them, once
SIZES, KERNELS = 8, 3 * MIB  # a processor's kernels for layers of another size, beyond so many (measured: 2.5 MiB)
FOLD_KERNELS = 3 * MIB // 2  # for the fold of one prompt in layers of one size (measured: 1.3 MiB)
Moment = Literal["always", "prompt", "fidelity", "answer", "host"]
MOMENTS: tuple[Moment, ...] = ("prompt", "fidelity", "answer")


@dataclass(frozen=True)
class Row:
    """One line of the plan. `when`: at which of the moments it counts, or `host`: not on the device."""

    name: str
    bytes: int
    when: Moment = "always"
    note: str = ""


def plan_rows(sizes: ModelSizes, request: Request, kept: Kept) -> tuple[Row, ...]:
    """Every row of a run that keeps `kept` neurons; rows of 0 bytes that do not apply are left out."""
    together = request.sequences if request.sets == 1 else 1
    return (
        _runtime(request),
        Row("embeddings, final norm, lm_head", sizes.outer_in(request.precision), note=request.precision.head),
        *(_passing_weights if request.export else _resident_weights)(sizes, request, kept),
        *_prompt_pass(sizes, request, kept, together),
        *(() if request.export else _fidelity(sizes, request, kept, together)),
        *(() if request.export else _answer(sizes, request, kept, together)),
        *([Row("held beside the run", request.beside)] if request.beside else []),
        Row("margin", _largest_matrix(sizes) + _margin(request, kept), note="allocator, threads, kernels' scratch"),
    )


def _passing_weights(sizes: ModelSizes, request: Request, kept: Kept) -> Iterator[Row]:
    layers = zip(sizes.layers, kept, strict=True)
    yield Row("one compact layer", max(layer.feed_forward(k) for layer, k in layers))
    yield Row("staging, two layers", STAGING_LAYERS * _largest_layer(sizes), "prompt")


def _resident_weights(sizes: ModelSizes, request: Request, kept: Kept) -> Iterator[Row]:
    precision, layers = request.precision, zip(sizes.layers, kept, strict=True)
    streams: Moment = "always" if request.drafts else "prompt"
    neurons = sum(layer.feed_forward(k, precision) for layer, k in layers)
    staged = sizes.staged(kept, precision)
    yield Row("attention and norms", sum(layer.fixed_in(precision) for layer in sizes.layers), note=precision.others)
    yield Row("kept neurons", request.sets * neurons, note=_neurons_note(sizes, request, kept))
    if request.copies:
        yield Row("two dense layers", STAGING_LAYERS * _largest_layer(sizes), streams)
    elif staged:
        yield Row("staging, two layers", STAGING_LAYERS * staged, streams)


def _prompt_pass(sizes: ModelSizes, request: Request, kept: Kept, together: int) -> Iterator[Row]:
    if request.ring:
        piece = min(request.ring.piece, _largest_layer(sizes))
        note = f"{request.ring.threads} reading threads"
        yield Row("pinned buffers", request.ring.pieces * piece, "host", note)
    if request.converts:
        streams: Moment = "always" if request.drafts else "prompt"
        yield Row("conversion buffers", request.converts, "host" if request.copies else streams)
    if request.precision.quantized:
        yield Row("quantization scratch", Scratch.bytes(sizes.widest, sizes.item, request.device), "prompt")
    activations = sizes.activations(request.pass_tokens, together, request.earlier_tokens)
    yield Row("activations of the prompt", activations, "prompt")
    if fold := request.fold_bytes(sizes, kept):
        yield Row("fold", fold, "prompt", "activations and a solve of one layer")
    prompts = request.sets if request.sets > 1 else 0
    if waiting := request.waiting + prompts * 3 * request.prompt_tokens * sizes.hidden * sizes.item:
        yield Row("hidden states of waiting prompts", waiting, "prompt")
    if needs_steady_heap(sizes, request):
        yield Row("heap fragmentation", max(activations * 3 // 2, HOLES), "prompt", "measured")
    elif request.earlier_tokens and sizes.item < 4:
        yield Row("heap fragmentation", HOLES, "prompt", "measured")
    elif fold and sizes.item < 4:  # whose many sizes may keep the activations' memory from being used again
        yield Row("heap fragmentation", activations, "prompt", "measured")


def _fidelity(sizes: ModelSizes, request: Request, kept: Kept, together: int) -> Iterator[Row]:
    if not request.measures(sizes, kept):
        return
    prompt, sequences = request.prompt_tokens, request.sequences
    yield Row("KV cache of the prompt", _cache_of_the_prompt(sizes, request), "fidelity")
    count = tokens_again(sizes, kept, request.pass_tokens)
    needed = meter_bytes(sizes, count, prompt, together, sequences)
    yield Row("measuring the fidelity", needed, "fidelity", f"the last {count} tokens of the prompt again")


def _answer(sizes: ModelSizes, request: Request, kept: Kept, together: int) -> Iterator[Row]:
    prompt, sequences = request.prompt_tokens, request.sequences
    tokens = prompt + request.max_new_tokens
    note = f"{prompt} tokens" + (f", {sequences} prompts" if sequences > 1 else "")
    yield Row("KV cache of the prompt", _cache_of_the_prompt(sizes, request), "prompt", note)
    yield Row("KV cache with the answer", sequences * sizes.cache(tokens), "answer", f"{tokens} tokens")
    if sizes.states:
        yield Row("recurrent states", sequences * sizes.states)
    token = sizes.activations(1, together)
    if request.drafts:
        drafted = sizes.activations(request.drafts + 1, earlier=tokens)
        yield Row("activations of drafted tokens", drafted, "answer", f"at most {request.drafts}")
        logits = (request.drafts + 1) * sizes.vocabulary * (sizes.item + DRAFT_LOGITS * 4)
        yield Row("logits of drafted tokens", logits, "answer", "and their probabilities")
    if request.earlier is None or request.earlier.shared:
        yield Row("activations of a token", token, "answer")
        yield from _shared_prefix(sizes, request, kept)
    else:  # before the next turn a layer's cache moves to memory for more tokens
        moving = sizes.cache_of_a_layer(tokens)
        yield Row("activations of a token", max(token, moving), "answer", "or a layer's cache moves" * (moving > token))
        yield Row("logits of the prompt's last token", sizes.vocabulary * 4)
        when: Moment = "host" if request.copies else "always"
        if sizes.states:
            yield Row("recurrent states of the turns", KEPT_STATES * sizes.states, when)
        if kept != sizes.kept(0):
            yield Row("statistics of the turns", (KEPT_STATISTICS + 2) * sizes.statistics, when)
            if request.copies:
                yield Row("statistics of this turn", sizes.statistics)
    is_whole = kept == sizes.kept(0) and not request.precision.quantized
    if is_whole and sizes.switch is not None and prompt <= sizes.switch < tokens:
        again = sizes.activations(sizes.switch + 1) + sizes.cache(tokens)
        yield Row("the text again", again, "answer", f"longrope's factors change after {sizes.switch} tokens")
    if request.static:
        yield Row("recorded steps", token + WORKSPACE, "answer", "CUDA graphs, estimated")


def _cache_of_the_prompt(sizes: ModelSizes, request: Request) -> int:
    """Bytes of the KV cache before the answer. A GPU has all of it from the start, RAM takes what is written."""
    answer = 0 if request.device == "cpu" else request.max_new_tokens
    return request.sequences * sizes.cache(request.prompt_tokens + answer)


def _shared_prefix(sizes: ModelSizes, request: Request, kept: Kept) -> Iterator[Row]:
    """What stays of the tokens that all prompts of a batch begin with."""
    if request.earlier_tokens:
        yield Row("KV cache of the shared beginning", sizes.cache(request.earlier_tokens))
        if kept != sizes.kept(0):
            yield Row("its statistics", sizes.statistics, "host" if request.copies else "always")


def _neurons_note(sizes: ModelSizes, request: Request, kept: Kept) -> str:
    format, rest = request.precision.kept, request.precision.rest
    whole = sum(layer.count(layer.whole) for layer in sizes.layers)
    share = sum(layer.count(k) for layer, k in zip(sizes.layers, kept, strict=True)) / max(1, whole)
    parts = [f"{share:.0%} of the neurons" + (f" in {format}" if format else "")]
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
    """Whether the heap should keep what activations free (memory/heap.py): where they are large, or many.

    Not in float32, where the products' own buffers would leave holes without end (measured)."""
    large = sizes.activations(request.pass_tokens, earlier=request.earlier_tokens) >= 32 * MIB
    return sizes.item < 4 and (large or request.waiting > 0)


def peak_bytes(rows: Sequence[Row]) -> int:
    """The largest of the moments' sums."""
    return max(sum(row.bytes for row in rows if row.when in ("always", moment)) for moment in MOMENTS)


def _largest_layer(sizes: ModelSizes) -> int:
    return max(layer.fixed + layer.feed_forward(layer.whole) for layer in sizes.layers)


def _largest_matrix(sizes: ModelSizes) -> int:
    """A product may copy its matrix. One by float32 blocks (quant/products.py) takes less: a block, 4 MiB, and its
    sums, at most 8 MiB. The tokens in float32 are within `activations`, which
    counts more than them at other moments of the layer."""
    blocks = (block for layer in sizes.layers for block in layer.blocks)
    return max((block.per_neuron * block.neurons for block in blocks), default=0)


def _runtime(request: Request) -> Row:
    what = "CUDA context" if request.device == "cuda" else "Python"
    return Row(f"{what} and libraries", request.runtime, note=request.runtime_note)


def _margin(request: Request, kept: Kept) -> int:
    if request.device == "cuda":
        return 32 * MIB + WORKSPACES
    kernels = max(0, len(set(kept)) - SIZES) * KERNELS
    if request.fold:  # of each further prompt, as it has another length
        kernels += (request.sets - 1) * len(set(kept)) * FOLD_KERNELS
    return (48 * MIB if request.runtime else 32 * MIB) + kernels
