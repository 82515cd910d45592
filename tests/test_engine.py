"""The sweep against the oracle: the same experts, logits and tokens, for every architecture and on real models."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from engines import assert_equals_oracle, copying, greedy
from tiny import text_paragraph, tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import BudgetError, NumericError, OptionError, PromptError
from griffin_offload.memory.measure import bytes_read
from griffin_offload.units import MIB


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_equals_the_oracle(tiny: Path, sparsity: float) -> None:
    assert_equals_oracle(tiny, tiny_prompt(), sparsity, Engine(tiny, dtype="float32"))


def test_a_layer_copied_to_its_device_gives_the_same(tiny: Path) -> None:
    assert_equals_oracle(tiny, tiny_prompt(), 0.5, copying(tiny, dtype="float32"))


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_sharded_and_tied_checkpoints(tmp_path: Path, kind: str, tied: bool, shards: int) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind, tied=tied, shards=shards)
    assert_equals_oracle(folder, tiny_prompt(), 0.5, Engine(folder))


def test_a_head_beside_the_table_it_is_tied_to_is_planned_for(tmp_path: Path) -> None:
    """transformers reads both where they differ, and so does the engine: then the plan counts both."""
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint(tmp_path / "m", "llama", tied=True)
    tied = Engine(folder).sizes
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table * 0.5}, folder / "model.safetensors", {"format": "pt"})
    assert Engine(folder).sizes.full == tied.full + table.nbytes


def test_opt_with_its_norm_behind(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "opt", do_layer_norm_before=False)
    assert_equals_oracle(folder, tiny_prompt(), 0.5, Engine(folder))


def test_a_prompt_of_one_token(tiny: Path) -> None:
    assert_equals_oracle(tiny, tiny_prompt(1), 0.5, Engine(tiny))


def test_the_next_prompt_swaps_the_experts_in_place(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    engine = Engine(folder)
    for seed in range(3):
        assert_equals_oracle(folder, tiny_prompt(40, seed), 0.5, engine)
    assert_equals_oracle(folder, tiny_prompt(40), 0.25, engine)
    assert_equals_oracle(folder, tiny_prompt(40), 0.0, engine)
    generation, _ = greedy(engine, tiny_prompt(30), 0.0)  # all is resident: nothing to read
    assert generation.token_ids == oracle.full_generate(oracle.load(folder), tiny_prompt(30), 24)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_in_another_dtype_are_rounded_as_transformers_does(
    tmp_path: Path, stored: torch.dtype, dtype: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=stored)
    engine = Engine(folder, dtype=dtype)
    engine.generate(tiny_prompt(), sparsity=0, max_new_tokens=1)
    expected = oracle.load(folder, getattr(torch, dtype)).state_dict()
    actual = engine.skeleton.model.state_dict()
    assert actual.keys() == expected.keys()
    held = {name: tensor for name, tensor in expected.items() if name != engine.skeleton.layout.table}
    assert all(torch.equal(actual[name], tensor) for name, tensor in held.items())


def test_the_cache_after_the_sweep_equals_the_resident_one(tiny: Path) -> None:
    engine, prompt = Engine(tiny), tiny_prompt()
    output = engine.sweep(prompt, sparsity=0.5, method="griffin")
    with torch.no_grad():
        expected = oracle.load(tiny)(torch.tensor([prompt]), use_cache=True)
    torch.testing.assert_close(output.logits[0, -1], expected.logits[0, -1], rtol=0, atol=1e-4)
    for ours, theirs in zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


def test_options_that_generate_refuses(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama"))
    for options in ({"temperature": -1.0, "do_sample": True}, {"no_such_option": 1}, {"num_beams": 2}):
        with pytest.raises(OptionError):
            engine.generate(tiny_prompt(), max_new_tokens=2, **options)
    for sparsity in (-0.1, 1.01, float("nan")):
        with pytest.raises(OptionError, match="outside its range"):
            engine.generate(tiny_prompt(), sparsity=sparsity, method="griffin")
    with pytest.raises(OptionError, match="max_new_tokens 0 is outside its range"):
        engine.generate(tiny_prompt(), max_new_tokens=0)
    assert greedy(engine, tiny_prompt(), 0.5)[0].token_ids  # and it still works


def test_a_seed_repeats_a_sampled_answer(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama"))
    answers = [
        engine.generate(
            tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=20, do_sample=True, seed=seed
        ).token_ids
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_with_a_seed_each_prompt_draws_as_if_it_were_alone(tmp_path: Path, sparsity: float) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama"))
    prompts = [[*tiny_prompt(30), *tiny_prompt(length, seed=length)] for length in (5, 9, 2)]
    options = {"sparsity": sparsity, "method": "griffin", "max_new_tokens": 8, "do_sample": True, "seed": 3}
    alone = [engine.generate(prompt, **options).token_ids for prompt in prompts]
    for shared in (0, 30):
        found = engine.generate_batch(prompts, per_prompt=True, shared=shared, **options)
        assert [answer.token_ids for answer in found] == alone
    engine.unload()  # and where the model is read for it
    assert [answer.token_ids for answer in engine.generate_batch(prompts, per_prompt=True, **options)] == alone


def test_prompts_at_the_edges_of_the_context(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama"))
    with pytest.raises(PromptError, match="empty"):
        engine.generate([])
    with pytest.raises(PromptError, match="at most 256"):
        engine.generate(tiny_prompt(256))
    generation = engine.generate(tiny_prompt(250), sparsity=0.5, method="griffin", max_new_tokens=50, do_sample=False)
    assert len(generation.token_ids) == 6
    assert generation.finish_reason == "length"


def test_streamed_text_is_the_text(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama", seed=3))
    pieces: list[str] = []
    for seed in range(4):
        pieces.clear()
        generation = engine.generate(
            tiny_prompt(), max_new_tokens=60, on_text=pieces.append, do_sample=True, temperature=3.0, seed=seed
        )
        assert "".join(pieces) == generation.text
    assert len(pieces) > 3


def test_progress_by_layer(tmp_path: Path) -> None:
    engine, seen = Engine(tiny_checkpoint(tmp_path / "m", "llama")), []
    engine.generate(
        tiny_prompt(),
        sparsity=0.5,
        method="griffin",
        max_new_tokens=2,
        on_layer=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_interrupted_in_the_sweep_and_in_the_answer(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    engine = Engine(folder)

    def stop_in_layer_2(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(tiny_prompt(), sparsity=0.5, method="griffin", on_layer=stop_in_layer_2)
    assert_equals_oracle(folder, tiny_prompt(), 0.5, engine)

    heard: list[str] = []

    def stop_at_the_third_piece(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise KeyboardInterrupt

    generation = engine.generate(
        tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=50, on_text=stop_at_the_third_piece
    )
    assert generation.finish_reason == "interrupted"
    assert 3 <= len(generation.token_ids) < 50
    assert_equals_oracle(folder, tiny_prompt(), 0.5, engine)


def test_stop_string(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama"))
    whole, _ = greedy(engine, tiny_prompt(), 0.5, 30)
    stop = whole.text[8:10]
    generation = engine.generate(
        tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=30, do_sample=False, stop_strings=[stop]
    )
    assert generation.finish_reason == "stop"
    assert len(generation.token_ids) < 30
    assert whole.text.startswith(generation.text)
    assert stop in generation.text


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_nan_weights_are_named(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint(tmp_path / "m", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors[name][tiny_prompt()[0] % len(tensors[name])] = float("nan")  # of the table, a row that is looked up
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match=rf"model.safetensors: {name} holds NaN"):
        Engine(folder).generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=2)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_an_untied_table_stays_in_its_file(tmp_path: Path, kind: str) -> None:
    """Only the rows of the prompt and of the answer are read; logits and tokens are the same."""
    folder = tiny_checkpoint(tmp_path / "m", kind, tie_word_embeddings=False)
    engine, prompt = Engine(folder, dtype="float32"), tiny_prompt()
    table = engine.skeleton.layout.table
    assert table is not None
    size = oracle.load(folder).get_parameter(table).nbytes
    generation = engine.generate(prompt, sparsity=0, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generation.report.bytes_read < engine.checkpoint.bytes - size / 2
    assert engine.sizes.full - engine.sizes.resident(engine.sizes.kept(0)) == size
    whole = oracle.load(folder)
    ids = torch.tensor([prompt + generation.token_ids[:-1]])
    assert whole(ids).logits[0, len(prompt) - 1 :].argmax(-1).tolist() == generation.token_ids
    assert engine.skeleton.model.get_parameter(table).shape[0] == 1  # the last token's row
    tied = Engine(tiny_checkpoint(tmp_path / "tied", kind, tie_word_embeddings=True))
    assert tied.skeleton.layout.table is None


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not list open files")
def test_an_engine_that_is_gone_leaves_no_file_open(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")

    def opened() -> int:
        return sum(str(folder) in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    engine = Engine(folder)
    engine.generate(tiny_prompt(), max_new_tokens=2, min_new_tokens=2)
    assert opened() == 1  # for the table's rows
    del engine
    gc.collect()
    assert opened() == 0


def test_an_overflow_of_float16_is_told(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint(tmp_path / "m", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    Engine(folder).generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=2)
    with pytest.raises(NumericError, match=r"float16.*try --dtype"):
        Engine(folder, dtype="float16").generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=2)


def test_the_json_object(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    generation, _ = greedy(Engine(folder), tiny_prompt(), 0.5)
    found = json.loads(json.dumps(generation.to_json()))
    assert found["model_path"] == str(folder)
    assert found["experts"] == {"kept_per_layer": [48, 48, 48], "layers": 3}
    assert found["io"]["checkpoint_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["memory"]["resident_bytes"] < found["memory"]["full_bytes"]


# The real models.


@pytest.mark.real
@pytest.mark.parametrize("model", ["smol", "gemma"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_real_model_equals_the_oracle(request: pytest.FixtureRequest, model: str, sparsity: float) -> None:
    folder = request.getfixturevalue(model)
    engine = Engine(folder, dtype="float32")
    assert_equals_oracle(folder, engine.encode(text_paragraph(200), raw=True), sparsity, engine, tokens=16)


@pytest.mark.real
@pytest.mark.skipif(bytes_read() is None, reason="this system does not count a process's reads")
def test_every_byte_is_read_once(smol: Path) -> None:
    engine = Engine(smol)
    prompt = engine.encode(text_paragraph(60))
    before = bytes_read()
    generation = engine.generate(prompt, sparsity=0.5, method="griffin", max_new_tokens=8)
    total = generation.report.checkpoint_bytes
    assert 0.98 * total < bytes_read() - before <= 1.02 * total


@pytest.mark.real
def test_pruned_takes_less_than_full_and_each_stays_inside_its_plan(smol: Path) -> None:
    """Each in a process of its own, with a budget of just what it was planned to need."""
    peaks = []
    for sparsity in (0.75, 0.0):
        program = (
            "import sys; from griffin_offload import Engine; from tiny import text_paragraph\n"
            "engine = Engine(sys.argv[1]); ids = engine.encode(text_paragraph(200)); s = float(sys.argv[2])\n"
            "engine.budget = engine.plan(len(ids), 32, sparsity=s, method='griffin').peak\n"
            "report = engine.generate(ids, sparsity=s, method='griffin', max_new_tokens=32).report\n"
            "print(report.measured_peak, report.plan.peak)"
        )
        command = [sys.executable, "-c", program, str(smol), str(sparsity)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        measured, planned = map(int, result.stdout.split())
        assert 0.7 * planned < measured <= planned
        peaks.append(measured)
    assert peaks[0] < peaks[1]  # by 114 MiB, of which the system may take back code that has not run lately


def griffin(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own: what it holds is what it needs."""
    command = [sys.executable, "-c", "from griffin_offload.cli.main import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.real
def test_what_does_not_fit_is_refused_and_what_is_suggested_works(smol: Path) -> None:
    generate = ["generate", "--model", str(smol), "--prompt", text_paragraph(100), "--max-new-tokens", "16", "--json"]
    facts = griffin("mem-report", "--model", str(smol), "--sparsity", "0.4", "--json")
    budget = f"{json.loads(facts.stdout)['peak_bytes'] // MIB}MiB"  # room for that, not for the whole
    refused = griffin(*generate, "--sparsity", "0", "--device-memory", budget)
    assert refused.returncode == 1
    assert not refused.stdout
    found = re.fullmatch(
        r"error: .* at sparsity 0 needs .*It fits with (--sparsity 0\.\d+), the rest in int4, "
        r"or with (--device-memory \d+MiB)\n",
        refused.stderr,
    )
    for suggestion in (f"{found[1]} --device-memory {budget}", f"--sparsity 0 {found[2]}"):
        result = griffin(*generate, *suggestion.split())
        assert result.returncode == 0, result.stderr
        memory = json.loads(result.stdout)["memory"]
        assert memory["measured_peak_bytes"] <= memory["budget_bytes"]


@pytest.mark.real
def test_where_nothing_fits_no_weight_is_read(smol: Path) -> None:
    engine = Engine(smol, device_memory="100MiB")
    before = bytes_read()
    with pytest.raises(BudgetError, match=r"needs at least .* 75% dropped"):
        engine.generate(engine.encode("Hello"))
    assert bytes_read() is None or bytes_read() - before < MIB
