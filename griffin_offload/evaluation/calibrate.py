"""How much each layer's neurons matter in a checkpoint: the curves by which layer_allocation.py shares neurons.

A window of text is a prompt, which chooses the neurons as always, and a continuation. All layers keep half of their
neurons, except for one layer, which keeps a quarter or all: a layer matters differently to a pruned model than to the
full one. The measure is the KL divergence of the output from the full model's, taken for all layers and shares in one
reading of the weights where memory allows. More shares and longer continuations gain nothing (docs/results.md)."""

import hashlib
import math
from pathlib import Path

from ..checkpoint.key import checkpoint_key
from ..engine import Engine
from ..errors import NumericError, OptionError, PromptError
from ..options import OnLayer
from ..paths import cache_folder
from ..pruning.layer_allocation import Curves, calibration_path, load_curves, save_curves
from ..pruning.shipped_text import shipped_samples, shipped_text_hash
from .figures.observe import cut_prompts
from .scoring.prompt_cache import can_fork
from .scoring.reads import fits
from .scoring.score import check_pairs, score_rows
from .scoring.scored import Pair, progress_of
from .scoring.variant import ScoredRow

SHARES = (0.25, 0.5, 1.0)
OTHERS = 0.5  # the share that every other layer keeps; one of SHARES
PROMPT_TOKENS, CONTINUE_TOKENS, WINDOWS = 232, 24, 12


def measure(
    engine: Engine,
    text: str | None = None,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    continue_tokens: int = CONTINUE_TOKENS,
    windows: int = WINDOWS,
    on_progress: OnLayer | None = None,
) -> Curves:
    """The curves of the engine's checkpoint, on windows spread evenly over a text; None: on the ends of the exchanges
    and passages that ship with Griffin, which may be shorter.

    on_progress(done, total) counts the layers of all readings. The engine is empty afterwards.
    Raises PromptError for too short a text, OptionError, BudgetError, NumericError, and what a sweep raises."""
    layers = engine.skeleton.layers
    if any(len(layer.blocks) != 1 for layer in layers):
        raise OptionError(f"{engine.name} has layers with none or several feed-forward blocks: they cannot be measured")
    if not can_fork(engine.skeleton.config):
        raise OptionError(f"{engine.name} remembers more than keys and values: its layers cannot be measured")
    if min(prompt_tokens, continue_tokens - 1, windows) < 1:
        raise OptionError("the prompt and the number of windows are at least 1, the continuation 2 tokens")
    if text is None:
        pieces = _shipped(engine, windows, prompt_tokens + continue_tokens)
    else:
        pieces = cut_prompts(engine, text, windows, prompt_tokens + continue_tokens, "windows")
    pairs = [(ids[:-continue_tokens], ids[-continue_tokens:]) for ids in pieces]
    check_pairs(engine, pairs)
    common = tuple((round(OTHERS * layer.blocks[0].neurons),) for layer in layers)
    rows = [ScoredRow(kept=common)]
    for index, layer in enumerate(layers):
        for share in SHARES:
            if share != OTHERS:
                kept = (round(share * layer.blocks[0].neurons),)
                rows.append(ScoredRow(kept=(*common[:index], kept, *common[index + 1 :])))
    half, *rest = _divergences(engine, pairs, rows, on_progress)
    if not all(map(math.isfinite, (half, *rest))):
        raise NumericError(f"the output of {engine.name} is NaN or infinite in {engine.dtype}; try --dtype float32")
    values = iter(rest)
    return Curves(
        key=checkpoint_key(engine.checkpoint),
        shares=SHARES,
        others=OTHERS,
        kl=tuple(tuple(half if share == OTHERS else next(values) for share in SHARES) for _ in layers),
        text_sha256=_hash(text),
        prompt_tokens=prompt_tokens,
        continue_tokens=continue_tokens,
        windows=windows,
        dtype=engine.dtype,
    )


def _divergences(engine: Engine, pairs: list[Pair], rows: list[ScoredRow], on_progress: OnLayer | None) -> list[float]:
    """Each row's KL from the full model, nats: mean over the tokens of all windows, except the first of each, which the
    full model predicts. The rows are measured in as few readings as the budget allows."""
    together = len(rows)
    while together > 1 and not fits(engine, pairs, [ScoredRow(), *rows[:together]]):
        together = -(-together // 2)
    parts = [rows[first : first + together] for first in range(0, len(rows), together)]
    found: list[float] = []
    for number, part in enumerate(parts):
        progress = progress_of(on_progress, number, len(parts))
        scored = score_rows(engine, pairs, [ScoredRow(), *part], on_layer=progress)
        for row in range(1, len(part) + 1):
            found.append(sum(of_pair[row].kl[1:].mean().item() for of_pair in scored) / len(pairs))
    return found


def calibrate(
    engine: Engine,
    text: str | None = None,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    continue_tokens: int = CONTINUE_TOKENS,
    windows: int = WINDOWS,
    force: bool = False,
    on_progress: OnLayer | None = None,
) -> tuple[Path, Curves]:
    """The file where runs find the curves, and the curves on a text (default: the package's own): measured now, or
    earlier. Raises OptionError where the file holds others than asked for, unless `force`; and as `measure`."""
    path = calibration_path(cache_folder(), checkpoint_key(engine.checkpoint))
    before = None if force else load_curves(path)
    if before is not None:
        asked = (_hash(text), prompt_tokens, continue_tokens, windows, engine.dtype)
        there = (before.text_sha256, before.prompt_tokens, before.continue_tokens, before.windows, before.dtype)
        if asked != there:
            raise OptionError(
                f"{engine.name} has a calibration measured otherwise ({path}: {before.windows} windows of "
                f"{before.prompt_tokens} + {before.continue_tokens} tokens in {before.dtype}, text "
                f"{before.text_sha256[:8]}); --force replaces it"
            )
        return path, before
    curves = measure(
        engine,
        text,
        prompt_tokens=prompt_tokens,
        continue_tokens=continue_tokens,
        windows=windows,
        on_progress=on_progress,
    )
    save_curves(path, curves)
    return path, curves


def _shipped(engine: Engine, windows: int, tokens: int) -> list[list[int]]:
    """The ends, of at most `tokens` tokens, of so many exchanges and passages of the text that ships.

    Raises PromptError for more than there are."""
    samples = shipped_samples(engine.tokenizer, engine.has_chat_template)
    if windows > len(samples):
        raise PromptError(
            f"Griffin's own text has {len(samples)} windows, not {windows}: give fewer, or a text of yours"
        )
    return [samples[number * len(samples) // windows][-tokens:] for number in range(windows)]


def _hash(text: str | None) -> str:
    """SHA-256 of a text, as hex; None: of the one that ships."""
    return shipped_text_hash() if text is None else hashlib.sha256(text.encode()).hexdigest()
