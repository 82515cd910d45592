"""Blocks that a prompt leaves out, against plain transformers with z at zero."""

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import Case
from engines import copying
from skipping import TOKENS, greedy, leaving, prompt_similarity
from tiny import TINY, tiny_prompt
from torch import Tensor
from transformers import AutoModelForCausalLM

from griffin_offload import Engine
from griffin_offload.checkpoint.gguf.header import read_gguf
from griffin_offload.engine import Answer
from griffin_offload.errors import OptionError
from griffin_offload.offload.skip_by_prompt import check_skip
from griffin_offload.options import FfnSkip
from griffin_offload.pruning.ffn_skip import most_saturated


def mixes(engine: Engine) -> bool:
    blocks = [layer.blocks for layer in engine.skeleton.layers]
    return any(len(found) > 1 or block.routed for found in blocks for block in found)


def test_types_whose_similarity_cannot_be_told_are_refused_and_no_others(every: Case) -> None:
    """What leaves a layer, less what its last module puts out, is what leaves it when its block has no z."""
    engine = Engine(every.folder)
    if mixes(engine):
        with pytest.raises(OptionError, match="one plain feed-forward block"):
            check_skip(engine.skeleton.layout, FfnSkip(0.25))
        return
    model, prompt = every.model, tiny_prompt(20)
    told = True
    for block in oracle.blocks(model):
        seen = entering(model, prompt, block.layer)
        bare = leaving(model, prompt, None, set(), block.layer, bare=True)
        told = told and bool((seen - bare).abs().max() < 1e-4 * bare.abs().max())
    if told:
        check_skip(engine.skeleton.layout, FfnSkip(0.25))
    else:
        with pytest.raises(OptionError, match="leave it out"):
            check_skip(engine.skeleton.layout, FfnSkip(0.25))


@torch.no_grad()
def entering(model: Any, prompt: list[int], number: int) -> Tensor:
    """(T, D), as griffin_offload.model.hooks.Residual takes it to be."""
    added: list[Tensor] = []
    out: list[Tensor] = []
    layer = oracle.decoder_layers(model)[number]
    hooks = [m.register_forward_hook(lambda _, a, o: added.append(first(o))) for m in layer.children()]
    hooks.append(layer.register_forward_hook(lambda _, a, o: out.append(first(o))))
    oracle._forward(model, prompt, None)
    for hook in hooks:
        hook.remove()
    return (out[0] - added[-1].reshape(out[0].shape))[0]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_every_type_of_the_list_is_tried() -> None:
    from griffin_offload.model.architecture import ARCHITECTURES

    listed = {name for name, known in ARCHITECTURES.items() if known.similarity is not True}
    assert listed <= {config.get("model_type", name) for name, config in TINY.items()}


def by_prompt(share: float, cold: tuple[int, int] = (1, 1)) -> FfnSkip:
    return FfnSkip(share, "prompt", cold)


def experts_left(model: Any, prompt: list[int], skip: FfnSkip, sparsity: float) -> tuple[list[int], list[Tensor]]:
    """The blocks that the prompt leaves out, and the experts of all."""
    skipped = most_saturated(prompt_similarity(model, prompt).mean(0), skip)
    experts = oracle.experts(model, prompt, sparsity)
    return skipped, [e[:0] if block in skipped else e for block, e in enumerate(experts)]


def assert_equals_oracle(engine: Engine, folder: Path, prompt: list[int], skip: FfnSkip, sparsity: float) -> list[int]:
    model = oracle.load(folder)
    skipped, experts = experts_left(model, prompt, skip, sparsity)
    expected, _ = oracle.masked_generate(model, prompt, experts, TOKENS)
    found = greedy(engine, prompt, skip, sparsity)
    report = found.report
    assert report.skipped
    assert [block for block, share in enumerate(report.skipped.by_layer) if share] == skipped
    assert [layer.kept for layer in report.plan.layers] == [len(e) for e in experts]
    assert found.token_ids == expected
    assert_resident_as_planned(engine, found)
    return skipped


def assert_resident_as_planned(engine: Engine, found: Answer) -> None:
    """The blocks' tensors that are resident, and the plan's bytes: exact where no tensor is padded."""
    plan = found.report.plan
    for layer, sizes, planned in zip(engine.skeleton.layers, engine.sizes.layers, plan.layers, strict=True):
        there = [engine.skeleton.model.get_parameter(layer.prefix + name) for name in layer.neuron_tensors]
        assert sum(p.nbytes for p in there) == sizes.blocks[0].bytes(planned.kept)
        assert (planned.kept == 0) == (sum(p.numel() for p in there) == 0)
    assert plan.resident_bytes == engine.sizes.outer + sum(layer.resident_bytes for layer in plan.layers)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("share", [1 / 3, 0.5, 1.0])
def test_a_prompt_leaves_out_its_most_saturated_blocks(deep: Path, share: float, sparsity: float) -> None:
    assert_equals_oracle(Engine(deep), deep, tiny_prompt(), by_prompt(share), sparsity)


@pytest.mark.parametrize("make", [Engine, copying, lambda folder: Engine(folder, host_memory="1MiB")])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_the_next_prompt_leaves_out_others(llama: Path, sparsity: float, make: Any) -> None:
    engine, seen = make(llama), set()
    for seed in range(5):
        before = engine.resident.layers
        prompt = tiny_prompt(20 + seed, seed)
        seen.add(tuple(assert_equals_oracle(engine, llama, prompt, by_prompt(1 / 3), sparsity)))
        assert not before or before is engine.resident.layers, "what stays is not read again"
    assert len(seen) > 1, "the test would say nothing"
    full = oracle.full_generate(oracle.load(llama), tiny_prompt(), TOKENS)[0]
    assert greedy(engine, tiny_prompt(), None).token_ids == full
    assert_equals_oracle(engine, llama, tiny_prompt(), by_prompt(0.5, (0, 0)), sparsity)
    assert_equals_oracle(engine, llama, tiny_prompt(), by_prompt(0.5, (2, 1)), sparsity)


def test_memory_is_not_taken_for_the_blocks_that_go(llama: Path) -> None:
    engine = Engine(llama)
    full = engine.plan(40, 8, sparsity=0.0)
    plan = engine.plan(40, 8, sparsity=0.0, skip=by_prompt(0.5))
    block = engine.sizes.layers[0].blocks[0].bytes(96)
    assert full.resident_bytes - plan.resident_bytes == 3 * block
    assert full.bytes_per_token - plan.bytes_per_token == 3 * block


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_packed_blocks_move_too(llama: Path, dtype: str) -> None:
    """What moved from slot to slot is what is packed where it belongs from the beginning."""
    engine, skip = Engine(llama), by_prompt(1 / 3)
    found = {seed: greedy(engine, tiny_prompt(30, seed), skip, 0.5, resident_dtype=dtype) for seed in range(4)}
    for seed, generation in found.items():
        kept = [layer.kept / layer.neurons for layer in generation.report.plan.layers]
        alone = Engine(llama)
        sparsities = tuple(1 - share for share in kept)
        assert greedy(alone, tiny_prompt(30, seed), None, sparsities, resident_dtype=dtype).token_ids == (
            generation.token_ids
        )
    assert len({tuple(g.report.skipped.by_layer) for g in found.values() if g.report.skipped}) > 1


def test_a_share_of_no_whole_block_skips_none(llama: Path) -> None:
    engine = Engine(llama)
    found = greedy(engine, tiny_prompt(), by_prompt(0.05))
    assert found.token_ids == greedy(engine, tiny_prompt(), None).token_ids
    assert found.report.skipped
    assert found.report.skipped.share == 0


def test_the_first_tokens_interrupt_leaves_an_engine_that_works(llama: Path) -> None:
    engine = Engine(llama)

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        greedy(engine, tiny_prompt(), by_prompt(0.5), on_layer=interrupt)
    assert_equals_oracle(engine, llama, tiny_prompt(30, 1), by_prompt(0.5), 0.0)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"sparsity": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}, "one sparsity"),
        ({"sparsity": 0.5, "rest": "int8"}, "rest int8 keeps all"),
    ],
)
def test_what_does_not_go_with_empty_blocks_is_refused(llama: Path, how: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Engine(llama).generate(tiny_prompt(), skip=by_prompt(0.5), max_new_tokens=2, **how)


def test_what_fits_is_chosen_without_a_rest(llama: Path) -> None:
    engine = Engine(llama)
    assert engine.plan(20, 8, skip=by_prompt(0.5)).precision.rest is None
    assert engine.generate(tiny_prompt(), skip=by_prompt(0.5), max_new_tokens=2).report.skipped


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_an_export_without_some_blocks_is_the_resident_model(deep: Path, tmp_path: Path, sparsity: float) -> None:
    prompt, skip, out = tiny_prompt(), by_prompt(0.5), tmp_path / "out"
    exported = Engine(deep).export(
        prompt, out, prompt_text="Alice", fold=False, prior="off", sparsity=sparsity, skip=skip
    )
    model = oracle.load(deep)
    skipped, experts = experts_left(model, prompt, skip, sparsity)
    assert exported.skipped == tuple(skipped)
    facts = json.loads((out / "griffin.json").read_text())
    assert (facts["ffn_skip"], facts["skipped_layers"]) == (0.5, skipped)
    assert facts["experts"] == [e.tolist() for e in experts]
    assert facts["kept"] == [len(e) for e in experts]
    assert f"of layers {', '.join(map(str, skipped))}," in (out / "README.md").read_text()

    logits, cache = oracle._forward(model, prompt, None)
    smaller = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < TOKENS and tokens[-1] not in oracle.end_tokens(model):
        logits, cache = oracle._forward(smaller, tokens[-1:], cache)
        tokens.append(int(logits[-1].argmax()))
    assert tokens == greedy(Engine(deep), prompt, skip, sparsity).token_ids
    for block in oracle.blocks(smaller):
        assert bool(block.module.weight.any()) == (block.layer not in skipped)


def test_a_gguf_file_without_some_blocks(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    skip = by_prompt(0.5)
    exported = Engine(llama).export(
        tiny_prompt(),
        out,
        prompt_text="Alice",
        fold=False,
        prior="off",
        skip=skip,
        format="gguf",
        gguf_type="f32",
        sparsity=0.5,
    )
    skipped, _ = experts_left(oracle.load(llama), tiny_prompt(), skip, 0.5)
    assert exported.skipped == tuple(skipped)
    kept = read_gguf(out, "out").fields["griffin.kept"]
    assert [i for i, k in enumerate(kept) if k == 0] == skipped
    engine = Engine(out)
    engine.sweep(tiny_prompt(), sparsity=0.0)
    for number, layer in enumerate(engine.skeleton.layers):
        weight = engine.skeleton.model.get_parameter(layer.prefix + layer.blocks[0].down)
        assert bool(weight.any()) == (number not in skipped)


def test_an_export_without_a_whole_block_less_is_the_plain_one(llama: Path, tmp_path: Path) -> None:
    Engine(llama).export(tiny_prompt(), tmp_path / "a", prompt_text="Alice", fold=False, prior="off")
    Engine(llama).export(
        tiny_prompt(), tmp_path / "b", prompt_text="Alice", fold=False, prior="off", skip=by_prompt(0.05)
    )
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_an_export_cannot_skip_by_token(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--ffn-skip-mode prompt"):
        Engine(llama).export(
            tiny_prompt(), tmp_path / "out", prompt_text="Alice", fold=False, prior="off", skip=FfnSkip(0.5)
        )
    assert not list(tmp_path.iterdir())
