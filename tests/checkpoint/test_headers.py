"""Headers and indexes that lie: refused in one line; those that are true are safetensors' own."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from safetensors_files import DATA, NAMES, everything, layout, random_tensors, refused, same, shards, write

from griffin_offload.checkpoint.headers import MAX_HEADER, Checkpoint, Piece, TensorInfo, read_header
from griffin_offload.checkpoint.which_files import ADAPTER, INDEX, SINGLE
from griffin_offload.errors import CheckpointError

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
}


def entry(**changes: Any) -> dict[str, Any]:
    """GOOD with its entry of `b` changed; a change to None deletes a key."""
    changed = {key: value for key, value in (GOOD["b"] | changes).items() if value is not None}
    return GOOD | {"b": changed}


# Headers


def test_the_good_header_is_good(tmp_path: Path) -> None:
    path = write(tmp_path / SINGLE, GOOD)
    start = path.stat().st_size - len(DATA)
    assert read_header(path) == [
        TensorInfo("a", torch.float32, (2, 3), path, start, start + 24),
        TensorInfo("b", torch.bfloat16, (4,), path, start + 24, start + 32),
        TensorInfo("c", torch.float16, (), path, start + 32, start + 34),
    ]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "0 bytes"),
        (b"\x02\0\0\0\0\0\0", "7 bytes"),
        (bytes(8), "header"),
        (b"\x01" + bytes(7) + b"{", "header"),
        (b"\xff" * 8 + b"{}", "header"),
        ((2**63).to_bytes(8, "little") + b"{}", "header"),
        ((3).to_bytes(8, "little") + b"{}", "header"),
        ((2).to_bytes(8, "little") + b"[]", "object"),
        ((4).to_bytes(8, "little") + b"null", "object"),
        ((2).to_bytes(8, "little") + b"17", "object"),
        ((2).to_bytes(8, "little") + b'""', "object"),
        ((2).to_bytes(8, "little") + b"{]", "JSON"),
        ((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc", "JSON"),
        ((12).to_bytes(8, "little") + b'{"a": {"b": ', "JSON"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "JSON"),
        ((600_000).to_bytes(8, "little") + b'{"a":' * 100_000 + b"}" * 100_000, "JSON"),
        (b"<!DOCTYPE html><html><body>Access denied</body></html>", "header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "header"),
        (b"\x80\x02}q\x00" + bytes(100), "header"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(content)
    refused(path, word)


def test_a_header_longer_than_the_format_allows(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER)  # a hole: takes no disk
    refused(path, "header")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (entry(dtype=None), ["b"]),
        (entry(shape=None), ["b"]),
        (entry(data_offsets=None), ["b"]),
        (GOOD | {"b": None}, ["b"]),
        (GOOD | {"b": []}, ["b"]),
        (GOOD | {"b": "F32"}, ["b"]),
        (GOOD | {"b": 7}, ["b"]),
        (entry(dtype=""), ["b"]),
        (entry(dtype=["BF16"]), ["b"]),
        (entry(dtype={"BF16": 1}), ["b"]),
        (entry(dtype=16), ["b"]),
        (entry(shape=4), ["b"]),
        (entry(shape="4"), ["b"]),
        (entry(shape=[2.0, 2]), ["b"]),
        (entry(shape=[True, 4]), ["b"]),
        (entry(shape=["4"]), ["b"]),
        (entry(shape=[-4]), ["b"]),
        (entry(shape=[-2, -2]), ["b"]),
        (entry(shape=[[4]]), ["b"]),
        (entry(shape={"4": 4}), ["b"]),
        (entry(shape=[2**64]), ["b"]),
        (entry(shape=[5]), ["b", "8 bytes"]),
        (entry(shape=[]), ["b", "8 bytes"]),
        (entry(shape=[0]), ["b", "8 bytes"]),
        (entry(dtype="F32"), ["b", "8 bytes"]),
        (entry(data_offsets=[24]), ["b"]),
        (entry(data_offsets=[24, 32, 40]), ["b"]),
        (entry(data_offsets=24), ["b"]),
        (entry(data_offsets="24"), ["b"]),
        (entry(data_offsets=[24.0, 32.0]), ["b"]),
        (entry(data_offsets=[False, 8]), ["b"]),
        (entry(data_offsets=["24", "32"]), ["b"]),
        (entry(data_offsets=[-8, 0]), ["b"]),
        (entry(data_offsets=[-(2**70), 32]), ["b"]),
        (entry(data_offsets=[32, 24]), ["b"]),
        (entry(data_offsets=[24, 2**64]), ["b"]),
        (entry(data_offsets=[24 + 2**63, 32 + 2**63]), ["b"]),
        (entry(data_offsets=[27, 35]), ["b", "cut short"]),
        (entry(data_offsets=[20, 28]), ["a", "b", "overlap"]),
        (entry(data_offsets=[0, 8]), ["a", "b", "overlap"]),
        (entry(shape=[0], data_offsets=[12, 12]), ["a", "b", "overlap"]),
        (entry(shape=[0], data_offsets=[99, 99]), ["b"]),
        (json.dumps(GOOD).replace("24,", "NaN,").encode(), ["b"]),
        (json.dumps(GOOD).replace("24,", "1e1,").encode(), ["b"]),
        (json.dumps(GOOD).replace("32]", "9" * 4300 + "]").encode(), ["b"]),  # one more has too many digits to print
        (json.dumps(GOOD).replace("32]", "9" * 9000 + "]").encode(), []),
        (json.dumps(GOOD).replace("[4]", "[" + "9" * 4000 + "]").encode(), ["b"]),
        (json.dumps(GOOD).replace("[4]", "[" + ", ".join(["9" * 4000] * 50) + "]").encode(), ["b"]),
        (GOOD | {"evil\nTraceback: \x1b[31mred": {}}, ["evil"]),
        (GOOD | {"\ud800": 1}, []),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, words: list[str]) -> None:
    refused(write(tmp_path / SINGLE, header), *words)


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.safetensors", GOOD).read_bytes()
    for size in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:size])
        refused(tmp_path / SINGLE)
    (tmp_path / SINGLE).write_bytes(whole)
    assert len(read_header(tmp_path / SINGLE)) == 3


@pytest.mark.parametrize("dtype", ["F99", "F4", "F6_E2M3", "C64", "F\n\x1b[2J"])
def test_an_unknown_dtype_refuses_only_who_needs_it(tmp_path: Path, dtype: str) -> None:
    folder = write(tmp_path / SINGLE, entry(dtype=dtype), DATA).parent
    checkpoint = Checkpoint.open(folder)
    pieces = {name: [Piece(info)] for name, info in checkpoint.tensors.items()}
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    needed = {name: shapes[name] for name in "ac"}
    assert checkpoint.match(needed, {}, {name: pieces[name] for name in "ac"}).pieces.keys() == needed.keys()
    with pytest.raises(CheckpointError, match=r"b is .*, quantized, and config.json does not say"):
        checkpoint.match(shapes, {}, pieces)


def valid(infos: list[TensorInfo], path: Path) -> bool:
    """What every accepted header promises."""
    size, end = path.stat().st_size, 8
    for info in infos:
        if not end <= info.begin <= info.end <= size:
            return False
        if not info.unknown and info.bytes != torch.Size(info.shape).numel() * info.dtype.itemsize:
            return False
        end = info.end
    return True


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to three small changes: a bit, a byte, a cut, a piece twice, a piece of something else."""
    pieces = [b'"', b"{", b"}", b"[", b"]", b",", b"-", b"1e9", b"null", b"\\n", b"\\ud800", b"\0", b"\xff", b"9" * 30]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content))
        kind = rng.randrange(5)
        if kind == 0:
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + rng.choice(pieces) + content[at:]
        elif kind == 2:
            content = content[:at] + rng.choice(pieces) + content[at + 1 :]
        elif kind == 3:
            content = content[:at] + content[at + rng.randint(1, 9) :]
        else:
            content = content[:at] + content[rng.randrange(at + 1) : at] + content[at:]
    return content


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts replaced by something that does not belong there."""
    junk: list[Any] = [None, True, -1, 0, 7, 1.5, 10**30, "", "F32", "x\n", [], {}, [1], [[]], {"a": 1}, [0, 24]]
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        copy[key] = mutated_json(copy[key], rng)
        return copy
    return rng.choice(junk)


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_random_changes_are_refused_or_still_true(tmp_path: Path, kind: str) -> None:
    rng, path, accepted = random.Random(0), tmp_path / SINGLE, 0
    for _ in range(600):
        if kind == "json":
            write(path, mutated_json(GOOD, rng))
        else:
            content = mutated_bytes(json.dumps(GOOD).encode(), rng)
            write(path, content, length=rng.choice([None, None, None, len(content) + rng.randint(-3, 40)]))
        try:
            infos = read_header(path)
        except CheckpointError:
            refused(path)
        else:
            accepted += 1
            assert valid(infos, path), path.read_bytes()
    assert 0 < accepted < 300


# The folder and its index


X, Y = {"x": torch.arange(6.0)}, {"y": torch.arange(3.0)}
PAIR = {"one.safetensors": X, "two.safetensors": Y}


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(shards(tmp_path / "m", PAIR))
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {
        "x": "one.safetensors",
        "y": "two.safetensors",
    }
    assert checkpoint.bytes == sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    same(everything(checkpoint.tensors), X | Y)


def test_tensors_that_the_index_does_not_name_are_there_too(tmp_path: Path) -> None:
    folder = shards(tmp_path / "m", {"one.safetensors": X | Y}, {"x": "one.safetensors"})
    assert set(Checkpoint.open(folder).tensors) == {"x", "y"}


def open_refused(folder: Path, file: str, *words: str) -> None:
    refused(folder / file, *words, call=lambda _: Checkpoint.open(folder))


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = shards(tmp_path / "m", PAIR)
    (folder / "two.safetensors").unlink()
    open_refused(folder, "two.safetensors", "missing")


def test_a_truncated_shard(tmp_path: Path) -> None:
    folder = shards(tmp_path / "m", PAIR)
    shard = folder / "two.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    open_refused(folder, "two.safetensors", "cut short", "y")


def test_of_a_tensor_in_two_shards_the_last_is_read(tmp_path: Path) -> None:
    """As transformers does, whatever the index says."""
    other = {"x": X["x"] + 1}
    weight_map = {"x": "one.safetensors", "y": "two.safetensors"}
    folder = shards(tmp_path / "m", {"one.safetensors": X, "two.safetensors": other | Y}, weight_map)
    same(everything(Checkpoint.open(folder).tensors), other | Y)


def test_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    """It may be in another one. Only a model that needs it is refused."""
    weight_map = {"x": "two.safetensors", "y": "one.safetensors", "z": "two.safetensors"}
    checkpoint = Checkpoint.open(shards(tmp_path / "m", PAIR, weight_map))
    same(everything(checkpoint.tensors), X | Y)
    pieces = {name: [Piece(info)] for name, info in checkpoint.tensors.items()}
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    assert checkpoint.match(shapes, {}, pieces).pieces == pieces
    with pytest.raises(CheckpointError, match=r"needs z, which no file holds; the index says .* two\.safetensors"):
        checkpoint.match({**shapes, "z": (1,)}, {}, pieces)


@pytest.mark.parametrize("index", [b"damaged", None])
def test_a_single_file_beside_an_index_is_the_checkpoint(tmp_path: Path, index: bytes | None) -> None:
    folder = shards(tmp_path / "m", PAIR)
    if index is not None:
        (folder / INDEX).write_bytes(index)
    save_file({"x": X["x"] + 1}, folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    same(everything(checkpoint.tensors), {"x": X["x"] + 1})
    assert checkpoint.bytes == (folder / SINGLE).stat().st_size


def test_the_file_that_the_config_names_goes_first(tmp_path: Path) -> None:
    folder = shards(tmp_path / "m", PAIR)
    save_file({"x": X["x"] + 1}, folder / SINGLE)
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    for name, tensors in (("two.safetensors", Y), ("other.safetensors.index.json", X | Y)):
        (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
        same(everything(Checkpoint.open(folder).tensors), tensors)


@pytest.mark.parametrize("name", ["../m/one.safetensors", "/one.safetensors", "model.bin", 7, ["one.safetensors"]])
def test_a_config_that_names_another_file_is_refused(tmp_path: Path, name: object) -> None:
    folder = shards(tmp_path / "m", PAIR)
    (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
    open_refused(folder, "config.json", "transformers_weights")


def test_an_adapter_alone_is_called_that(tmp_path: Path) -> None:
    (tmp_path / ADAPTER).write_text("{}")
    save_file(X, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter.*merge"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"{}",
        b'"weight_map"',
        b'{"weight_map": null}',
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b'{"weight_map": "one.safetensors"}',
        b'{"weight_map": {"x": 1}}',
        b'{"weight_map": {"x": null}}',
        b'{"weight_map": {"x": ["one.safetensors"]}}',
        b'{"weight_map": {"x": {"file": "one.safetensors"}}}',
        b'{"weight_map": ' + b"[" * 100_000,
    ],
)
def test_an_index_that_is_none(tmp_path: Path, index: bytes) -> None:
    folder = shards(tmp_path / "m", PAIR)
    (folder / INDEX).write_bytes(index)
    open_refused(folder, INDEX, "weight_map")


@pytest.mark.parametrize("name", ["", ".", "nul\0", "config.json", "x" * 300, "\ud800", "sub/one.safetensors", "a\nb"])
def test_an_index_that_names_no_shard(tmp_path: Path, name: str) -> None:
    folder = shards(tmp_path / "m", PAIR, {"x": "one.safetensors", "y": name})
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_index_that_leaves_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shards(outside, PAIR)
    for name in ("../outside/one.safetensors", str(outside / "one.safetensors"), "a/../../outside/one.safetensors"):
        open_refused(
            shards(tmp_path / "m", {"two.safetensors": Y}, {"y": "two.safetensors", "x": name}), INDEX, "leaves"
        )


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shards(outside, PAIR)
    folder = shards(tmp_path / "m", PAIR)
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to(outside / "one.safetensors")
    open_refused(folder, "one.safetensors", "leaves")
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to("one.safetensors")  # a loop
    with pytest.raises(CheckpointError, match=r"one\.safetensors"):
        Checkpoint.open(folder)
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to("nowhere")
    open_refused(folder, "one.safetensors", "missing")


def test_links_inside_the_folder(tmp_path: Path) -> None:
    folder = shards(tmp_path / "m", PAIR)
    (folder / "one.safetensors").rename(folder / "data")
    (folder / "one.safetensors").symlink_to("data")
    same(everything(Checkpoint.open(folder).tensors), X | Y)


def hub_cache(root: Path, name: str) -> Path:
    """The snapshot of a model in the hub's cache: links into its blobs."""
    real = shards(root / "real", PAIR)
    snapshot = root / f"models--{name}" / "snapshots" / "0123abc"
    blobs = root / f"models--{name}" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in real.iterdir():
        file.rename(blobs / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"sha-{file.name}")
    return snapshot


def test_the_hub_caches_layout(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, "org--one")
    same(everything(Checkpoint.open(snapshot).tensors), X | Y)
    (tmp_path / "short").symlink_to(snapshot)
    same(everything(Checkpoint.open(tmp_path / "short").tensors), X | Y)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (snapshot / "one.safetensors").resolve().rename(other / "sha")
    (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to(other / "sha")
    open_refused(snapshot, "one.safetensors", "leaves")


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=rf"{SINGLE}.*safetensors only"):
            Checkpoint.open(folder)
    (tmp_path / SINGLE).mkdir()
    open_refused(tmp_path, SINGLE)


def test_safetensors_reads_the_same_header(tmp_path: Path) -> None:
    path = layout(tmp_path / SINGLE, random_tensors())
    infos = {info.name: info for info in read_header(path)}
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(infos)
        for name, info in infos.items():
            found = file.get_slice(name)
            assert found.get_dtype() == NAMES[info.dtype]
            assert tuple(found.get_shape()) == info.shape
