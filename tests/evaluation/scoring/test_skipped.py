"""Blocks left out of a continuation (griffin_offload.evaluation.scoring.skipped), against one token after the other."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from tiny import tiny_checkpoint, tiny_prompt
from torch import Tensor, nn
from transformers import DynamicCache

from griffin_offload import Engine
from griffin_offload.errors import OptionError
from griffin_offload.evaluation.scoring.score import score, score_rows
from griffin_offload.evaluation.scoring.skipped import ContinuationSkips, similarities
from griffin_offload.evaluation.scoring.variant import ScoredRow, Variant
from griffin_offload.options import FfnSkip
from griffin_offload.pruning.ffn_skip import Thresholds, most_saturated
from griffin_offload.pruning.prior import Prior
from griffin_offload.pruning.selection import Selection

ENTERED = {  # by the hidden state, before the block
    "llama": "post_attention_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "opt": "final_layer_norm",
}
LAYERS = 6


class Slow:
    """A plain model whose tokens go one by one, each asked at each block whether it leaves it out."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.model = oracle.load(folder)
        self.similarity: list[float] = []
        self.skipped: list[int] = []
        self._skip: FfnSkip | None = None
        self._table: list[int] = []
        for number, (layer, down) in enumerate(
            zip(oracle.decoder_layers(self.model), oracle.down_projections(self.model), strict=True)
        ):
            layer.get_submodule(ENTERED[kind]).register_forward_pre_hook(self._enter)
            down.register_forward_pre_hook(lambda _, args, i=number: (self._z(i, args[0]),))
            layer.register_forward_hook(lambda _, args, out, i=number: self._leave(i, out))

    def prompt(self, ids: Sequence[int]) -> tuple[Tensor, Tensor, DynamicCache]:
        """Similarities (T, L), the last logits, and the cache: token by token, nothing left out."""
        rows, cache, self._skip, self._table = [], DynamicCache(config=self.model.config), None, []
        for token in ids:
            logits = self.token(token, cache)
            rows.append(self.similarity)
        return torch.tensor(rows), logits, cache

    @torch.no_grad()
    def token(self, token: int, cache: DynamicCache) -> Tensor:
        self._left, self.skipped, self.similarity = 0, [], []
        logits: Tensor = self.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
        return logits[0, -1].log_softmax(-1)

    def follow(self, ids: Sequence[int], cache: DynamicCache, skip: FfnSkip, similarity: Tensor) -> list[Tensor]:
        found = []
        threshold = Thresholds(similarity, skip).of(skip.share)
        for place, token in enumerate(ids):
            warm = skip.mode == "token" and place < skip.warmup
            self._skip, self._threshold = (None if warm else skip), threshold
            self._table = most_saturated(similarity.mean(0), skip) if skip.mode == "prompt" else []
            found.append(self.token(token, cache))
        return found

    def _enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._entering = args[0].reshape(-1)

    def _z(self, block: int, z: Tensor) -> Tensor:
        cold = not self._skip or block < max(1, self._skip.cold[0]) or block >= LAYERS - self._skip.cold[1]
        if block not in self._table and (cold or not self._left):
            return z
        self.skipped.append(block)
        return torch.zeros_like(z)

    def _leave(self, block: int, output: Tensor | tuple[Tensor]) -> None:
        leaving = (output[0] if isinstance(output, tuple) else output).reshape(-1)
        self.similarity.append(float(torch.cosine_similarity(self._entering.float(), leaving.float(), dim=0)))
        if self._skip and self._skip.mode == "token":
            if block in self.skipped:
                self._left -= 1
            else:
                self._left = self._skip.length(LAYERS) if self.similarity[-1] >= self._threshold else 0


@pytest.fixture(scope="module", params=ENTERED)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    sizes: dict[str, Any] = {"num_hidden_layers": LAYERS}
    if kind == "gemma3_text":
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    return tiny_checkpoint(tmp_path_factory.mktemp("skipped") / kind, kind, **sizes)


def test_similarities_are_those_of_each_token_alone(folder: Path, kind: str) -> None:
    contexts = [tuple(tiny_prompt(12)), tuple(tiny_prompt(7, seed=2))]
    slow = Slow(folder, kind)
    for context, found in zip(contexts, similarities(Engine(folder, dtype="float32"), contexts, 0), strict=True):
        torch.testing.assert_close(found, slow.prompt(context)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "skip",
    [
        FfnSkip(0.5, cold=(1, 1), warmup=0),
        FfnSkip(0.4, cold=(1, 1), warmup=3, run=1),
        FfnSkip(0.5, "prompt", cold=(1, 1)),
    ],
    ids=["to the cold end", "warm-up, one block a time", "prompt"],
)
def test_scores_are_those_of_tokens_one_by_one(folder: Path, kind: str, skip: FfnSkip) -> None:
    context, continuation = tiny_prompt(24), tiny_prompt(12, seed=5)
    engine = Engine(folder, dtype="float32")
    ((full, found),) = score_rows(engine, [(context, continuation)], [ScoredRow(), ScoredRow(skip=skip)])
    slow = Slow(folder, kind)
    similarity, first, cache = slow.prompt(context)
    wanted = [first, *slow.follow(continuation[:-1], cache, skip, similarity)]
    expected = torch.stack([row[token] for row, token in zip(wanted, continuation, strict=True)])
    torch.testing.assert_close(found.log_probability, expected, rtol=0, atol=1e-3)
    assert not torch.allclose(found.log_probability, full.log_probability, atol=1e-3), "blocks were left out"


def test_a_share_of_0_is_the_full_model_and_cold_ends_leave_nothing_to_skip(folder: Path) -> None:
    pair = tiny_prompt(20), tiny_prompt(9, seed=3)
    skips = [FfnSkip(0.0), FfnSkip(0.0, "prompt"), FfnSkip(1.0, cold=(3, 3)), FfnSkip(1.0, cold=(1, 1), warmup=8)]
    ((full, *others),) = score_rows(
        Engine(folder, dtype="float32"), [pair], [ScoredRow(), *(ScoredRow(skip=s) for s in skips)]
    )
    for found in others:
        torch.testing.assert_close(found.log_probability, full.log_probability, rtol=0, atol=1e-5)


def test_all_between_the_cold_ends_is_the_model_without_these_blocks(folder: Path) -> None:
    pair = tiny_prompt(20), tiny_prompt(9, seed=3)
    engine = Engine(folder, dtype="float32")
    whole = engine.sizes.kept(0)
    kept = tuple((0,) if 0 < layer < LAYERS - 1 else k for layer, k in enumerate(whole))
    skips = [FfnSkip(1.0, cold=(1, 1), warmup=0), FfnSkip(1.0, "prompt", cold=(1, 1))]
    rows = [ScoredRow(), ScoredRow(kept=kept), *(ScoredRow(skip=s) for s in skips)]
    ((_, without, *others),) = score_rows(engine, [pair], rows)
    for found in others:
        torch.testing.assert_close(found.log_probability, without.log_probability, rtol=0, atol=1e-5)


def test_blocks_skipped_at_random() -> None:
    similarity = torch.rand(30, 8)
    skip = FfnSkip(0.25, cold=(1, 2), warmup=3)
    drawn = ContinuationSkips([(skip, "random"), (None, "")], 9, similarity, seed=1)
    table = torch.stack([drawn.at(block) for block in range(8)], dim=2)
    assert table[0].sum(1).tolist() == [0] * 3 + [2] * 6
    assert not table[0, :, [0, 6, 7]].any()
    assert not table[1].any()
    again = ContinuationSkips([(skip, "random")], 9, similarity, seed=2)
    assert not torch.equal(table[0], torch.stack([again.at(block)[0] for block in range(8)], dim=1))
    with pytest.raises(OptionError, match="ablation 'sideways'"):
        ContinuationSkips([(skip, "sideways")], 9, similarity)


def test_a_whole_layer_left_out_is_a_model_without_it(folder: Path) -> None:
    pair = tiny_prompt(20), tiny_prompt(9, seed=3)
    engine = Engine(folder, dtype="float32")
    skip = FfnSkip(1.0, "prompt", cold=(2, 2))
    ((_, found),) = score_rows(engine, [pair], [ScoredRow(), ScoredRow(skip=skip, ablation="layers")])
    model = oracle.load(folder)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(torch.tensor([pair[0]]), past_key_values=cache, use_cache=True).logits[0, -1:]
        for layer in oracle.decoder_layers(model)[2:4]:
            layer.register_forward_hook(lambda _, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0])
        rest = model(torch.tensor([pair[1][:-1]]), past_key_values=cache, use_cache=True).logits[0]
    expected = torch.cat([first, rest]).log_softmax(-1).gather(1, torch.tensor(pair[1])[:, None])[:, 0]
    torch.testing.assert_close(found.log_probability, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_static_row_reads_its_context_pruned_too(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path / name, name)
    engine, model = Engine(folder, dtype="float32"), oracle.load(folder)
    context, continuation = tiny_prompt(20), tiny_prompt(9, seed=3)
    other = oracle.statistic(model, tiny_prompt(30, seed=9))
    prior = Prior(tuple((score**2,) for score in other))
    static = ScoredRow(Selection(prior=prior, prior_weight=1.0), engine.sizes.kept(0.5), static=True)
    rows = [ScoredRow(), static, ScoredRow(kept=engine.sizes.kept(0.5)), replace(static, static=False)]
    pairs = [(context, continuation), (context, continuation[:1]), (context[:7], continuation)]
    for (before, after), found in zip(pairs, score_rows(engine, pairs, rows), strict=True):
        experts = oracle.experts(model, tiny_prompt(30, seed=9), 0.5)
        with oracle._masked(model, experts):
            logits, _ = oracle._forward(model, [*before, *after[:-1]], None, keep=len(after))
        expected = logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None])[:, 0]
        torch.testing.assert_close(found[1].log_probability, expected, rtol=0, atol=1e-4)
        full, _ = oracle._forward(model, [*before, *after[:-1]], None, keep=len(after))
        truth = full.log_softmax(-1)
        kl = (truth.exp() * (truth - logits.log_softmax(-1))).sum(-1)
        torch.testing.assert_close(found[1].kl, kl, rtol=1e-4, atol=1e-5)
        (alone,) = score_rows(engine, [(before, after)], [ScoredRow(), rows[2], rows[3]])
        for one, other_row in zip(alone, (found[0], found[2], found[3]), strict=True):
            torch.testing.assert_close(one.log_probability, other_row.log_probability, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", [Variant(0.0, skip=FfnSkip(0.5)), Variant(0.5, selection="random", static=True)])
def test_a_model_with_other_memory_is_refused(tmp_path: Path, variant: Variant) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "lfm2", "lfm2"), dtype="float32")
    with pytest.raises(OptionError, match="more than keys and values"):
        score(engine, [(tiny_prompt(9), tiny_prompt(4))], [variant])
