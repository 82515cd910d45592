"""What the figures show, collected from prompt passes of the full model (arXiv:2404.01365, sections 3 and 4).

Z (T, F) is the input of a layer's down projection; Z̄ has its rows at unit length; s² are the column sums of Z̄²."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...engine import Engine
from ...errors import OptionError, PromptError, UnsupportedArchitecture
from ...files import reason
from ...inputs import TEXT, read_input
from ...model.long_texts import PIECE, USUAL
from ...options import ORDERS, OnLayer, check
from ...pruning.calibration_texts import LONG
from ...pruning.selection import select_neurons
from ...pruning.statistic import neuron_statistic


class Point(NamedTuple):
    """One measured model: `series` names the line that it is on, `standard_error` is of the log-perplexity (nats)."""

    series: str
    model: str
    sparsity: float
    resident_bytes: int
    perplexity: float
    standard_error: float


# Prompts


def cut_prompts(engine: Engine, text: str, count: int, tokens: int, what: str = "prompts") -> list[list[int]]:
    """`count` prompts of `tokens` tokens, spread evenly over a text so that they differ. Errors call them `what`.

    Each begins with the tokenizer's BOS where a text does (Llama's and Gemma's <s>). Raises PromptError for too short a
    text."""
    if len(text) > LONG:
        return _cut_long(engine, text, count, tokens, what)
    ids = engine.encode(text, raw=True, cut=True)
    first, ids = _split_bos(engine, ids)
    size = tokens - len(first)
    if len(ids) < size * count:
        raise PromptError(f"the text has {len(ids)} tokens; {count} {what} of {size} need {size * count}")
    step = len(ids) // count
    return [first + ids[i * step : i * step + size] for i in range(count)]


def _cut_long(engine: Engine, text: str, count: int, tokens: int, what: str) -> list[list[int]]:
    """As `cut_prompts`, without the tokens between the prompts."""
    step, found = len(text) // count, []
    for number in range(count):
        part = text[number * step : number * step + min(step, max(PIECE, USUAL * tokens))]
        ids = engine.encode(part, raw=True, cut=True)[:tokens]
        if len(ids) < tokens:
            raise PromptError(f"the text is too short for {count} {what} of {tokens} tokens")
        found.append(ids)
    return found


def reorder(engine: Engine, prompt_ids: Sequence[int], order: str, seed: int) -> list[int]:
    """A prompt of the same length: its own tokens `permuted`, or `random` ones. The tokenizer's <s> stays first."""
    check(order, ORDERS, "order")
    first, ids = _split_bos(engine, list(prompt_ids))
    generator = torch.Generator().manual_seed(seed)
    if order == "permuted":
        ids = [ids[i] for i in torch.randperm(len(ids), generator=generator).tolist()]
    elif order == "random":
        words = text_tokens(engine)
        ids = [words[i] for i in torch.randint(len(words), (len(ids),), generator=generator).tolist()]
    return first + ids


def text_tokens(engine: Engine) -> list[int]:
    """All token ids that stand for text: not <s>, <|end|> and the like."""
    added = set(engine.tokenizer.get_added_vocab().values())
    return [i for i in range(min(len(engine.tokenizer), engine.skeleton.config.vocab_size)) if i not in added]


def _split_bos(engine: Engine, ids: list[int]) -> tuple[list[int], list[int]]:
    has = bool(ids) and ids[0] == engine.tokenizer.bos_token_id
    return ids[: int(has)], ids[int(has) :]


# Prompt passes


def check_layers(engine: Engine, layers: Sequence[int] | None) -> list[int]:
    """Layer numbers in ascending order; None: the first, the middle and the last. Raises OptionError."""
    last = len(engine.skeleton.layers) - 1
    if layers is None:
        return sorted({0, last // 2, last})
    for layer in layers:
        if not 0 <= layer <= last:
            raise OptionError(f"{engine.name} has no layer {layer}: its layers are 0 to {last}")
    return sorted(set(layers))


def activations(
    engine: Engine,
    prompt_ids: Sequence[int],
    layers: Sequence[int],
    tokens: int = 512,
    features: int = 512,
    on_layer: OnLayer | None = None,
) -> dict[int, Tensor]:
    """|Z̄| of a prompt's first tokens by layer: (T, features), float32, on the CPU.

    A row is relative to its token's norm over all F neurons; the columns kept are the first ones."""
    seen = _sweep(
        engine,
        prompt_ids[:tokens],  # no token sees a later one: cutting the prompt changes no row
        check_layers(engine, layers),
        lambda z: relative(z, features),
        on_layer,
    )
    return {layer: torch.cat(pieces) for layer, pieces in seen.items()}


def statistics(engine: Engine, prompts: Sequence[Sequence[int]], on_layer: OnLayer | None = None) -> list[Tensor]:
    """s² of every prompt, one (P, F) a layer, float32, on the CPU. Layers may differ in F."""
    layers = range(len(engine.skeleton.layers))
    seen = [_sweep(engine, ids, layers, neuron_statistic, on_layer) for ids in prompts]
    return [torch.stack([torch.stack(of_prompt[layer]).sum(dim=0) for of_prompt in seen]) for layer in layers]


def relative(z: Tensor, features: int) -> Tensor:
    """|Z̄|: z (T, F) -> its first columns (T, features), float32. An all-zero token (ReLU) stays 0."""
    norms: Tensor = z.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return z[:, :features].float().abs() / norms


def _sweep(
    engine: Engine,
    prompt_ids: Sequence[int],
    layers: Sequence[int],
    take: Callable[[Tensor], Tensor],
    on_layer: OnLayer | None,
) -> dict[int, list[Tensor]]:
    """One prompt pass; by layer, what `take` makes of z (T, F), on the CPU: one a piece of the prompt."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen[layer].append(take(args[0].flatten(0, -2)).cpu())

    downs = _down_projections(engine)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(downs[layer].register_forward_pre_hook(keep(layer)).remove)
        engine.sweep(list(prompt_ids), on_layer=on_layer)
    return seen


def _down_projections(engine: Engine) -> list[nn.Module]:
    """Each layer's down projection, whose input is Z: also in a sweep that prunes, where it is whole for the prompt.

    Raises UnsupportedArchitecture for a mixture of experts."""
    downs = []
    for index, layer in enumerate(engine.skeleton.layers):
        if len(layer.blocks) != 1 or layer.blocks[0].routed:
            raise UnsupportedArchitecture(
                f"{engine.name}: layer {index} is a mixture of experts; figures need one feed-forward block a layer"
            )
        downs.append(engine.skeleton.modules[index].get_submodule(layer.blocks[0].path))
    return downs


# Numbers


def overlaps(statistic: Tensor, kept: int) -> Tensor:
    """Jaccard overlap (common over all) of the k kept neurons of each pair of prompts: s² (P, F) -> (P(P-1)/2,)."""
    chosen = torch.zeros_like(statistic)
    for row, of_prompt in zip(chosen, statistic, strict=True):
        row[select_neurons(of_prompt, kept)] = 1
    first, second = torch.triu_indices(len(chosen), len(chosen), offset=1)
    common = (chosen @ chosen.T)[first, second]
    return common / (2 * kept - common)


def chance_overlap(neurons: int, kept: int) -> float:
    """Overlap of two random sets of k of F neurons: they share k²/F on average, which gives k / (2F - k)."""
    return kept / (2 * neurons - kept)


def held(statistic: Tensor, density: float) -> float:
    """The share of s² that the strongest `density` of the columns hold: (F,) -> 0 to 1."""
    strongest = statistic.sort(descending=True).values[: kept_at(len(statistic), density)]
    return float(strongest.sum() / statistic.sum())


def kept_at(neurons: int, density: float) -> int:
    """k at a density: the nearest number of neurons, at least 1. Raises OptionError."""
    if not 0 < density <= 1:
        raise OptionError(f"density {density} is outside (0, 1]: 0.5 keeps half of the neurons")
    return max(1, round(neurons * density))


# Results


def read_points(paths: Sequence[Path]) -> list[Point]:
    """The points in what `griffin eval perplexity --json` printed, by series and size.

    A series is named by what differs between the results: model, selection, allocation, seed, resident dtype, rest,
    lengths. A whole model belongs to every series that shares its model, dtype and lengths. Raises OptionError."""
    rows = [row for path in paths for row in _read_results(path)]
    pruned = sorted({row.key for row in rows if row.point.sparsity})
    members = []
    for row in rows:
        mates = [key for key in pruned if _same_model(key) == _same_model(row.key)]
        members += [(key, row.point) for key in (mates if mates and not row.point.sparsity else [row.key])]
    differs = [len(set(parts)) > 1 for parts in zip(*(key for key, _ in members), strict=True)]
    points = {point._replace(series=_series(key, differs)) for key, point in members}
    return sorted(points, key=lambda point: (point.series, point.resident_bytes))


def _same_model(key: tuple[str, ...]) -> tuple[str, ...]:
    return (key[0], key[4], *key[6:])


def _series(key: tuple[str, ...], differs: Sequence[bool]) -> str:
    return ", ".join(part for part, tells in zip(key, differs, strict=True) if tells) or key[0]


class _Measured(NamedTuple):
    key: tuple[str, ...]  # model, selection, allocation, seed, resident dtype, rest, lengths
    point: Point


def _read_results(path: Path) -> list[_Measured]:
    try:
        facts = json.loads(read_input(path, TEXT, pipe=True))
        rows = [
            _measured(facts | result) for result in facts["results"]
        ]  # lengths stand with a result where they differ
    except OSError as error:
        raise OptionError(f"cannot read the results {path}: {reason(error)}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise OptionError(
            f"{path} is not what `griffin eval perplexity --json` prints ({type(error).__name__}: {error})"
        ) from error
    if not rows:
        raise OptionError(f"{path} holds no results")
    return rows


def _measured(result: dict[str, Any]) -> _Measured:
    model = Path(result["model"]).name
    lengths = f"prompt {result.get('prompt_tokens', '?')}", f"continuation {result.get('continue_tokens', '?')}"
    formats = result.get("resident_dtype", "bfloat16"), f"rest {result.get('rest', 'drop')}"
    key = (
        model,
        str(result["selection"]),
        str(result["allocation"]),
        f"seed {result.get('seed', 0)}",
        *formats,
        *lengths,
    )
    shares = result["sparsity"] if isinstance(result["sparsity"], list) else [result["sparsity"]]
    numbers = float(result["perplexity"]), float(result["standard_error"])
    return _Measured(key, Point("", model, sum(shares) / len(shares), int(result["resident_bytes"]), *numbers))
