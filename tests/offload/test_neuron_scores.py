"""Scores of many samples by one sweep, against a plain model in memory, and against a sweep for each sample."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import Case
from click.testing import CliRunner, Result
from griffin_offload.cli.main import griffin
from tiny import BOS_ID, text_paragraph, tiny_checkpoint, tiny_prompt
from torch import Tensor
from transformers import AutoModelForCausalLM

from griffin_offload import Engine
from griffin_offload.checkpoint.gguf.header import read_gguf
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.errors import GriffinError, NumericError, OptionError, PromptError
from griffin_offload.memory.spill import Spill
from griffin_offload.pruning.calibration import Calibration
from griffin_offload.pruning.calibration_texts import CalibrationText, draw_samples
from griffin_offload.pruning.prior import Prior, load_prior, weight_at
from griffin_offload.units import MIB

# Gate and up apart, sliding windows and tied, no gate and biases, (in, out) weights, gate and up in one, routed experts
# with and without a shared block, interleaved halves, recurrent layers.
KINDS = [
    "llama",
    "gemma3_text",
    "opt",
    "gpt2",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "gpt_oss",
    "jamba",
    "lfm2",
    "gemma4_text",
]
SAMPLES = [tiny_prompt(48, 1), tiny_prompt(20, 2), tiny_prompt(33, 3)]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("static") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("static") / "llama", "llama")


def flat(prior: Prior) -> list[Tensor]:
    """A score for each block, in the oracle's order."""
    return [score for layer in prior.scores for score in layer]


def test_one_sweep_over_many_is_the_sum_of_a_sweep_for_each(model: Path) -> None:
    engine = Engine(model)
    together = flat(engine.score_samples(Calibration(SAMPLES)))
    each = [flat(engine.score_samples(Calibration([ids]))) for ids in SAMPLES]
    assert len(together) == len(oracle.blocks(oracle.load(model)))
    for total, *parts in zip(together, *each, strict=True):
        torch.testing.assert_close(total, sum(parts), rtol=1e-6, atol=1e-7)


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many samples there are, and wherever they wait."""
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama", tied=True))
    layers: list[tuple[int, int]] = []
    read: list[int] = []
    close = Reader.close
    monkeypatch.setattr(Reader, "close", lambda self: (read.append(self.bytes), close(self)))
    for room in (None, 0):
        layers.clear()
        read.clear()
        engine.score_samples(Calibration(SAMPLES), lambda done, total: layers.append((done, total)), host_memory=room)
        assert layers == [(0, 3), (1, 3), (2, 3), (3, 3)]
        assert sum(read) == sum(info.bytes for info in engine.checkpoint.tensors.values())


def test_the_griffin_score_is_the_papers(model: Path) -> None:
    whole = oracle.load(model)
    ours = flat(Engine(model).score_samples(Calibration(SAMPLES)))
    theirs = [oracle.statistic(whole, ids) for ids in SAMPLES]
    for place, score in enumerate(ours):
        torch.testing.assert_close(score, sum(s[place].square() for s in theirs), rtol=1e-4, atol=1e-5)


def test_every_type_in_one_sweep_its_states_on_disk(every: Case) -> None:
    whole = every.model
    engine = Engine(every.folder)
    prior = engine.score_samples(Calibration(SAMPLES), host_memory=0)
    ours = {
        (layer, block.path): score
        for layer, scores in enumerate(prior.scores)
        for block, score in zip(engine.skeleton.layers[layer].blocks, scores, strict=True)
    }
    theirs = [oracle.statistic(whole, ids) for ids in SAMPLES]
    for place, block in enumerate(oracle.blocks(whole)):
        expected = sum(of_sample[place].square() for of_sample in theirs)
        torch.testing.assert_close(ours.pop((block.layer, block.name)), expected, rtol=1e-4, atol=1e-4)
    assert not ours


def test_the_wanda_score_is_norm_of_activations_times_norm_of_column(model: Path) -> None:
    """Of the weights as they lie in the modules, one neuron after the other."""
    whole = oracle.load(model)
    ours = flat(Engine(model).score_samples(Calibration(SAMPLES, "wanda")))
    seen = [oracle.activations(whole, ids) for ids in SAMPLES]
    for place, block in enumerate(oracle.blocks(whole)):
        of_samples = [z[place] for z in seen]
        if block.routed:
            slow = []
            for expert in range(len(block.module.down_proj)):
                down = block.module.down_proj[expert]
                down = down.T if getattr(block.module, "is_transposed", False) else down
                slow.append(wanda(torch.cat([z[expert] for z in of_samples]), down))
            expected = torch.stack(slow)
        else:
            down = block.module.weight
            z = torch.cat(of_samples)
            expected = wanda(z, down.T if type(block.module).__name__ == "Conv1D" else down)
        torch.testing.assert_close(ours[place], expected, rtol=1e-4, atol=1e-5)


def wanda(z: Tensor, down: Tensor) -> Tensor:
    """z (T, F), down (D, F) -> (F,)."""
    return torch.stack([(z[:, j].norm() * down[:, j].norm()) ** 2 for j in range(z.shape[1])]).detach()


def test_the_magnitude_score_needs_no_samples(llama: Path) -> None:
    whole = oracle.load(llama)
    ours = flat(Engine(llama).score_samples(Calibration(score="magnitude")))
    for layer, score in zip(oracle.decoder_layers(whole), ours, strict=True):
        expected = (layer.mlp.gate_proj.weight.norm(dim=1) * layer.mlp.up_proj.weight.norm(dim=1)) ** 2
        torch.testing.assert_close(score, expected.detach())


def test_the_random_score_is_its_seeds(llama: Path) -> None:
    engine = Engine(llama)
    one, again, other = (flat(engine.score_samples(Calibration(score="random", seed=seed))) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, other))
    assert not torch.equal(one[0], one[1])


def test_a_prior_of_the_prompt_alone_gives_its_experts(model: Path) -> None:
    """Weight 1 is the prior's choice, weight 0 the prompt's own."""
    engine, prompt, other = Engine(model), tiny_prompt(48, 1), tiny_prompt(48, 7)
    prior = engine.score_samples(Calibration([other]))

    def answer(**options: object) -> list[list[int]]:
        engine.generate(prompt, sparsity=0.5, rest="drop", max_new_tokens=2, do_sample=False, **options)
        return [experts.tolist() for layer in engine.kept_neurons() for experts in layer]

    own = answer(prior="off")
    assert answer(prior=prior, prior_weight=0.0) == own
    theirs = answer(prior=prior, prior_weight=1.0)
    assert theirs == [experts.tolist() for experts in oracle.experts(oracle.load(model), other, 0.5)]
    assert theirs != own
    assert answer(prior=prior, prior_weight=0.5) not in (own, theirs)
    assert answer(prior=engine.score_samples(Calibration([prompt])), prior_weight=1.0) == own


def test_what_a_prior_is_of_is_in_the_report(llama: Path) -> None:
    engine = Engine(llama)
    prior = engine.score_samples(Calibration(SAMPLES))
    report = engine.generate(tiny_prompt(), sparsity=0.5, rest="drop", fold=False, max_new_tokens=2, prior=prior).report
    facts, weight = report.to_json()["prior"], weight_at(len(tiny_prompt()))
    assert facts["key"]
    del facts["key"]
    assert facts == {"model": "llama", "score": "griffin", "seed": 0, "samples": 3, "tokens": 101, "weight": weight}
    assert ("prior", f"score griffin of 3 samples, weight {weight:.2g}") in report.rows()
    assert (
        "prior" not in engine.generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=2).report.to_json()
    )


def test_a_prior_where_it_cannot_act(llama: Path, tmp_path: Path) -> None:
    engine = Engine(llama)
    prior = engine.score_samples(Calibration(SAMPLES))
    with pytest.raises(OptionError, match="all of them are kept"):
        engine.generate(tiny_prompt(), sparsity=0.0, prior=prior)
    with pytest.raises(OptionError, match="'random' uses no statistic"):
        engine.generate(tiny_prompt(), sparsity=0.5, rest="drop", fold=False, prior=prior, selection="random")
    with pytest.raises(OptionError, match="weight 2 is outside"):
        engine.generate(tiny_prompt(), sparsity=0.5, rest="drop", fold=False, prior=prior, prior_weight=2)
    other = Engine(tiny_checkpoint(tmp_path / "other", "llama", intermediate_size=64))
    with pytest.raises(OptionError, match="the prior is of llama, whose layers are not those of"):
        other.generate(tiny_prompt(), sparsity=0.5, rest="drop", fold=False, prior=prior)


def test_samples_that_make_no_scores(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="score 'best' is not known; known: griffin"):
        Calibration(SAMPLES, "best")
    with pytest.raises(PromptError, match="give at least one"):
        Calibration([], "wanda")
    with pytest.raises(OptionError, match="leave them out"):
        Calibration(SAMPLES, "random")
    with pytest.raises(PromptError, match="is empty"):
        Calibration([[3], []])
    with pytest.raises(PromptError, match=r"has 300 tokens; .* reads at most"):
        Engine(llama).score_samples(Calibration([[3] * 300]))


def test_weights_that_are_no_numbers(llama: Path, tmp_path: Path) -> None:
    """Seen also where no sample passes."""
    whole = oracle.load(llama)
    torch.nn.init.constant_(whole.model.layers[1].mlp.gate_proj.weight, float("inf"))
    whole.save_pretrained(shutil.copytree(llama, tmp_path / "broken"))
    engine = Engine(tmp_path / "broken")
    with pytest.raises(NumericError, match=r"the scores of model.layers.1.mlp.down_proj are NaN or infinite"):
        engine.score_samples(Calibration(score="magnitude"))
    with pytest.raises(NumericError, match="gate_proj"):
        engine.score_samples(Calibration(SAMPLES, "wanda"))


# A static model


@pytest.mark.parametrize("fold", [False, True])
def test_one_text_gives_the_model_that_this_prompt_gives(model: Path, tmp_path: Path, fold: bool) -> None:
    if model.name in ("gemma4_text", "gpt_oss"):
        pytest.skip("no export has a config for it")
    engine, prompt = Engine(model), tiny_prompt(48, 1)
    engine.export(prompt, tmp_path / "prompt", prompt_text="x", fold=fold, prior="off", sparsity=0.5)
    _, prior = engine.export_static(Calibration([prompt]), tmp_path / "static", sparsity=0.5, fold=fold)
    for one in (tmp_path / "prompt").glob("*.safetensors"):
        assert (tmp_path / "static" / one.name).read_bytes() == one.read_bytes()
    assert all(map(torch.equal, flat(prior), flat(engine.score_samples(Calibration([prompt])))))


@pytest.mark.parametrize("score", ["griffin", "wanda"])
def test_the_experts_are_those_of_the_largest_sums(score: str, llama: Path, tmp_path: Path) -> None:
    engine = Engine(llama)
    exported, prior = engine.export_static(Calibration(SAMPLES, score), tmp_path / "out", sparsity=0.75, fold=False)
    assert exported.path == tmp_path / "out"
    loaded, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(facts.values()), facts
    experts = json.loads((tmp_path / "out" / "griffin.json").read_text())["experts"]
    whole = oracle.load(llama)
    pairs = zip(oracle.decoder_layers(whole), oracle.decoder_layers(loaded), flat(prior), experts, strict=True)
    for full, small, scores, chosen in pairs:
        assert chosen == sorted(scores.topk(24).indices.tolist())
        assert torch.equal(small.mlp.down_proj.weight, full.mlp.down_proj.weight[:, chosen])


def test_magnitude_and_random_models_need_no_text(llama: Path, tmp_path: Path) -> None:
    engine = Engine(llama)
    engine.export_static(Calibration(score="magnitude"), tmp_path / "static")
    engine.export(tiny_prompt(), tmp_path / "prompt", prompt_text="x", fold=False, prior="off", selection="magnitude")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("static", "prompt")]
    assert weights[0] == weights[1]
    engine.export_static(Calibration(score="random", seed=3), tmp_path / "random")
    facts = json.loads((tmp_path / "random" / "griffin.json").read_text())
    assert facts["method"] == "random neurons, static"
    assert facts["calibration"] == {"score": "random", "seed": 3, "samples": 0, "tokens": 0}
    assert len(set(map(tuple, facts["experts"]))) == 3


def test_what_chose_the_neurons_is_on_the_card(llama: Path, tmp_path: Path) -> None:
    engine = Engine(llama)
    rows = [{"question": f"How many is {i} and 1?", "answer": str(i + 1)} for i in range(9)]
    sources = [CalibrationText("a.txt", text_paragraph(), 0.75), CalibrationText("b.jsonl", rows, 0.25)]
    drawn = draw_samples(
        lambda text: engine.encode(text, raw=True), sources, samples=4, tokens=64, seed=5, bos=BOS_ID, form="qa"
    )
    assert all(ids[0] == BOS_ID and len(ids) <= 64 for ids in drawn.ids)
    engine.export_static(Calibration(drawn.ids, "wanda", 5, drawn.facts), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "griffin.json").read_text())
    assert told["method"] == "Wanda of whole neurons (after arXiv:2306.11695), static"
    assert "prompt_sha256" not in told
    calibration = told["calibration"]
    assert (calibration["score"], calibration["seed"], calibration["samples"]) == ("wanda", 5, 4)
    assert calibration["tokens"] == sum(map(len, drawn.ids))
    assert [(text["file"], text["share"], text["samples"]) for text in calibration["texts"]] == [
        ("a.txt", 0.75, 3),
        ("b.jsonl", 0.25, 1),
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "pruned for any prompt",
        "score `wanda`, measured on 4 samples",
        f"`b.jsonl`: 1 samples of the form qa, {calibration['texts'][1]['tokens']} tokens, share 0.25",
        *(text["sha256"] for text in calibration["texts"]),
        "- seed: 5",
        "How to load",
    ):
        assert fact in card
    assert "one prompt" not in card


def test_a_prior_beside_the_prompt_of_an_export(llama: Path, tmp_path: Path) -> None:
    engine, prompt = Engine(llama), tiny_prompt()
    prior = engine.score_samples(Calibration(SAMPLES))
    engine.export(prompt, tmp_path / "prior", prompt_text="x", fold=False, prior=prior, prior_weight=1.0)
    engine.export_static(Calibration(SAMPLES), tmp_path / "static")
    engine.export(prompt, tmp_path / "alone", prompt_text="x", fold=False, prior="off")
    facts = [json.loads((tmp_path / name / "griffin.json").read_text()) for name in ("prior", "static", "alone")]
    assert facts[0]["experts"] == facts[1]["experts"] != facts[2]["experts"]
    assert facts[0]["prior"] == {**prior.facts, "weight": 1.0}
    assert "by a prior (`prior` in `griffin.json`, weight 1)" in (tmp_path / "prior" / "README.md").read_text()
    assert "prior" not in facts[2]


def test_as_gguf(llama: Path, tmp_path: Path) -> None:
    engine = Engine(llama)
    for name, static in (("one", Calibration([tiny_prompt()])), ("wanda", Calibration(SAMPLES, "wanda"))):
        engine.export_static(static, tmp_path / f"{name}.gguf", format="gguf", sparsity=0.5, fold=False)
    engine.export(
        tiny_prompt(), tmp_path / "prompt.gguf", prompt_text="x", fold=False, prior="off", format="gguf", sparsity=0.5
    )
    fields = {name: read_gguf(tmp_path / f"{name}.gguf", name).fields for name in ("one", "wanda", "prompt")}
    assert json.loads(fields["wanda"]["griffin.calibration"])["score"] == "wanda"
    assert fields["wanda"]["general.name"] == "llama, pruned for any prompt"
    assert "griffin.calibration" not in fields["prompt"]

    def answer(name: str) -> list[int]:
        return Engine(tmp_path / f"{name}.gguf").generate(tiny_prompt(), sparsity=0.0, max_new_tokens=12).token_ids

    assert answer("one") == answer("prompt") != answer("wanda")


def test_nothing_is_left_where_nothing_is_chosen(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="sparsity 0 keeps every neuron"):
        Engine(llama).export_static(Calibration(SAMPLES), tmp_path / "out", sparsity=0.0)
    with pytest.raises(PromptError, match="300 tokens"):
        Engine(llama).export_static(Calibration([[3] * 300]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Where states wait


def test_states_that_wait_on_disk_come_back_as_they_were(model: Path, tmp_path: Path) -> None:
    engine = Engine(model)
    inside = engine.score_samples(Calibration(SAMPLES), host_memory="1GiB")
    for room in (0, 2 * 4 * 32 * 60):  # none, and the first sample or more of them
        outside = engine.score_samples(Calibration(SAMPLES), host_memory=room)
        assert all(map(torch.equal, flat(inside), flat(outside)))


def test_on_disk_is_what_has_no_room(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state and the embedding of each: tokens x 32 float32."""
    seen: list[int] = []
    close = Spill.close
    monkeypatch.setattr(Spill, "close", lambda self: (seen.append(self.on_disk), close(self)))
    engine = Engine(llama)
    of_a_token = 2 * 32 * 4
    for room in (0, 48 * of_a_token - 1, 48 * of_a_token, 68 * of_a_token, 200 * of_a_token):
        engine.export_static(Calibration(SAMPLES), tmp_path / "out", host_memory=room, force=True)
    assert seen == [tokens * of_a_token for tokens in (101, 101 - 20, 101 - 48, 33, 0)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_read(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(1000))
    with pytest.raises(GriffinError, match=r"the hidden states need 64 MiB in .*, which has 1000 B free"):
        Engine(llama).export_static(Calibration(SAMPLES), tmp_path / "out", host_memory=0)


MEASURE = """
import json, sys, torch
from griffin_offload import Engine
from griffin_offload.memory.measure import PeakMeter
from griffin_offload.offload.neuron_scores import find_room
from griffin_offload.pruning.calibration import Calibration
from griffin_offload.planning.plan import choose_plan
from dataclasses import replace
from pathlib import Path

torch.set_num_threads(1)
folder, room, count, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
engine = Engine(folder, device_memory="4GiB")
static = Calibration([[3 + (7 * i + 11 * j) % 297 for i in range(tokens)] for j in range(count)])
request = replace(engine.opened.request(tokens, 1), export=True)
request, _ = find_room(engine.skeleton.layout, request, static, int(room), Path("."))
plan = choose_plan(engine.sizes, request, 0.0, "m").peak
meter = PeakMeter("cpu")
engine.score_samples(static, host_memory=room)
print(json.dumps([plan, meter.peak()]))
"""


def test_the_peak_stays_below_the_plan_and_falls_with_states_on_disk(tmp_path: Path) -> None:
    """320 samples whose states are 78 MiB."""
    sizes = {"hidden_size": 128, "intermediate_size": 64, "max_position_embeddings": 512, "num_hidden_layers": 2}
    folder = tiny_checkpoint(tmp_path / "m", "llama", **sizes)

    def peak(room: int) -> int:
        command = [sys.executable, "-c", MEASURE, str(folder), str(room), "320", "250"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        plan, measured = json.loads(done.stdout)
        assert measured <= plan
        return int(measured)

    inside, outside = peak(2**30), peak(0)
    assert inside - outside > 25 * MIB  # less of it shows where the machine is short of memory


# The command


BESIDE = " cannot be combined with --calibration"


@pytest.fixture
def run(llama: Path, tmp_path: Path) -> Callable[..., Result]:
    (tmp_path / "t.txt").write_text(text_paragraph())
    (tmp_path / "q.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"prompt": "b"}\n')

    def run(*arguments: Any, name: str = "export-pruned") -> Result:
        words = [
            str(tmp_path / word) if str(word).startswith(("t.txt", "q.", "bad", "out", "p.")) else str(word)
            for word in arguments
        ]
        return CliRunner().invoke(griffin, [name, "--model", str(llama), *words])

    return run


def test_calibrate_save_and_use_a_prior(run: Callable[..., Result], tmp_path: Path, llama: Path) -> None:
    sizes = ("--samples", "6", "--tokens", "64", "--seed", "2")
    result = run("--calibration", "t.txt:3", "--calibration", "q.jsonl:1", *sizes, "--prior-out", "p.st", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert [text["samples"] for text in told["texts"]] == [5, 1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("out", "p."))] == ["p.st"]
    both = run("--calibration", "t.txt", *sizes, "--prior-out", "p.two", "--out", "out")
    assert both.exit_code == 0, both.stderr
    facts = json.loads((tmp_path / "out" / "griffin.json").read_text())["calibration"]
    assert {**load_prior(tmp_path / "p.two").facts, **facts} == load_prior(tmp_path / "p.two").facts
    assert str(tmp_path) not in (tmp_path / "out" / "griffin.json").read_text()

    answer = ("--prompt", "Alice", "--raw", "--sparsity", "0.5", "--greedy", "--max-new-tokens", "4", "--json")
    found = run(*answer, "--prior", "p.st", "--prior-weight", "0.4", name="generate")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["prior"]["weight"] == 0.4
    assert "prior" in found.stderr
    exported = run("--prompt", "Alice", "--prior", "p.st", "--out", "out2")
    assert exported.exit_code == 0, exported.stderr
    assert json.loads((tmp_path / "out2" / "griffin.json").read_text())["prior"]["samples"] == 6


def test_too_few_texts_are_told(run: Callable[..., Result]) -> None:
    result = run("--calibration", "q.jsonl", "--samples", "3", "--prior-out", "p.st")
    assert result.exit_code == 0, result.stderr
    assert "q.jsonl makes 1 samples of up to 255 tokens, not 3" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--calibration", "t.txt"], 2, "--out"),
        (["--calibration", "t.txt", "--out", "out", "--prompt", "a"], 2, "--prompt" + BESIDE),
        (["--calibration", "t.txt", "--out", "out", "--raw"], 2, "--raw" + BESIDE),
        (["--calibration", "t.txt", "--out", "out", "--selection", "random"], 2, "--selection" + BESIDE),
        (["--calibration", "t.txt", "--out", "out", "--prior", "p.st"], 2, "--prior" + BESIDE),
        (["--calibration", "t.txt", "--out", "out", "--score", "random"], 2, "leave out --calibration"),
        (["--calibration", "t.txt", "--out", "out", "--score", "best"], 2, "'best' is not one of"),
        (["--prompt", "a", "--out", "out", "--host-memory", "1GiB"], 2, "--host-memory needs --calibration FILE"),
        (["--calibration", "t.txt", "--out", "out", "--samples", "2", "--host-memory", "some"], 1, "some"),
        (["--score", "wanda", "--out", "out"], 2, "needs --calibration FILE"),
        (["--prompt", "a", "--out", "out", "--samples", "3"], 2, "--samples needs --calibration FILE"),
        (["--prompt", "a", "--out", "out", "--prior-out", "p.st"], 2, "needs --calibration FILE"),
        (
            ["--prompt", "a", "--out", "out", "--prior", "off", "--prior-weight", "0.5"],
            2,
            "--prior-weight needs --prior auto, or a file",
        ),
        (["--prompt", "a", "--out", "out", "--prior", "p.st"], 1, "p.st does not exist"),
        (["--calibration", "out.txt", "--out", "out"], 1, "out.txt: no such file"),
        (["--calibration", "t.txt:0", "--out", "out"], 1, "the share 0 of t.txt is not above 0"),
        (["--calibration", "bad.jsonl", "--out", "out"], 1, "bad.jsonl, line 2"),
        (["--calibration", "t.txt", "--out", "out", "--samples", "0"], 2, "0 is not in the range"),
        (["--calibration", "t.txt", "--out", "out", "--tokens", "1"], 1, "at least 2"),
        (["--calibration", "t.txt", "--out", "out", "--tokens", "999"], 1, "reads at most"),
        (["--calibration", "t.txt", "--out", "out", "--calibration-format", "qa"], 1, "needs rows"),
        (["--calibration", "t.txt", "--out", "out", "--samples", "2", "--sparsity", "0"], 1, "nothing to choose"),
        (["--calibration", "t.txt", "--prior-out", "t.txt"], 1, "t.txt exists"),
        (["--calibration", "t.txt", "--samples", "2", "--out", "t.txt"], 1, "is a file"),
    ],
)
def test_a_bad_option_is_one_line(
    run: Callable[..., Result], tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    before = sorted(tmp_path.iterdir())
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert words in result.stderr
    assert sorted(tmp_path.iterdir()) == before
