"""Files of a checkpoint that change while it is open: the old weights' answer, or an error; never a mixture. And tokens
that no table has a row for."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHAT_TEMPLATE, VOCAB, tiny_checkpoint, tiny_prompt
from tiny_gguf import write_gguf

from griffin_offload import Engine
from griffin_offload.chat import Chat
from griffin_offload.checkpoint.headers import Checkpoint
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.errors import CheckpointError, OptionError, PromptError
from griffin_offload.options import Decoding, Pruning
from griffin_offload.session import open_session, save_session

pytestmark = pytest.mark.fault

WEIGHTS = "model.safetensors"
PROMPT = tiny_prompt(12)
HALF = {"sparsity": 0.5, "prior": "off", "max_new_tokens": 4, "greedy": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one form, with other weights: their headers are the same, byte for byte."""
    root = tmp_path_factory.mktemp("changed")
    return tuple(tiny_checkpoint(root / str(seed), "llama", seed=seed, chat=True) for seed in (0, 1))  # type: ignore[return-value]


@pytest.fixture
def model(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GRIFFIN_STATE", str(tmp_path / "state"))
    return Path(shutil.copytree(folders[0], tmp_path / "m"))


def in_place(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    bump(path)


def bump(path: Path) -> None:
    """A later time of change: two writes may fall into one tick of the clock."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def moved_header(data: bytes) -> bytes:
    """The same tensors, 64 bytes further on."""
    length = int.from_bytes(data[:8], "little")
    return (length + 64).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 64 + data[8 + length :]


def replace(path: Path, data: bytes) -> None:
    path.with_name("new").write_bytes(data)
    path.with_name("new").replace(path)


def pipe(path: Path, _: bytes) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, _: bytes) -> None:
    path.unlink()
    path.mkdir()


# What becomes of the file, given the bytes of another checkpoint's.
CHANGES: dict[str, Callable[[Path, bytes], Any]] = {
    "rewritten_in_place": in_place,
    "replaced": replace,
    "rewritten_with_other_places": lambda path, data: in_place(path, moved_header(data)),
    "replaced_with_other_places": lambda path, data: replace(path, moved_header(data)),
    "cut_short": lambda path, data: in_place(path, data[: len(data) // 2]),
    "emptied": lambda path, data: in_place(path, b""),
    "longer": lambda path, data: in_place(path, path.read_bytes() + b"more"),
    "one_byte": lambda path, data: in_place(path, path.read_bytes()[:-1] + b"\x7f"),
    "deleted": lambda path, data: path.unlink(),
    "a_pipe": pipe,
    "a_folder": folder,
    "a_link_to_another": lambda path, data: (replace(path, b""), path.unlink(), path.symlink_to("/dev/null")),
}
SAID = "has changed since the model was opened|cannot be opened|cannot be read"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before_the_first_pass", "between_two_prompts"])
def test_changed_weights_are_told(model: Path, folders: tuple[Path, Path], change: str, when: str) -> None:
    engine, other = Engine(model), (folders[1] / WEIGHTS).read_bytes()
    if when == "between_two_prompts":
        engine.generate(PROMPT, **HALF)
    CHANGES[change](model / WEIGHTS, other)
    for _ in range(2):  # and the second time
        with pytest.raises(CheckpointError, match=SAID) as caught:
            engine.generate(tiny_prompt(12, seed=1), **HALF)
        assert WEIGHTS in str(caught.value)


@pytest.mark.parametrize("changed", ["in_place", "replaced"])
def test_a_model_of_shards_is_told_by_the_shard(tmp_path: Path, changed: str) -> None:
    model = tiny_checkpoint(tmp_path / "m", "llama", shards=3)
    engine, shard = Engine(model), sorted(model.glob("*.safetensors"))[1]
    engine.generate(PROMPT, **HALF)
    data = shard.read_bytes()
    in_place(shard, data) if changed == "in_place" else replace(shard, data)
    with pytest.raises(CheckpointError, match=f"{shard.name} has changed"):
        engine.generate(PROMPT, **HALF)


@pytest.mark.parametrize("changed", ["in_place", "replaced", "cut_short"])
def test_a_gguf_file_too(model: Path, tmp_path: Path, changed: str) -> None:
    file = write_gguf(model, tmp_path / "m.gguf")
    engine, data = Engine(file), file.read_bytes()
    engine.generate(PROMPT, **HALF)
    replace(file, data) if changed == "replaced" else in_place(
        file, data[: len(data) // (1 + (changed == "cut_short"))]
    )
    with pytest.raises(CheckpointError, match="has changed since the model was opened"):
        engine.generate(PROMPT, **HALF)


@pytest.mark.parametrize("gone", ["replaced", "deleted"])
def test_a_file_that_is_open_already_stays_the_old_one(model: Path, folders: tuple[Path, Path], gone: str) -> None:
    checkpoint = Checkpoint.open(model)
    info = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    before, after = torch.empty(info.shape), torch.empty(info.shape)
    reader = Reader(files=checkpoint.files)
    reader.read({info: before})
    replace(info.file, (folders[1] / WEIGHTS).read_bytes()) if gone == "replaced" else info.file.unlink()
    reader.read({info: after})
    assert torch.equal(before, after)
    reader.close()
    with pytest.raises(CheckpointError, match=SAID):
        reader.read({info: after})


@pytest.mark.parametrize("changed", ["in_place", "replaced"])
def test_a_change_while_drafts_are_verified(model: Path, folders: tuple[Path, Path], changed: str) -> None:
    options: dict[str, Any] = {**HALF, "max_new_tokens": 12, "lossless": True}
    expected = Engine(model).generate(PROMPT, **options).token_ids
    other, done = (folders[1] / WEIGHTS).read_bytes(), []

    def change(_: str) -> None:
        if not done:
            done.append(1)
            (in_place if changed == "in_place" else replace)(model / WEIGHTS, other)

    engine = Engine(model)
    if changed == "replaced":  # the pass goes on with the file that it has open
        assert engine.generate(PROMPT, on_text=change, **options).token_ids == expected
        assert done
        return
    with pytest.raises(CheckpointError, match="has changed since the model was opened"):
        engine.generate(PROMPT, on_text=change, **options)


@pytest.mark.parametrize("changed", ["in_place", "replaced", "deleted"])
def test_a_chat_under_changed_weights_is_saved_as_the_old_ones(
    model: Path, folders: tuple[Path, Path], changed: str
) -> None:
    other = (folders[1] / WEIGHTS).read_bytes()
    chat = Chat(Engine(model), Pruning(sparsity=0.5, prior="off"), Decoding(max_new_tokens=3, greedy=True))
    chat.engine.tokenizer.chat_template = CHAT_TEMPLATE
    chat.ask("one")
    path = model / WEIGHTS
    path.unlink() if changed == "deleted" else (in_place if changed == "in_place" else replace)(path, other)
    with pytest.raises(CheckpointError, match=SAID):
        chat.ask("two")
    save_session(chat, "talk")
    session = open_session("talk")
    shutil.copy(folders[1] / WEIGHTS, model / WEIGHTS)
    with pytest.raises(Exception, match="another model, or another version"):
        session.check(Engine(model))
    replace(path, (folders[0] / WEIGHTS).read_bytes())
    session.check(Engine(model))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "LICENSE"])
def test_an_export_is_of_one_version_of_a_folder(model: Path, tmp_path: Path, name: str) -> None:
    path = model / name
    path.touch()
    engine = Engine(model)
    in_place(path, path.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=f"{name} has changed since the model was opened"):
        engine.export(PROMPT, tmp_path / "out", sparsity=0.5, prior="off", prompt_text="x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("gone", [True, False])
def test_small_files_are_read_once(tmp_path: Path, name: str, gone: bool) -> None:
    model = tiny_checkpoint(tmp_path / "m", "llama", shards=2)
    engine = Engine(model)
    expected = engine.generate(engine.encode("Hello", raw=True), **HALF).token_ids
    (model / name).unlink() if gone else in_place(model / name, b"{}")
    assert engine.generate(engine.encode("Hello", raw=True), **HALF).token_ids == expected


def test_a_prior_is_measured_of_the_weights_that_were_opened(model: Path, folders: tuple[Path, Path]) -> None:
    engine = Engine(model)
    in_place(model / WEIGHTS, (folders[1] / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="has changed"):
        engine.generate(PROMPT, sparsity=0.5, method="griffin", max_new_tokens=2)
    assert not list((model.parent / "cache").glob("prior/*"))


# Tokens beyond the table


@pytest.mark.parametrize("row", [VOCAB, -1, 10**12, -(2**63)])
def test_a_row_beyond_the_table_is_never_read(model: Path, row: int) -> None:
    checkpoint = Checkpoint.open(model)
    info, reader = checkpoint.tensors["model.embed_tokens.weight"], Reader()
    with pytest.raises(PromptError, match=f"token {row} has no row"):
        reader.read_rows(info, [0, row], torch.float32)
    assert not reader.bytes


@pytest.mark.parametrize("tied", [True, False], ids=["table_in_memory", "table_on_disk"])
@pytest.mark.parametrize("ids", [[5, VOCAB, 6], [5, -1], [VOCAB]], ids=["beyond", "negative", "alone"])
@pytest.mark.parametrize("way", ["generate", "batch", "stream", "sweep", "export", "lossless"])
def test_tokens_beyond_the_table(tmp_path: Path, tied: bool, ids: list[int], way: str) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama", tied=tied))
    ways: dict[str, Callable[[], Any]] = {
        "generate": lambda: engine.generate(ids, **HALF),
        "batch": lambda: engine.generate_batch([PROMPT, ids], **HALF),
        "stream": lambda: list(engine.stream(ids, **HALF)),
        "sweep": lambda: engine.sweep(ids, sparsity=0.5, prior="off"),
        "export": lambda: engine.export(ids, tmp_path / "out", sparsity=0.5, prior="off", prompt_text="x"),
        "lossless": lambda: engine.generate(ids, **HALF, lossless=True),
    }
    with pytest.raises(PromptError, match=r"has no row in|beyond the table"):
        ways[way]()


@pytest.mark.parametrize("name", ["pad_token_id", "forced_bos_token_id", "forced_eos_token_id"])
@pytest.mark.parametrize("token", [VOCAB, -1, 2**40])
def test_tokens_that_generate_would_put_in(model: Path, name: str, token: int) -> None:
    engine = Engine(model)
    with pytest.raises(OptionError, match=f"{name} {token}: the model knows the tokens 0 to {VOCAB - 1}"):
        engine.generate_batch([PROMPT, PROMPT[:5]], **HALF, **{name: token})


def test_a_tokenizer_with_more_tokens_than_the_table(model: Path) -> None:
    told = json.loads((model / "tokenizer.json").read_text())
    told["added_tokens"].append({**told["added_tokens"][0], "id": VOCAB, "content": "Hello"})
    (model / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(PromptError, match=f"token {VOCAB} .* has no row"):
        Engine(model).encode("Hello", raw=True)
