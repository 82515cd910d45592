"""Layers on several devices that are not there: the answers of one device, and no operator that mixes two."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from engines import assert_equals_oracle, copying, reading_threads
from griffin_offload.cli.mem_report import last_rows
from safetensors.torch import load_file
from tiny import tiny_prompt
from torch import Tensor
from turns import FIRST, SECOND, THIRD, WHOLE, assert_as_whole, told, turn
from two_cards import KIND, make_devices

from griffin_offload import Engine
from griffin_offload.checkpoint.which_files import SINGLE
from griffin_offload.errors import OptionError
from griffin_offload.model import hops
from griffin_offload.offload.saved_turns import pack, unpack
from griffin_offload.options import FfnSkip
from griffin_offload.planning import cards
from griffin_offload.planning.request import Card
from griffin_offload.pruning.calibration import Calibration
from griffin_offload.units import GIB, KIB, format_bytes

KINDS = ("llama", "gemma3_text", "opt", "mixtral", "gpt2", "gemma4_text", "lfm2")
PAPER: dict[str, Any] = {"sparsity": 0.5, "method": "griffin"}


make_devices()


@pytest.fixture
def on_three(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """on_three(folder, 1, 2, 3): an engine with layer 0 on the CPU, 1 and 2 on devices that are not there."""

    def make(folder: Path, *ends: int, **options: Any) -> Engine:
        monkeypatch.setattr(cards, "spans", lambda *_: list(ends))
        engine = copying(folder, dtype="float32", **options)
        names = ("cpu", *(f"{KIND}:{number}" for number in range(1, len(ends))))
        budgets = (8 * GIB + end * KIB for end in ends)  # plans are kept by their requests
        found = tuple(Card(name, budget) for name, budget in zip(names, budgets, strict=True))
        engine.opened = replace(engine.opened, cards=found)
        return engine

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_the_oracles_answers(
    case: Callable[[str], Case], on_three: Callable[..., Engine], kind: str, sparsity: float
) -> None:
    folder = case(kind).folder
    engine = on_three(folder, 1, 2, 3)
    for seed in range(2):  # the second prompt finds what stays
        assert_equals_oracle(folder, tiny_prompt(30, seed), sparsity, engine, tokens=4)
    for number, module in enumerate(engine.skeleton.modules):
        found = {str(tensor.device) for tensor in (*module.parameters(), *module.buffers())}
        assert found == {"cpu" if number == 0 else f"{KIND}:{number}"}


OPTIONS: dict[str, dict[str, Any]] = {
    "all neurons": {"sparsity": 0},
    "a fold": {"sparsity": 0.5, "rest": "drop", "prior": "off"},
    "int8 and int4": {"sparsity": 0.5, "resident_dtype": "int8", "rest": "int4"},
    "lossless": {"sparsity": 0.5, "rest": "drop", "prior": "off", "lossless": True},
    "refreshed": {"sparsity": 0.5, "rest": "drop", "prior": "off", "refresh": 4},
    "skipped by token": {"sparsity": 0, "skip": FfnSkip(0.5, cold=(0, 0), warmup=0)},
    "sampled": {"sparsity": 0.5, "method": "griffin", "temperature": 1.0, "seed": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_every_way_to_answer_is_that_of_one_device(
    case: Callable[[str], Case], on_three: Callable[..., Engine], kind: str, options: dict[str, Any]
) -> None:
    if kind == "mixtral" and "skip" in options:
        pytest.skip("blocks of routed experts are not skipped")
    folder = case(kind).folder
    options = {"max_new_tokens": 10, **({} if "seed" in options else {"do_sample": False}), **options}
    one, several = copying(folder, dtype="float32"), on_three(folder, 1, 2, 3)
    for seed in range(2):
        expected, answer = (engine.generate(tiny_prompt(40, seed), **options) for engine in (one, several))
        assert answer.token_ids == expected.token_ids
        mine, own = answer.report.fidelity, expected.report.fidelity
        assert (mine and (mine.kl, mine.why_not)) == (own and (pytest.approx(own.kl, rel=1e-4), own.why_not))


@pytest.mark.parametrize("per_prompt", [False, True])
def test_prompts_of_several_lengths(
    case: Callable[[str], Case], on_three: Callable[..., Engine], per_prompt: bool
) -> None:
    folder = case("llama").folder
    prompts = [tiny_prompt(length, length) for length in (40, 25, 8)]
    options: dict[str, Any] = {"sparsity": 0.5, "rest": "drop", "prior": "off", "do_sample": False}
    one, several = copying(folder, dtype="float32"), on_three(folder, 2, 3)
    expected, answers = (
        [each.token_ids for each in engine.generate_batch(prompts, per_prompt=per_prompt, max_new_tokens=8, **options)]
        for engine in (one, several)
    )
    assert answers == expected


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "lfm2"])
@pytest.mark.parametrize("options", [PAPER, WHOLE], ids=["pruned", "whole"])
def test_turns_of_a_conversation_and_layers_that_move_between_them(
    case: Callable[[str], Case], on_three: Callable[..., Engine], kind: str, options: dict[str, Any]
) -> None:
    """Of the first turn two layers are on the first device, of the second one: its keys go to the next device."""
    folder = case(kind).folder
    whole, engine = copying(folder, dtype="float32"), on_three(folder, 2, 3)
    first = assert_as_whole(engine, whole, FIRST, **options)
    ids = [*FIRST, *first.token_ids, *SECOND]
    again = assert_as_whole(engine, whole, ids, **options)
    assert told(again).kept_tokens >= len(FIRST) - 16
    assert again.report.plan.ends == (2, 3), "as they were, where that fits"
    moved = on_three(folder, 1, 3).opened.cards
    moved = (replace(moved[0], budget=again.report.plan.cards[0].peak - 1), moved[1])
    engine.opened = replace(engine.opened, cards=moved)
    third = assert_as_whole(engine, whole, [*ids, *again.token_ids, *THIRD], **options)
    assert third.report.plan.ends == (1, 3)
    assert told(third).kept_tokens > len(ids) - 16


def test_the_same_prompt_again_begins_without_a_pass(
    case: Callable[[str], Case], on_three: Callable[..., Engine]
) -> None:
    engine = on_three(case("llama").folder, 2, 3)
    first, _ = turn(engine, FIRST, **PAPER)
    again, _ = turn(engine, FIRST, **PAPER)
    assert told(again).computed_tokens == 0
    assert again.token_ids == first.token_ids


def test_a_session_goes_on_where_its_layers_are_now(
    case: Callable[[str], Case], on_three: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = case("llama").folder
    engine, other = on_three(folder, 2, 3), on_three(folder, 1, 3)
    first, _ = turn(engine, FIRST, **PAPER)
    tensors, facts = pack(engine.resident) or ({}, {})
    facts = json.loads(json.dumps(facts))
    shape = [len(layer.blocks) for layer in other.skeleton.layers]
    unpack(other.resident, other.opened.cache_for, tensors.__getitem__, set(tensors), facts, shape)
    answer = assert_as_whole(other, copying(folder, dtype="float32"), [*FIRST, *first.token_ids, *SECOND], **PAPER)
    assert told(answer).kept_tokens >= len(FIRST) - 16


def test_after_it_all_is_on_the_first_device_again(
    case: Callable[[str], Case], on_three: Callable[..., Engine]
) -> None:
    """What does not answer prompts has the first device alone, also right after an answer over several."""
    folder = case("llama").folder
    one, several = copying(folder, dtype="float32"), on_three(folder, 1, 2, 3)
    several.generate(tiny_prompt(30), max_new_tokens=2, **PAPER)
    calibration = Calibration([tiny_prompt(20), tiny_prompt(30, seed=1)])
    expected, scores = (engine.score_samples(calibration).scores for engine in (one, several))
    for mine, own in zip(scores, expected, strict=True):
        torch.testing.assert_close(mine, own)
    assert {str(buffer.device) for buffer in several.skeleton.model.buffers()} == {"cpu"}
    assert_equals_oracle(folder, tiny_prompt(30), 0.5, several, tokens=4)


def test_an_export_is_that_of_one_device(
    case: Callable[[str], Case], on_three: Callable[..., Engine], tmp_path: Path
) -> None:
    folder = case("llama").folder
    for name, engine in (("one", copying(folder, dtype="float32")), ("several", on_three(folder, 1, 2, 3))):
        engine.export(tiny_prompt(30), tmp_path / name, prompt_text="a text", **PAPER)
    one, several = (load_file(tmp_path / name / SINGLE) for name in ("one", "several"))
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_a_stop_in_the_middle_leaves_nothing_on_the_way(
    case: Callable[[str], Case], on_three: Callable[..., Engine]
) -> None:
    folder = case("llama").folder
    engine = on_three(folder, 1, 2, 3)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate_batch([tiny_prompt(30)], max_new_tokens=2, on_layer=stop, **PAPER)
    assert reading_threads() == []
    assert_equals_oracle(folder, tiny_prompt(30), 0.5, engine, tokens=4)
    engine.unload()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in engine.skeleton.modules)


def test_a_mask_moves_once_to_each_device(
    case: Callable[[str], Case], on_three: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a token nothing moves within a device, but the states to it and, at the end, back."""
    engine = on_three(case("llama").folder, 1, 3)
    engine.generate(tiny_prompt(30), max_new_tokens=2, **PAPER)
    moves: list[tuple[torch.device, torch.device]] = []
    move = hops.move

    def seen(tensor: Tensor, device: torch.device) -> Tensor:
        moves.append((tensor.device, device))
        return move(tensor, device)

    monkeypatch.setattr(hops, "move", seen)
    engine.skeleton.model(torch.tensor([[5]]), use_cache=False)
    there, back = torch.device("cpu"), torch.device(f"{KIND}:1")
    given = 3  # cosines, sines, positions
    assert moves == [(there, back)] * (1 + given) + [(back, there)]


def test_what_several_devices_cannot_do_is_refused(
    case: Callable[[str], Case], on_three: Callable[..., Engine]
) -> None:
    engine = on_three(case("llama").folder, 2, 3)
    with pytest.raises(OptionError, match="ffn-skip by prompt moves neurons' memory from layer to layer"):
        engine.generate(tiny_prompt(), sparsity=0.5, skip=FfnSkip(0.5, "prompt", cold=(0, 0)))


def test_the_report_has_a_line_for_each_device(case: Callable[[str], Case], on_three: Callable[..., Engine]) -> None:
    report = on_three(case("llama").folder, 2, 3).generate(tiny_prompt(), max_new_tokens=3, **PAPER).report
    plan, memory = report.plan, report.to_json()["memory"]
    assert [(card["device"], card["layers"]) for card in memory["cards"]] == [("cpu", [0, 2]), ("card:1", [2, 3])]
    assert sum(card["planned_peak_bytes"] for card in memory["cards"]) == memory["planned_peak_bytes"] == plan.peak
    assert sum(card["measured_peak_bytes"] for card in memory["cards"]) == memory["measured_peak_bytes"]
    rows = dict(report.rows())
    assert rows["card:1"].startswith("layer 2: ")
    assert rows["budget"].endswith(" on cpu, card:1")
    assert rows["steps"] == "not static: the layers are on several devices"
    cells = {row[0]: row[1] for row in last_rows(report.to_json())[1]}
    assert cells["card:1"] == format_bytes(plan.cards[1].peak)
