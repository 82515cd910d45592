"""The log-likelihood of continuations against the oracle, on tiny models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from tiny import CONTEXT, text_paragraph, tiny_checkpoint, tiny_prompt
from torch import Tensor

from griffin_offload import Engine
from griffin_offload.checkpoint.key import checkpoint_key
from griffin_offload.errors import BudgetError, OptionError, PromptError
from griffin_offload.evaluation.perplexity import encode_text, windows
from griffin_offload.evaluation.scoring.prompt_cache import can_fork
from griffin_offload.evaluation.scoring.reads import plan_reads
from griffin_offload.evaluation.scoring.score import score, score_slowly
from griffin_offload.evaluation.scoring.scored import Pair, Scored, mean_and_error
from griffin_offload.evaluation.scoring.variant import FULL, ScoredRow, Variant, all_variants
from griffin_offload.memory.measure import bytes_read
from griffin_offload.options import FfnSkip
from griffin_offload.paths import cache_folder
from griffin_offload.planning import scoring as planned_bytes
from griffin_offload.planning.plan import make_plan
from griffin_offload.pruning.layer_allocation import Curves, calibration_path, save_curves
from griffin_offload.pruning.selection import SELECTIONS


def pairs() -> list[Pair]:
    """Two of different lengths."""
    first, second = tiny_prompt(60, seed=3), tiny_prompt(45, seed=4)
    return [(first[:48], first[48:]), (second[:20], second[20:])]


def expected(model: torch.nn.Module, pair: Pair, experts: oracle.Experts) -> Scored:
    """What the oracle's logits come to."""
    context, continuation = pair
    truth = oracle.continuation_logits(model, context, continuation, None).log_softmax(-1)
    ours = oracle.continuation_logits(model, context, continuation, experts).log_softmax(-1)
    true = torch.tensor(continuation)
    return Scored(
        log_probability=torch.stack([row[token] for row, token in zip(ours, continuation, strict=True)]),
        greedy=ours.argmax(1) == true,
        agrees=ours.argmax(1) == truth.argmax(1),
        kl=torch.nn.functional.kl_div(ours, truth, log_target=True, reduction="none").sum(1),
        acceptance=torch.minimum(ours, truth).exp().sum(1),
    )


def assert_equal(found: Scored, wanted: Scored, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.log_probability, wanted.log_probability, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.kl, wanted.kl, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(found.acceptance, wanted.acceptance, rtol=1e-5, atol=tolerance)
    assert found.greedy.tolist() == wanted.greedy.tolist()
    assert found.agrees.tolist() == wanted.agrees.tolist()


def of_magnitude(model: torch.nn.Module, kept: int) -> list[Tensor]:
    """Llama's neurons with the largest product of the norms of their gate and up rows."""
    products = [
        layer.mlp.gate_proj.weight.norm(dim=1) * layer.mlp.up_proj.weight.norm(dim=1)
        for layer in oracle.decoder_layers(model)
    ]
    return [product.topk(kept).indices.sort().values for product in products]


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3_text"])
def test_every_number_is_the_oracles(tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint(tmp_path / kind, kind)
    sparsities = (0.5, 0.0, 0.9)  # the full model is not the first
    found = score(
        Engine(folder, dtype="float32"), pairs(), [Variant(sparsity, method="griffin") for sparsity in sparsities]
    )
    model = oracle.load(folder)
    for pair, of_pair in zip(pairs(), found, strict=True):
        for sparsity, scored in zip(sparsities, of_pair, strict=True):
            assert_equal(scored, expected(model, pair, oracle.experts(model, pair[0], sparsity)))
    assert found[0][0].kl[1:].min() > 0, "after the first token the experts are at work"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_folded_row_is_the_folded_model(tmp_path: Path, kind: str) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / kind, kind), dtype="float32")
    half, quarter = Variant(0.5, rest="drop", fold_strength=0.1), Variant(0.25, rest="drop")
    variants = [FULL, half, Variant(0.5, method="griffin"), quarter]
    together, slowly = score(engine, pairs(), variants), score_slowly(engine, pairs(), variants)
    for ours, theirs in zip(together, slowly, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other, 1e-3)
        assert (ours[1].kl - ours[2].kl).abs().max() > 0.01


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("score") / "llama", "llama")


def test_a_sparsity_by_layer_and_another_selection(llama: Path) -> None:
    model, (pair, _) = oracle.load(llama), pairs()
    shares = (0.0, 0.75, 0.5)
    variants = [
        Variant(shares, rest="drop", fold=False, prior="off"),
        Variant(0.5, rest="drop", fold=False, prior="off", selection="magnitude"),
    ]
    ((by_layer, by_magnitude),) = score(Engine(llama, dtype="float32"), [pair], variants)
    chosen = [oracle.experts(model, pair[0], share)[layer] for layer, share in enumerate(shares)]
    assert_equal(by_layer, expected(model, pair, chosen))
    assert_equal(by_magnitude, expected(model, pair, of_magnitude(model, 48)))


def test_a_drawn_selection_follows_its_seed(llama: Path) -> None:
    engine, (pair, _) = Engine(llama, dtype="float32"), pairs()
    variants = [Variant(0.5, rest="drop", fold=False, prior="off", selection="random", seed=seed) for seed in (1, 2, 1)]
    ((first, other, again),) = score(engine, [pair], variants)
    assert torch.equal(first.log_probability, again.log_probability)
    assert not torch.equal(first.log_probability, other.log_probability)


def test_sparsity_zero_is_the_full_model(llama: Path) -> None:
    ((scored,), _) = score(Engine(llama, dtype="float32"), pairs(), [FULL])
    context, continuation = pairs()[0]
    with torch.no_grad():
        logits = oracle.load(llama)(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    wanted = [logits[len(context) - 1 + i, token].item() for i, token in enumerate(continuation)]
    assert scored.log_probability.tolist() == pytest.approx(wanted, abs=1e-4)
    assert scored.log_probability.dtype == torch.float32
    assert not scored.kl.any()
    assert scored.agrees.all()


def test_greedy_says_that_the_true_token_is_the_likeliest(llama: Path) -> None:
    context = tiny_prompt(30)
    tokens, _ = oracle.full_generate(oracle.load(llama), context, 8)
    wrong = [*tokens[:5], (tokens[5] + 1) % 300, *tokens[6:]]
    engine = Engine(llama, dtype="float32")
    (whole,), (broken,) = score(engine, [(context, tokens), (context, wrong)], [FULL])
    assert whole.greedy.tolist() == [True] * 8
    assert broken.greedy[:6].tolist() == [True] * 5 + [False]


def test_the_first_token_is_predicted_by_the_full_model(llama: Path) -> None:
    engine = Engine(llama, dtype="float32")
    context, continuation = pairs()[0]
    ((full, pruned),) = score(engine, [(context, continuation)], [FULL, Variant(0.9, method="griffin")])
    assert pruned.log_probability[0] == full.log_probability[0]
    assert pruned.log_probability[1] != full.log_probability[1]
    ((full, pruned),) = score(engine, [(context, continuation[:1])], [FULL, Variant(0.9, method="griffin")])
    assert pruned.log_probability.tolist() == full.log_probability.tolist()
    assert full.log_probability.shape == (1,)


def test_the_order_of_pairs_and_variants_does_not_matter(llama: Path) -> None:
    engine = Engine(llama, dtype="float32")
    variants = [Variant(0.5, method="griffin"), FULL, Variant(0.9, method="griffin")]
    found = score(engine, pairs(), variants)
    turned = score(engine, pairs()[::-1], variants[::-1])
    for of_pair, other in zip(found, turned[::-1], strict=True):
        for one, two in zip(of_pair, other[::-1], strict=True):
            torch.testing.assert_close(one.log_probability, two.log_probability, rtol=0, atol=1e-5)


def test_progress_counts_pairs(llama: Path) -> None:
    told: list[tuple[int, int]] = []
    score(Engine(llama), pairs(), [Variant()], on_pair=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 2)
    assert told[-1] == (2, 2)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (([], [5, 6]), "text 2 has no context"),
        (([5, 6], []), "text 2 has nothing after its context"),
        ((tiny_prompt(250), tiny_prompt(7)), f"text 2 has 257 tokens .* at most {CONTEXT}"),
    ],
)
def test_a_pair_that_cannot_be_scored_is_refused_before_anything_is_read(llama: Path, pair: Pair, words: str) -> None:
    engine = Engine(llama)
    before = bytes_read() or 0
    with pytest.raises(PromptError, match=words):
        score(engine, [pairs()[0], pair], [FULL])
    assert (bytes_read() or 0) - before < engine.checkpoint.bytes / 2


def test_no_pairs_and_no_variants(llama: Path) -> None:
    engine = Engine(llama)
    assert score(engine, [], [FULL]) == []
    assert score(engine, pairs(), []) == [[], []]


@pytest.mark.parametrize(
    "options", [{"sparsity": 1.5}, {"sparsity": (0.5, -0.1)}, {"sparsity": float("nan")}, {"selection": "best"}]
)
def test_a_variant_that_is_none(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        Variant(**options)


@pytest.mark.parametrize(
    ("variant", "label"),
    [
        (Variant(0.0, selection="random", allocation="sensitivity", seed=3), "full"),
        (Variant((0.0, 0.0), method="griffin"), "full"),
        (Variant(0.5, method="griffin"), "50%"),
        (Variant(0.5), "50%, rest int4"),
        (Variant(0.0, resident_dtype="int8"), "0% int8"),
        (Variant(0.125, method="griffin"), "12.5%"),
        (Variant((0.25, 0.75), method="griffin"), "50% by layer"),
        (
            Variant(0.25, rest="drop", fold=False, prior="off", selection="random", allocation="sensitivity", seed=1),
            "25% random seed 1 sensitivity",
        ),
    ],
)
def test_labels(variant: Variant, label: str) -> None:
    assert variant.label() == label


def test_all_variants_has_the_full_model_once() -> None:
    found = all_variants([0.0, 0.5], ["topk", "random"], ["uniform", "sensitivity"], seed=7, rests=["drop"], folds=[0])
    pruned = [
        Variant(0.5, rest="drop", fold=False, prior="off", selection=selection, allocation=allocation, seed=7)
        for selection in ("topk", "random")
        for allocation in ("uniform", "sensitivity")
    ]
    assert [replace(variant, prior="off") for variant in found] == [replace(FULL, prior="off"), *pruned]
    assert [variant.prior for variant in found] == ["off", "auto", "auto", "off", "off"]


def test_a_variant_keeps_what_an_answer_keeps_where_memory_allows() -> None:
    """Not what it would keep on this machine: a measurement has one name everywhere."""
    assert (Variant().sparsity, Variant().rest) == (0.5, "int4")
    assert Variant((0.0, 0.5)).rest == "int4"
    assert {each.rest for each in (Variant(0.0), Variant(0.5, static=True), Variant(0.5, ablation="random"))} == {
        "drop"
    }
    assert Variant(0.5, skip=FfnSkip(0.5, "prompt")).rest == "drop"
    assert Variant(0.5, skip=FfnSkip(0.5, "token")).rest == "int4"
    assert all_variants([0.5], ["topk"], ["uniform"]) == [Variant(0.5, rest="int4")]
    assert [one.rest for one in all_variants([0.5], ["topk"], ["uniform"], method="griffin")] == ["drop"]
    with pytest.raises(OptionError, match="method griffin has rest drop"):
        all_variants([0.5], ["topk"], ["uniform"], rests=["int4"], method="griffin")
    with pytest.raises(OptionError, match="rest 'auto' is not known"):
        Variant(rest="auto")


@pytest.mark.parametrize(
    ("values", "mean", "error"),
    [([2.0], 2.0, 0.0), ([1.0, 3.0], 2.0, 1.0), ([0.0, 0.0, 1.0, 1.0], 0.5, (1 / 12) ** 0.5)],
)
def test_mean_and_standard_error(values: Sequence[float], mean: float, error: float) -> None:
    assert mean_and_error(values) == pytest.approx((mean, error))


def test_sensitivity_is_refused_where_nothing_was_calibrated_and_else_shares_unequally(llama: Path) -> None:
    engine, (pair, _), variant = (
        Engine(llama, dtype="float32"),
        pairs(),
        Variant(0.5, rest="drop", fold=False, prior="off", allocation="sensitivity"),
    )
    with pytest.raises(OptionError, match="griffin calibrate"):
        score(engine, [pair], [variant])
    kl = ((9.0, 1.0, 0.5), (1.1, 1.0, 0.9), (1.1, 1.0, 0.9))  # the first layer matters most
    path = calibration_path(cache_folder(), checkpoint_key(engine.checkpoint))
    save_curves(path, Curves(checkpoint_key(engine.checkpoint), (0.25, 0.5, 1.0), 0.5, kl, "", 1, 1, 1, "float32"))
    try:
        kept = [layer.kept for layer in variant.plan(engine, 48, 12).layers]
        ((scored,),) = score(engine, [pair], [variant])
    finally:
        path.unlink()
    assert kept[0] > 48 > kept[1]
    assert sum(kept) == 3 * 48
    model = oracle.load(llama)
    chosen = [oracle.experts(model, pair[0], 1 - (k + 0.5) / 96)[layer] for layer, k in enumerate(kept)]
    assert_equal(scored, expected(model, pair, chosen))


# One read of the weights against a sweep for each


def all_kinds_of_pairs() -> list[Pair]:
    """Contexts that are shared, of one token, and with nothing after them but one token."""
    first, second = tiny_prompt(60, seed=3), tiny_prompt(45, seed=4)
    shared = first[:48]
    return [
        (shared, first[48:]),
        (second[:20], second[20:]),
        (shared, second[3:9]),
        (first[:1], first[1:9]),
        (second[:20], second[7:8]),
        (second[:3], second[9:10]),
    ]


def reads(engine: Engine, before: int) -> int:
    """How many times the whole checkpoint has been read since then."""
    times = ((bytes_read() or 0) - before) / engine.checkpoint.bytes
    assert times == pytest.approx(round(times), abs=0.05)
    return round(times)


EVERY_WAY = [
    Variant(0.5, method="griffin"),
    FULL,
    Variant((0.9, 0.0, 0.5), method="griffin"),
    *(Variant(0.6, rest="drop", fold=False, prior="off", selection=name, seed=3) for name in SELECTIONS),
]


# Sliding windows, ALiBi, biases, Conv1D, routed and shared experts, latent keys.
KINDS = """llama gemma3_text opt gpt2 phi3 falcon-alibi bloom gpt_neo mixtral gpt_oss qwen2_moe deepseek_v3
gemma4_text-moe""".split()  # noqa: SIM905


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_slow_form(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / kind, kind), dtype="float32")
    found = score(engine, all_kinds_of_pairs(), EVERY_WAY)
    monkeypatch.setattr(planned_bytes, "LOGITS", 3 * 11 * 300 * 4)  # three rows of the first pair
    in_parts = score(engine, all_kinds_of_pairs(), EVERY_WAY)
    slowly = score_slowly(engine, all_kinds_of_pairs(), EVERY_WAY)
    for fast, parts, slow in zip(found, in_parts, slowly, strict=True):
        for one, two, wanted in zip(fast, parts, slow, strict=True):
            assert_equal(one, wanted, 2e-5)
            assert_equal(two, wanted, 2e-5)


def test_a_long_prompt_and_many_rows_go_through_a_block_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("griffin_offload.model.modules.PIECE", 16)
    for kind in ("llama", "mixtral"):
        engine = Engine(tiny_checkpoint(tmp_path / kind, kind), dtype="float32")
        fast, slow = (form(engine, pairs(), EVERY_WAY[:3]) for form in (score, score_slowly))
        for of_pair, wanted in zip(fast, slow, strict=True):
            for one, two in zip(of_pair, wanted, strict=True):
                assert_equal(one, two, 2e-5)


@pytest.mark.parametrize("kind", ["lfm2", "jamba", "deepseek_v32"])
def test_a_prompt_that_leaves_more_than_keys_and_values_is_scored_slowly(tmp_path: Path, kind: str) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / kind, kind), dtype="float32")
    assert not can_fork(engine.skeleton.config)
    variants = [Variant(0.5, method="griffin"), FULL]
    for found, wanted in zip(score(engine, pairs(), variants), score_slowly(engine, pairs(), variants), strict=True):
        for one, two in zip(found, wanted, strict=True):
            assert torch.equal(one.log_probability, two.log_probability)


def test_the_same_variant_twice_and_the_full_model_in_two_ways(llama: Path) -> None:
    half, same, full, other = score(
        Engine(llama, dtype="float32"),
        pairs()[:1],
        [
            Variant(0.5, rest="drop", fold=False, prior="off"),
            Variant(0.5, rest="drop", fold=False, prior="off"),
            FULL,
            Variant(0.0, selection="random"),
        ],
    )[0]
    assert torch.equal(half.kl, same.kl)
    assert torch.equal(full.log_probability, other.log_probability)
    assert not torch.equal(half.log_probability, full.log_probability)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of many layers, each of which weighs more than what the forwards hold."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 6}
    return tiny_checkpoint(tmp_path_factory.mktemp("large") / "llama", "llama", **sizes)


def test_one_read_serves_all_pairs_and_variants(large: Path) -> None:
    engine, told = Engine(large, dtype="float32"), list[tuple[int, int]]()
    before = bytes_read() or 0
    score(engine, all_kinds_of_pairs(), EVERY_WAY[:2], on_layer=lambda done, total: told.append((done, total)))
    assert reads(engine, before) == 1
    assert told == [(done, 6) for done in range(7)]


def planned(engine: Engine, some: list[Pair], variants: list[Variant]) -> int:
    """The budget that a single read for these needs."""
    rows = [ScoredRow(), *(variant.row(engine) for variant in variants)]
    ((waiting, _),) = plan_reads(engine, some, rows)
    request = replace(engine.opened.request(len(some[0][0]), 1), export=True, waiting=waiting)
    return make_plan(engine.sizes, request).peak


@pytest.mark.parametrize("times", [3, 6])
def test_a_budget_too_small_for_the_model_takes_several_reads(large: Path, times: int) -> None:
    engine, variants = Engine(large, dtype="float32"), [Variant(0.5, method="griffin")]
    many = [(tiny_prompt(40, seed), tiny_prompt(12, after)) for after in (7, 8) for seed in range(3)]
    wanted = score(engine, many, variants)
    engine.budget = planned(engine, many[::3] if times == 3 else many[:1], variants)  # a context's two, or a pair
    with pytest.raises(BudgetError):
        engine.plan(40, 12, sparsity=0.5)
    pairs_told, layers_told, before = list[tuple[int, int]](), list[tuple[int, int]](), bytes_read() or 0
    found = score(
        engine,
        many,
        variants,
        on_pair=lambda done, total: pairs_told.append((done, total)),
        on_layer=lambda done, total: layers_told.append((done, total)),
    )
    assert reads(engine, before) == times
    assert pairs_told == [(done, 6) for done in range(0, 7, 6 // times)]
    assert (layers_told[0], layers_told[-1]) == ((0, 6 * times), (6 * times, 6 * times))
    assert layers_told == sorted(layers_told)
    for (one,), (two,) in zip(found, wanted, strict=True):
        assert_equal(one, two, 1e-6)


def test_what_does_not_fit_is_refused_before_anything_is_read(large: Path) -> None:
    engine, variants = Engine(large, dtype="float32"), [Variant(0.5, method="griffin")]
    some = [(tiny_prompt(40), tiny_prompt(2)), (tiny_prompt(40, 1), tiny_prompt(200)), (tiny_prompt(40), [7])]
    engine.budget = planned(engine, some[1:2], variants) - 1
    before = bytes_read() or 0
    with pytest.raises(BudgetError):
        score(engine, some, variants)
    assert reads(engine, before) == 0


def test_the_first_refusal_names_what_is_enough(large: Path) -> None:
    engine, some = Engine(large, dtype="float32"), pairs()
    variants = [FULL, Variant(0.5, method="griffin"), Variant(0.5, rest="int4"), Variant(0.9, rest="int8")]
    wanted = score(engine, some, variants)
    engine.budget, before = 1, bytes_read() or 0
    with pytest.raises(BudgetError) as refused:
        score(engine, some, variants)
    assert reads(engine, before) == 0
    engine.budget = refused.value.needed
    for of_pair, of_wanted in zip(score(engine, some, variants), wanted, strict=True):
        for one, other in zip(of_pair, of_wanted, strict=True):
            assert_equal(one, other, 2e-5)
    engine.budget -= 1
    with pytest.raises(BudgetError):
        score(engine, some, variants)


def test_the_plan_of_a_quantized_pair_has_its_logits(llama: Path) -> None:
    engine, (context, following) = Engine(llama, dtype="float32"), pairs()[0]
    quantized = Variant(0.0, resident_dtype="int4")
    alone = engine.plan(len(context), len(following), quantized, fidelity=False).peak
    engine.budget = 1
    with pytest.raises(BudgetError) as refused:
        score(engine, [(context, following)], [quantized])
    assert refused.value.needed >= alone + 3 * (len(following) - 1) * engine.sizes.vocabulary * 4


def test_a_quantized_model_is_compared_with_a_full_one_that_does_not_fit(large: Path) -> None:
    engine, quantized = Engine(large, dtype="float32"), Variant(0.0, resident_dtype="int4")
    wanted = score(engine, pairs(), [quantized])
    full = engine.plan(40, 12, sparsity=0.0).peak
    engine.budget = 1
    with pytest.raises(BudgetError) as refused:
        score(engine, pairs(), [quantized])
    engine.budget = refused.value.needed
    assert engine.budget < full
    before = bytes_read() or 0
    found = score(engine, pairs(), [quantized])
    assert reads(engine, before) == 2 * len(pairs())
    for (one,), (other,) in zip(found, wanted, strict=True):
        assert_equal(one, other, 2e-5)


# The real model


@pytest.mark.real
def test_smollm2_equals_the_slow_form(smol: Path) -> None:
    engine = Engine(smol, dtype="float32")
    both = windows(encode_text(engine, text_paragraph())[0], 128, 32, 2)
    variants = [
        FULL,
        Variant(0.5, rest="drop", fold=False, prior="off"),
        Variant(0.5, rest="drop", fold=False, prior="off", selection="random"),
    ]
    before = bytes_read() or 0
    found = score(engine, both, variants)
    assert reads(engine, before) == 1
    for fast, slow in zip(found, score_slowly(engine, both, variants), strict=True):
        for one, wanted in zip(fast, slow, strict=True):
            assert_equal(one, wanted, 1e-3)


def test_packed_variants_are_scored_by_the_packed_model_itself(llama: Path) -> None:
    engine = Engine(llama, dtype="float32")
    variants = [
        FULL,
        Variant(0.0, resident_dtype="int8"),
        Variant(0.5, method="griffin"),
        Variant(0.0, resident_dtype="int4"),
    ]
    for full, eight, half, four in score(engine, pairs(), variants):
        assert full.kl.abs().max() < 1e-5
        assert 0 < eight.kl.mean() < four.kl.mean() < half.kl.mean()
    context, following = pairs()[0]
    ((ours,),) = score(engine, [(context, following)], [Variant(0.5, resident_dtype="int8", rest="int4")])
    output = engine.sweep(context, max_new_tokens=len(following), sparsity=0.5, resident_dtype="int8", rest="int4")
    with torch.no_grad():
        after = engine.skeleton.model(torch.tensor([following[:-1]]), past_key_values=output.past_key_values).logits[0]
    chances = torch.cat([output.logits[0, -1:], after]).float().log_softmax(-1)
    expected = chances[torch.arange(len(following)), torch.tensor(following)]
    torch.testing.assert_close(ours.log_probability, expected, rtol=0, atol=1e-4)
