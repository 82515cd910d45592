"""Tokens that the table of embeddings has no row for: in a prompt, as padding, or as the end of an answer."""

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
from tiny import VOCAB, tiny_checkpoint, tiny_prompt, tiny_tokenizer

from griffin_offload import Engine
from griffin_offload.errors import OptionError, PromptError
from griffin_offload.evaluation.perplexity import encode_text
from griffin_offload.pruning.calibration import Calibration

SHORT, LONG = tiny_prompt(9, 1), tiny_prompt(30)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def added(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer knows a token more than its table."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("added") / "m", "llama", tied=request.param, chat=True)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("where", ["text", "chat", "ids", "sweep", "calibration", "evaluation", "export"])
def test_a_token_without_a_row_is_refused_by_name(added: Path, tmp_path: Path, where: str) -> None:
    engine = Engine(added, device_memory="8GiB")
    ids = [*SHORT, VOCAB]
    ways = {
        "text": lambda: engine.encode("a <tool> b", raw=True),
        "chat": lambda: engine.encode("a <tool> b"),
        "ids": lambda: engine.generate(ids, sparsity=0),
        "sweep": lambda: engine.sweep(ids, sparsity=0),
        "calibration": lambda: engine.score_samples(Calibration([SHORT, ids])),
        "evaluation": lambda: encode_text(engine, "a <tool> b"),
        "export": lambda: engine.export(ids, tmp_path / "out", sparsity=0.5, prompt_text=""),
    }
    with pytest.raises(PromptError, match=f"token.*{VOCAB}"):
        ways[where]()
    assert not (tmp_path / "out").exists()
    with pytest.raises(PromptError, match="-1"):
        engine.generate([*SHORT, -1], sparsity=0)
    assert engine.generate(SHORT, sparsity=0, max_new_tokens=2, greedy=True).token_ids  # and it goes on


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fields", [{"pad_token_id": -1}, {"pad_token_id": VOCAB}, {"eos_token_id": [VOCAB, 7]}])
def test_padding_without_a_row_is_replaced(tmp_path: Path, fields: dict[str, Any], tied: bool) -> None:
    """Rows of a batch are padded on the left, and go on behind their end."""
    folder = tiny_checkpoint(tmp_path / "m", "llama", tied=tied)
    model = oracle.load(folder)
    alone = [oracle.full_generate(model, ids, 12)[0] for ids in (LONG, SHORT)]
    end = alone[0][3]  # of the first row only, as long as the other has no such token
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, end], **fields}))
    answers = Engine(folder, device_memory="8GiB").generate_batch(
        [LONG, SHORT], sparsity=0, max_new_tokens=12, greedy=True
    )
    ends = json.loads(file.read_text())["eos_token_id"]
    for answer, whole in zip(answers, alone, strict=True):
        until = next((i for i, token in enumerate(whole) if token in ends), len(whole) - 1)
        assert answer.token_ids == whole[: until + 1]
    told = answers[0].report.overridden
    assert ["pad_token_id"] * ("pad_token_id" in fields) == [line.split()[0] for line in told]


def test_padding_of_a_config_without_a_row_is_replaced(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", tied=True)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": -1}))
    (folder / "generation_config.json").unlink()
    answers = Engine(folder, device_memory="8GiB").generate_batch(
        [LONG, SHORT], sparsity=0, max_new_tokens=5, greedy=True
    )
    model = oracle.load(folder)
    assert [a.token_ids for a in answers] == [oracle.full_generate(model, ids, 5)[0] for ids in (LONG, SHORT)]


def test_a_forced_token_without_a_row_is_refused(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama"), device_memory="8GiB")
    with pytest.raises(OptionError, match="forced_eos_token_id"):
        engine.generate(SHORT, sparsity=0, forced_eos_token_id=VOCAB)
