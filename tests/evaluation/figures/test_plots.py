"""Figures: the numbers against z taken from transformers' own model, the files by what they show, the mistakes."""

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from click.testing import CliRunner, Result
from griffin_offload.cli.plot import ORDERS, command
from matplotlib.image import imread
from tiny import BOS_ID, SPECIALS, VOCAB, text_paragraph, tiny_checkpoint, tiny_prompt
from torch import Tensor
from transformers import AutoModelForCausalLM

from griffin_offload import Engine
from griffin_offload.errors import GriffinError, OptionError, PromptError, UnsupportedArchitecture
from griffin_offload.evaluation.figures import observe, plots
from griffin_offload.model import modules
from griffin_offload.pruning.statistic import neuron_statistic

LAYERS, NEURONS = 24, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many layers, so that half of the neurons take visibly less memory than all."""
    return tiny_checkpoint(tmp_path_factory.mktemp("plots") / "llama", "llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder, device="cpu")


@pytest.fixture(scope="module")
def z(folder: Path) -> list[Tensor]:
    """The down projections' inputs for tiny_prompt(), by transformers alone: (T, F) of each layer."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(torch.tensor([tiny_prompt()]))
    return seen


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Files with three prompts that differ."""
    words = text_paragraph().split()
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text(" ".join(words[40 * i : 40 * i + 30]))
    return [str(file) for file in files]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def facts(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def is_drawn(path: Path) -> bool:
    """More than a few pixels differ from the corner's."""
    pixels = imread(path)[..., :3]
    return bool(min(pixels.shape[:2]) > 400 and (abs(pixels - pixels[0, 0]).max(axis=2) > 0.1).mean() > 0.02)


# The numbers


def test_relative_activations_are_z_over_its_norm(engine: Engine, z: list[Tensor]) -> None:
    found = observe.activations(engine, tiny_prompt(), [0, 23], features=NEURONS)
    assert sorted(found) == [0, 23]
    for layer, matrix in found.items():
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix, (z[layer] / z[layer].norm(dim=1, keepdim=True)).abs(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(matrix.norm(dim=1), torch.ones(48))


def test_only_the_first_tokens_and_neurons_are_kept(engine: Engine) -> None:
    whole = observe.activations(engine, tiny_prompt(), [5], features=NEURONS)[5]
    part = observe.activations(engine, tiny_prompt(), [5], tokens=20, features=10)[5]
    torch.testing.assert_close(part, whole[:20, :10])
    assert part.untyped_storage().nbytes() == 20 * 10 * 4, "the rest is not held behind it"


def test_a_token_without_activations_is_zero_not_nan() -> None:
    assert observe.relative(torch.tensor([[0.0, 0.0], [3.0, -4.0]]), 2).tolist() == [
        [0, 0],
        [0.6000000238418579, 0.800000011920929],
    ]


def test_statistics_are_neuron_statistic_of_each_prompt(engine: Engine, z: list[Tensor]) -> None:
    found = observe.statistics(engine, [tiny_prompt(), tiny_prompt(30, seed=1)])
    assert [tuple(squares.shape) for squares in found] == [(2, NEURONS)] * LAYERS
    for squares, of_layer in zip(found, z, strict=True):
        torch.testing.assert_close(squares[0], neuron_statistic(of_layer), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(squares.sum(dim=1), torch.tensor([48.0, 30.0]))


def test_a_model_that_does_not_fit_shows_the_same(folder: Path, engine: Engine) -> None:
    prompts = [tiny_prompt(), tiny_prompt(seed=1)]
    small = Engine(folder, device="cpu")
    small.budget = small.plan(48, 1, sparsity=0.0).peak - 1
    assert small.plan(48, 1).reads_again
    for ours, whole in zip(observe.statistics(small, prompts), observe.statistics(engine, prompts), strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-3)


def test_a_prompt_computed_in_pieces_shows_the_same(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, squares = observe.activations(engine, tiny_prompt(), [3]), observe.statistics(engine, [tiny_prompt()])
    monkeypatch.setattr(modules, "PIECE", 20)
    torch.testing.assert_close(observe.activations(engine, tiny_prompt(), [3]), whole)
    torch.testing.assert_close(observe.statistics(engine, [tiny_prompt()]), squares)


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "phi3"])
def test_blocks_of_other_forms(model_type: str, tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / model_type, model_type), device="cpu")
    for squares in observe.statistics(engine, [tiny_prompt(30)]):
        assert squares.sum().item() == pytest.approx(30)


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "mixtral", "mixtral"), device="cpu")
    with pytest.raises(UnsupportedArchitecture, match="layer 0 is a mixture of experts"):
        observe.statistics(engine, [tiny_prompt()])


def test_no_hook_stays(engine: Engine) -> None:
    observe.statistics(engine, [tiny_prompt()])
    with pytest.raises(PromptError):
        observe.statistics(engine, [[]])
    downs = observe._down_projections(engine)
    assert not any(down._forward_pre_hooks for down in downs)


def test_overlaps_of_known_sets() -> None:
    statistic = torch.tensor([[9.0, 8, 1, 0, 0, 0], [8, 9, 0, 0, 0, 1], [0, 9, 8, 1, 0, 0], [0, 0, 0, 1, 9, 8]])
    assert observe.overlaps(statistic, 2).tolist() == pytest.approx([1, 1 / 3, 0, 1 / 3, 0, 0])
    assert observe.overlaps(statistic, 6).tolist() == [1] * 6


def test_chance_is_what_random_sets_share() -> None:
    assert observe.chance_overlap(96, 96) == 1
    random = torch.rand(200, 1536, generator=torch.Generator().manual_seed(0))
    for kept in (154, 768):
        assert observe.overlaps(random, kept).mean().item() == pytest.approx(
            observe.chance_overlap(1536, kept), abs=2e-3
        )


def test_held_and_kept_at() -> None:
    assert observe.held(torch.tensor([1.0, 6, 2, 1]), 0.25) == pytest.approx(0.6)
    assert observe.held(torch.tensor([1.0, 6, 2, 1]), 1) == 1
    assert [observe.kept_at(100, density) for density in (0.29, 0.001, 1)] == [29, 1, 100]
    for density in (0, 1.5, -1):
        with pytest.raises(OptionError, match=re.escape(f"density {density} is outside (0, 1]")):
            observe.kept_at(100, density)


def test_layers_default_to_first_middle_last(engine: Engine) -> None:
    assert observe.check_layers(engine, None) == [0, 11, 23]
    assert observe.check_layers(engine, [7, 3, 7]) == [3, 7]
    for layer in (24, -1):
        with pytest.raises(OptionError, match=f"no layer {layer}: its layers are 0 to 23"):
            observe.check_layers(engine, [3, layer])


# Prompts


def test_orders(engine: Engine) -> None:
    assert ORDERS == observe.ORDERS
    ids = tiny_prompt(seed=5)  # another seed than below, which draws in the same way
    assert observe.reorder(engine, ids, "original", 0) == ids
    for order in ("permuted", "random"):
        other = observe.reorder(engine, ids, order, 0)
        assert other[0] == BOS_ID
        assert other != ids
        assert other == observe.reorder(engine, ids, order, 0) != observe.reorder(engine, ids, order, 1)
        assert (Counter(other) == Counter(ids)) == (order == "permuted")
    many = observe.reorder(engine, tiny_prompt(5000), "random", 0)
    assert set(many[1:]) == set(range(len(SPECIALS), VOCAB))
    with pytest.raises(OptionError, match="known: original, permuted, random"):
        observe.reorder(engine, ids, "sorted", 0)


def test_prompts_are_spread_over_a_text(engine: Engine) -> None:
    text = text_paragraph()
    ids = engine.encode(text, raw=True)
    prompts = observe.cut_prompts(engine, text, 3, 50)
    step = (len(ids) - 1) // 3
    assert prompts == [[BOS_ID, *ids[1 + i * step : 50 + i * step]] for i in range(3)]
    with pytest.raises(PromptError, match="3 prompts of 4999 need 14997"):
        observe.cut_prompts(engine, text, 3, 5000)


# Results


def results(path: Path, model: str, *rows: tuple[float, str, int, float], **more: Any) -> Path:
    """A file as `griffin eval perplexity --json` prints it; a row: sparsity, allocation, bytes, perplexity."""
    keys = ("sparsity", "allocation", "resident_bytes", "perplexity")
    common = {"label": "a", "selection": "topk", "standard_error": 0.1}
    path.write_text(
        json.dumps({"model": model, "results": [common | dict(zip(keys, row, strict=True)) | more for row in rows]})
    )
    return path


def test_points_of_one_model_are_named_by_what_differs(tmp_path: Path) -> None:
    rows = [(0.0, "uniform", 400, 20.0), (0.5, "uniform", 300, 40.0), (0.5, "sensitivity", 301, 35.0)]
    found = observe.read_points([results(tmp_path / "a", "folder/smol", *rows)])
    assert [(p.series, p.resident_bytes, p.perplexity) for p in found] == [
        ("sensitivity", 301, 35.0),
        ("sensitivity", 400, 20.0),  # the full model is on every line
        ("uniform", 300, 40.0),
        ("uniform", 400, 20.0),
    ]
    assert {(p.model, p.standard_error) for p in found} == {("smol", 0.1)}


def test_points_of_two_models_and_lengths(tmp_path: Path) -> None:
    row = (0.5, "uniform", 300, 40.0)
    one, other = results(tmp_path / "a", "a", row), results(tmp_path / "b", "b", (0.0, "uniform", 400, 20.0))
    assert [p.series for p in observe.read_points([one, other])] == ["a", "b"]
    assert [p.series for p in observe.read_points([one])] == ["a"]
    found = observe.read_points(
        [
            results(tmp_path / "c", "a", row, prompt_tokens=64, continue_tokens=8),
            results(tmp_path / "d", "a", row, (0.0, "uniform", 400, 20.0), prompt_tokens=512, continue_tokens=8),
        ]
    )
    assert [(p.series, p.resident_bytes) for p in found] == [
        ("prompt 512", 300),
        ("prompt 512", 400),
        ("prompt 64", 300),
    ]
    path = results(tmp_path / "e", "a", row)  # one length, said once for all
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt_tokens": 64}))
    other = results(tmp_path / "f", "a", row, prompt_tokens=512)
    assert [p.series for p in observe.read_points([path, other])] == ["prompt 512", "prompt 64"]


def test_a_sparsity_by_layer_counts_as_its_mean(tmp_path: Path) -> None:
    path = results(tmp_path / "a", "a", (0, "uniform", 300, 40.0), sparsity=[0.25, 0.75])
    assert observe.read_points([path])[0].sparsity == 0.5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the results"),
        ("nonsense", "is not what `griffin eval perplexity --json` prints"),
        ("[]", "is not what"),
        ('{"model": "a", "results": [{"sparsity": 0}]}', "is not what"),
        ('{"model": "a", "results": []}', "holds no results"),
    ],
)
def test_wrong_results_are_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=words) as error:
        observe.read_points([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# The figures


def test_flocking_draws_tokens_down_and_neurons_across(tmp_path: Path) -> None:
    streak = torch.zeros(60, 60)
    streak[:, 20] = 1
    plots.flocking({"original": {0: streak}}, tmp_path / "a.png", "")
    plots.flocking({"original": {0: streak.T}}, tmp_path / "b.png", "")
    one, other = (imread(tmp_path / name)[..., 0] for name in ("a.png", "b.png"))
    bright = one > other + 0.5
    assert bright.any(axis=0).mean() < 0.05, "a neuron is narrow"
    assert bright.any(axis=1).mean() > 0.5, "and seen over all tokens"


def test_nothing_active_is_drawn_dark(tmp_path: Path) -> None:
    plots.flocking({"original": {0: torch.zeros(8, 8)}}, tmp_path / "a.png", "")
    assert is_drawn(tmp_path / "a.png")


def test_the_callers_matplotlib_is_left_alone(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plots.statistic({0: torch.rand(1, 20)}, tmp_path / "a.png", "one layer, one prompt")
    assert is_drawn(tmp_path / "a.png")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(("suffix", "begin"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_the_same_data_are_the_same_file(tmp_path: Path, suffix: str, begin: bytes) -> None:
    overlap = {0.5: [torch.tensor([0.5, 0.7])]}
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        plots.jaccard(overlap, [50], path, "title")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes().startswith(begin)


def test_layers_may_differ_in_size(tmp_path: Path) -> None:
    plots.statistic({0: torch.rand(2, 50), 7: torch.rand(2, 3000)}, tmp_path / "s.png", "")
    overlap = {density: [torch.tensor([0.5, 0.7]), torch.tensor([0.3, 0.4])] for density in (0.1, 0.2, 0.3, 0.4, 0.5)}
    plots.jaccard(overlap, [50, 3000], tmp_path / "j.png", "")
    assert is_drawn(tmp_path / "s.png")
    assert is_drawn(tmp_path / "j.png")


# The commands


def test_flocking(folder: Path, engine: Engine, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "flocking.png"
    arguments = ["flocking", "--model", folder, "--prompt-file", texts[0], "--out", out]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert is_drawn(out)
    orders = [word for order in ORDERS for word in ("--order", order)]
    found = facts(*arguments, *orders, "--layers", "1,23", "--tokens", "40", "--features", "64")
    assert (found["out"], found["model"], found["tokens"]) == (str(out), str(folder), 40)
    held = found["strongest_tenth_holds"]
    assert list(held) == list(ORDERS)
    ids = engine.encode(Path(texts[0]).read_text(), raw=True)[:40]
    matrix = observe.activations(engine, ids, [23], features=64)[23]
    columns = matrix.square().sum(dim=0).sort(descending=True).values
    assert held["original"]["23"] == pytest.approx(float(columns[:6].sum() / columns.sum()))
    assert list(held["random"]) == ["1", "23"]
    assert imread(out).shape[0] > 2 * imread(out).shape[1] / 3, "a row each order"


def test_jaccard(folder: Path, engine: Engine, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "jaccard.png"
    files = [word for text in texts for word in ("--prompt-file", text)]
    found = facts("jaccard", "--model", folder, *files, "--density", "0.25", "--density", "0.5", "--out", out)
    assert is_drawn(out)
    assert found["prompts"] == 3
    squares = observe.statistics(engine, [engine.encode(Path(t).read_text(), raw=True) for t in texts])[2]
    sets = [set(row.topk(48).indices.tolist()) for row in squares]
    pairs = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert list(found["mean_jaccard_per_layer"]) == ["0.25", "0.5"]
    assert len(found["mean_jaccard_per_layer"]["0.5"]) == LAYERS
    assert found["mean_jaccard_per_layer"]["0.5"][2] == pytest.approx(sum(pairs) / 3)


def test_jaccard_of_one_text_cut_up(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(text_paragraph())
    cut = ["--data", tmp_path / "long.txt", "--windows", "4", "--prompt-tokens", "60"]
    out = tmp_path / "jaccard.svg"
    assert facts("jaccard", "--model", folder, *cut, "--out", out)["prompts"] == 4
    for word in ("Jaccard overlap", "10% of neurons kept", "chance", "layer"):
        assert word in out.read_text()


def test_statistic(folder: Path, engine: Engine, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "statistic.png"
    found = facts("statistic", "--model", folder, "--prompt-file", texts[0], "--layers", "0,9", "--out", out)
    assert is_drawn(out)
    squares = observe.statistics(engine, [engine.encode(Path(texts[0]).read_text(), raw=True)])[9][0]
    assert found["strongest_half_holds"]["9"] == pytest.approx(float(squares.topk(48).values.sum() / squares.sum()))
    assert list(found["strongest_half_holds"]) == ["0", "9"]
    every = facts("statistic", "--model", folder, "--prompt-file", texts[0], "--out", out)
    assert len(every["strongest_half_holds"]) == LAYERS


def test_frontier(tmp_path: Path) -> None:
    rows = [(0.0, "uniform", 400 << 20, 20.0), (0.5, "uniform", 300 << 20, 40.0), (0.5, "sensitivity", 300 << 20, 35.0)]
    one = results(tmp_path / "a.json", "smol", *rows)
    other = results(tmp_path / "b.json", "gemma", *[(s, a, size * 8, p * 2) for s, a, size, p in rows])
    found = facts("frontier", "--results", one, other, "--out", tmp_path / "f.png")
    assert is_drawn(tmp_path / "f.png")
    assert len(found["points"]) == 8
    assert set(found["points"][0]) >= {"series", "sparsity", "resident_bytes", "perplexity", "standard_error"}
    assert run("frontier", "--results", one, "--out", tmp_path / "f.svg").exit_code == 0
    drawn = (tmp_path / "f.svg").read_text()
    for word in ("resident weights (MiB)", "perplexity", "50% pruned", "full", "sensitivity", "weights, smol"):
        assert word in drawn
    assert drawn.count("full<") == 1, "one label for the point that two lines share"


def test_compare(tmp_path: Path) -> None:
    rows = [
        {"task": "text", "way": way, "share": share, "id": number, "resident_bytes": 9, "loss": 3 + share + number / 9}
        for way, share in (("dense", 0.0), ("GRIFFIN", 0.25), ("GRIFFIN", 0.5), ("static: code", 0.5))
        for number in range(3)
    ]
    rows += [{**rows[0], "task": "arithmetic", "exact": 1.0, "log_likelihood": -2.0}]
    del rows[-1]["loss"]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = facts("compare", "--results", tmp_path / "out.jsonl", "--out", tmp_path / "c.png")
    assert min(imread(tmp_path / "c.png").shape[:2]) > 400
    dense, griffin, *_ = found["results"]
    assert dense["perplexity"] == pytest.approx(math.exp(3 + 1 / 9))
    assert dense["exact"] == 1
    assert (griffin["way"], griffin["share"]) == ("GRIFFIN", 0.25)
    assert run("compare", "--results", tmp_path / "out.jsonl", "--out", tmp_path / "c.svg").exit_code == 0
    drawn = (tmp_path / "c.svg").read_text()
    for word in (
        "dense",
        "static: code",
        "25% left out",
        "50% left out",
        "nothing left out",
        "perplexity",
        "sums right",
    ):
        assert word in drawn
    (tmp_path / "out.jsonl").write_text('{"id": 1}\n')
    fails(GriffinError, 'no "task"', "compare", "--results", tmp_path / "out.jsonl", "--out", tmp_path / "c.svg")


# Mistakes


def fails(kind: type[GriffinError], words: str, *arguments: object) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, kind), result.output
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


def wrong_usage(words: str, *arguments: object) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_an_unknown_suffix_or_folder_is_refused_before_the_model(texts: list[str], tmp_path: Path) -> None:
    arguments = ["flocking", "--model", tmp_path / "no-such-model", "--prompt-file", texts[0], "--out"]
    fails(OptionError, ".png, .pdf, .svg", *arguments, tmp_path / "a.jpg")
    fails(OptionError, "does not exist", *arguments, tmp_path / "none" / "a.png")


@pytest.mark.parametrize("name", ["flocking", "jaccard", "statistic", "frontier"])
def test_without_matplotlib_the_extra_is_named(
    name: str, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = ["--results", texts[0]] if name == "frontier" else ["--prompt-file", texts[0]]
    fails(OptionError, "pip install 'griffin-offload[plot]'", name, *given, "--out", tmp_path / "a.png")


def test_too_few_prompts(texts: list[str], tmp_path: Path) -> None:
    out = ["--out", tmp_path / "a.png"]
    wrong_usage("2 times or more", "jaccard", "--prompt-file", texts[0], *out)
    wrong_usage("--windows 1 is too few", "jaccard", "--data", texts[0], "--windows", "1", *out)
    wrong_usage("give --prompt-file FILE", "statistic", *out)
    wrong_usage("--prompt-file", "flocking", *out)
    wrong_usage("--results", "frontier", *out)


def test_prompts_from_two_places(texts: list[str], tmp_path: Path) -> None:
    out = ["--out", tmp_path / "a.png"]
    wrong_usage("leave one out", "statistic", "--prompt-file", texts[0], "--data", texts[0], *out)
    wrong_usage("need --data FILE", "statistic", "--prompt-file", texts[0], "--windows", "2", *out)


def test_layers_and_densities_out_of_range(folder: Path, texts: list[str], tmp_path: Path) -> None:
    model = ["--model", folder, "--prompt-file", texts[0], "--prompt-file", texts[1], "--out", tmp_path / "a.png"]
    fails(OptionError, "no layer 24: its layers are 0 to 23", "statistic", *model, "--layers", "0,24")
    fails(OptionError, "density 1.5", "jaccard", *model, "--density", "0.5", "--density", "1.5")
    wrong_usage("'a,b' is not a list of numbers", "statistic", *model, "--layers", "a,b")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.real
def test_prompts_of_a_real_model_share_more_experts_than_chance(smol: Path) -> None:
    engine = Engine(smol, device="cpu")
    words = text_paragraph().split()
    prompts = [engine.encode(" ".join(words[i : i + 100]), raw=True) for i in (0, 300)]
    shared = [observe.overlaps(squares, 768).item() for squares in observe.statistics(engine, prompts)]
    assert min(shared) > observe.chance_overlap(1536, 768) + 0.05
    assert max(shared) < 0.95
