"""Perplexity by hand, from the oracle's logits, and the command that prints it."""

import json
import math
from pathlib import Path

import oracle
import pytest
import torch
from click.testing import CliRunner, Result
from griffin_offload.cli import eval_perplexity
from tiny import BOS_ID, text_paragraph, tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.errors import OptionError, PromptError
from griffin_offload.evaluation.perplexity import Perplexity, encode_text, perplexity, windows
from griffin_offload.evaluation.scoring.scored import Pair
from griffin_offload.evaluation.scoring.variant import FULL, Variant

KEYS = [
    "label",
    "sparsity",
    "selection",
    "allocation",
    "resident_dtype",
    "rest",
    "seed",
    "prior_weight",
    "folds",
    "perplexity",
    "standard_error",
    "agreement",
    "kl",
    "acceptance",
    "acceptance_error",
    "resident_bytes",
    "kept",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("perplexity") / "llama", "llama")


@pytest.fixture(scope="module")
def ids(llama: Path) -> list[int]:
    return encode_text(Engine(llama), text_paragraph())[0]


def by_hand(model: torch.nn.Module, pairs: list[Pair], sparsity: float) -> tuple[float, float]:
    """Perplexity, and the share of tokens with the full model's most likely one."""
    losses, same = [], []
    for context, continuation in pairs:
        truth = oracle.continuation_logits(model, context, continuation, None)
        logits = oracle.continuation_logits(model, context, continuation, oracle.experts(model, context, sparsity))
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(continuation)).item())
        same.append((logits.argmax(1) == truth.argmax(1)).float().mean().item())
    return math.exp(sum(losses) / len(losses)), sum(same) / len(same)


def test_windows_are_back_to_back() -> None:
    assert windows(range(10), 3, 1, 2) == [([0, 1, 2], [3]), ([4, 5, 6], [7])]
    with pytest.raises(PromptError, match="the text has 10 tokens; 3 windows of 4 need 12"):
        windows(range(10), 3, 1, 3)


def test_the_numbers_are_the_oracles(llama: Path, ids: list[int]) -> None:
    engine, pairs = Engine(llama, dtype="float32"), windows(ids, 40, 24, 3)
    variants = [Variant(0.5, method="griffin"), FULL, Variant(0.75, method="griffin")]
    found = perplexity(engine, pairs, variants, prompt_tokens=[40], continue_tokens=[24])
    for variant, result in zip(variants, found, strict=True):
        value, agreement = by_hand(oracle.load(llama), pairs, variant.sparsity)
        assert result.perplexity == pytest.approx(value, rel=1e-3)
        assert result.agreement == pytest.approx(agreement)
        assert result.label == variant.label()
        assert result.resident_bytes == engine.plan(40, 24, sparsity=variant.sparsity, method="griffin").resident_bytes
        assert result.kept == (int(96 * (1 - variant.sparsity)),) * 3
    half, full, _ = found
    assert (full.kl, full.agreement) == (0, 1)
    assert half.kl > 0
    assert 0 < half.agreement < 1


def test_the_standard_error_is_that_of_the_mean_over_windows(llama: Path, ids: list[int]) -> None:
    engine, pairs = Engine(llama, dtype="float32"), windows(ids, 40, 24, 3)

    def one(chosen: list[Pair]) -> Perplexity:
        return perplexity(engine, chosen, [Variant(0.5, method="griffin")], prompt_tokens=[40], continue_tokens=[24])[0]

    losses = torch.tensor([math.log(one([pair]).perplexity) for pair in pairs], dtype=torch.float64)
    together = one(pairs)
    assert math.log(together.perplexity) == pytest.approx(losses.mean().item())
    assert together.standard_error == pytest.approx((losses.std() / 3**0.5).item())
    assert one(pairs[:1]).standard_error == 0, "one window has no spread"


def test_a_grid_scores_the_same_places(llama: Path, ids: list[int]) -> None:
    """A shorter prompt ends where the longest ends, a shorter continuation begins where the longest begins."""
    engine, pairs = Engine(llama, dtype="float32"), windows(ids, 40, 24, 2)
    model, variants = oracle.load(llama), [FULL, Variant(0.5, method="griffin")]
    found = perplexity(engine, pairs, variants, prompt_tokens=[16, 40], continue_tokens=[24, 8])
    lengths = [(result.prompt_tokens, result.continue_tokens, result.label) for result in found]
    assert lengths == [(p, g, label) for p in (16, 40) for g in (24, 8) for label in ("full", "50%")]
    for result in found:
        cut = [(context[-result.prompt_tokens :], after[: result.continue_tokens]) for context, after in pairs]
        assert result.perplexity == pytest.approx(by_hand(model, cut, result.variant.sparsity)[0], rel=1e-3)


def test_bos_stands_before_every_prompt_or_nowhere(llama: Path) -> None:
    engine = Engine(llama, dtype="float32")
    plain, none = encode_text(engine, text_paragraph(60))
    assert engine.encode(text_paragraph(60), raw=True) == [BOS_ID, *plain]
    same, before = encode_text(engine, text_paragraph(60), bos=True)
    assert (same, none, before) == (plain, [], [BOS_ID])
    pairs = windows(plain, 20, 10, 2)
    (found,) = perplexity(
        engine, pairs, [Variant(0.5, method="griffin")], prompt_tokens=[20], continue_tokens=[10], before=before
    )
    value, _ = by_hand(oracle.load(llama), [([BOS_ID, *context], after) for context, after in pairs], 0.5)
    assert found.perplexity == pytest.approx(value, rel=1e-3)
    assert found.prompt_tokens == 20


def test_bos_of_a_tokenizer_that_has_none(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "llama", "llama")
    engine = Engine(folder)
    engine.tokenizer.bos_token = None
    with pytest.raises(OptionError, match="leave out --bos"):
        encode_text(engine, "text", bos=True)


# griffin eval perplexity


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "alice.txt"
    file.write_text(text_paragraph())
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(eval_perplexity.command, [str(argument) for argument in arguments])


SHORT = ("--prompt-tokens", 40, "--continue-tokens", 24, "--windows", 2, "--dtype", "float32")


def test_the_command_prints_what_the_library_finds(llama: Path, data: Path) -> None:
    result = run(
        "--data", data, "--model", llama, *SHORT, "--sparsity", 0, "--sparsity", 0.5, "--method", "griffin", "--json"
    )
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    engine = Engine(llama, dtype="float32")
    pairs = windows(encode_text(engine, data.read_text())[0], 40, 24, 2)
    wanted = perplexity(engine, pairs, [FULL, Variant(0.5, method="griffin")], prompt_tokens=[40], continue_tokens=[24])
    results = facts.pop("results")
    assert facts == {
        "model": str(llama),
        "model_path": str(llama),
        "data": str(data),
        "prompt_tokens": 40,
        "continue_tokens": 24,
        "windows": 2,
    }
    assert [list(row) for row in results] == [KEYS, KEYS]
    assert [row["perplexity"] for row in results] == pytest.approx([row.perplexity for row in wanted])
    assert [row["kept"] for row in results] == [[96, 96, 96], [48, 48, 48]]


def test_the_table(llama: Path, data: Path) -> None:
    result = run("--data", data, "--model", llama, *SHORT, "--bos")
    assert result.exit_code == 0, result.output
    title, (head, _, *rows) = result.stdout.split("\n\n")[0], result.stdout.split("\n\n")[1].splitlines()
    assert "2 windows of alice.txt" in " ".join(title.split())
    heads = ("prompt", "then", "pruned", "perplexity", "± of its log", "agreement", "KL (nats)", "resident")
    assert all(name in head for name in heads)
    assert [row.split()[:3] for row in rows] == [["40", "24", "full"], ["40", "24", "50%,"]], "0 and 0.5"
    assert "50%, rest int4" in rows[1]
    assert " 1.000 " in rows[0], "the full model agrees with itself"


def test_the_results_of_a_grid_say_their_lengths(llama: Path, data: Path) -> None:
    result = run("--data", data, "--model", llama, *SHORT, "--prompt-tokens", 20, "--sparsity", 0.5, "--json")
    facts = json.loads(result.stdout)
    assert (facts["prompt_tokens"], facts["continue_tokens"]) == ([40, 20], [24])
    assert [(row["prompt_tokens"], row["continue_tokens"]) for row in facts["results"]] == [(40, 24), (20, 24)]


def test_selections_are_compared_and_the_full_model_comes_once(llama: Path, data: Path) -> None:
    options = (
        "--sparsity",
        0,
        "--sparsity",
        0.5,
        "--selection",
        "topk",
        "--selection",
        "random",
        "--seed",
        3,
        "--rest",
        "drop",
        "--fold-strength",
        0,
        "--prior",
        "off",
    )
    result = run("--data", data, "--model", llama, *SHORT, *options, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert [(row["label"], row["selection"], row["seed"]) for row in rows] == [
        ("full", "topk", 0),
        ("50%", "topk", 3),
        ("50% random seed 3", "random", 3),
    ]
    assert rows[1]["perplexity"] != rows[2]["perplexity"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--windows", 100), PromptError),
        (("--sparsity", 2), OptionError),
        (("--prompt-tokens", 250), PromptError),
    ],
)
def test_what_cannot_be_measured(llama: Path, data: Path, options: tuple[object, ...], error: type[Exception]) -> None:
    result = run("--data", data, "--model", llama, *SHORT, *options)
    assert isinstance(result.exception, error)
    assert result.stdout == ""


def test_a_file_that_is_not_there_or_no_text(llama: Path, tmp_path: Path) -> None:
    assert "no such file" in str(run("--data", tmp_path / "none.txt", "--model", llama).exception)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in str(run("--data", tmp_path / "bytes", "--model", llama).exception)
    (tmp_path / "empty").write_text("\n")
    assert "the text has 0 tokens" in str(run("--data", tmp_path / "empty", "--model", llama).exception)


# The real model


@pytest.mark.real
def test_smollm2_equals_the_oracle_and_loses_what_pruning_costs(smol: Path) -> None:
    model, engine = oracle.load(smol), Engine(smol, dtype="float32")
    pairs = windows(encode_text(engine, text_paragraph())[0], 128, 32, 2)
    full, half = perplexity(
        engine, pairs, [FULL, Variant(0.5, method="griffin")], prompt_tokens=[128], continue_tokens=[32]
    )
    for result in (full, half):
        value, agreement = by_hand(model, pairs, result.variant.sparsity)
        assert result.perplexity == pytest.approx(value, rel=1e-3)
        assert result.agreement == pytest.approx(agreement, abs=0.02)
    assert 1 < full.perplexity < half.perplexity < 50 * full.perplexity
