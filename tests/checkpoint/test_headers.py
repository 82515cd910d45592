"""Headers that lie, bytes read where they are, the reading thread, and shards written: against safetensors' own."""

import errno
import fcntl
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from griffin_offload.checkpoint.headers import DTYPES, INDEX, MAX_HEADER, SINGLE, Checkpoint, TensorInfo, read_header
from griffin_offload.checkpoint.reader import Reader, runs
from griffin_offload.checkpoint.safetensors_writer import CheckpointWriter
from griffin_offload.errors import CheckpointError
from griffin_offload.memory.arena import LARGE, PAGE, Arena, padded
from griffin_offload.offload.prefetch import Load, Prefetch

NAMES = {dtype: name for name, dtype in DTYPES.items()}
GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
}
DATA = bytes(range(34))


def write(path: Path, header: object, data: bytes = DATA, length: int | None = None) -> Path:
    """A safetensors file: the header is JSON, or bytes as they are; `length` is what the file says of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    """GOOD with its entry of `b` changed; a change to None deletes a key."""
    changed = {key: value for key, value in (GOOD["b"] | changes).items() if value is not None}
    return GOOD | {"b": changed}


def refused(path: Path, *words: str, call: Callable[[Path], object] = read_header) -> None:
    """One line that names the file and the fault; `words` are in it."""
    with pytest.raises(CheckpointError) as caught:
        call(path)
    text = str(caught.value)
    assert path.name in text
    assert text.isprintable(), "one line, and nothing that a terminal would obey"
    assert len(text) < 1000
    for word in words:
        assert word in text


def layout(path: Path, tensors: Mapping[str, Tensor], gap: int = 0) -> Path:
    """A file with the tensors' bytes in this order, unaligned as they come, `gap` bytes before each."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        data += b"\xaa" * gap
        begin = len(data)
        data += raw(tensor)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    return write(path, text + b" " * (len(text) % 2), data)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits (NaN included)."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert raw(ours[name]) == raw(tensor), name


def everything(infos: Mapping[str, TensorInfo], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor, read by a new reader."""
    tensors = {name: torch.empty(info.shape, dtype=dtype or info.dtype) for name, info in infos.items()}
    reader = Reader()
    reader.read({infos[name]: tensor for name, tensor in tensors.items()})
    reader.close()
    assert reader.bytes == sum(info.bytes for info in infos.values())
    return tensors


def random_tensors(seed: int = 0) -> dict[str, Tensor]:
    """All dtypes of weights and some more, all bit patterns, in an order that aligns nothing."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    kinds = [torch.uint8, torch.float32, torch.bfloat16, torch.bool, torch.float64, torch.float16, torch.int8]
    kinds += [torch.int64, torch.float8_e4m3fn, torch.int32, torch.int16, torch.float8_e5m2]
    for index, shape in enumerate([(7,), (3, 5), (), (1,), (0,), (2, 0, 3), (4, 4, 2), (1, 1, 1, 3), (13,)]):
        for kind in kinds:
            count = torch.Size(shape).numel() * kind.itemsize
            bits = torch.randint(0, 2 if kind == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
            made[f"z{(index * 5) % 9}.{len(made)}.{kind}"] = bits.view(kind).view(shape)
    return made


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
        (entry(dtype="F99"), ["F99", "known"]),
        (entry(dtype=""), ["dtype"]),
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
        (entry(dtype="F\n\x1b[2J"), ["b"]),
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


def valid(infos: list[TensorInfo], path: Path) -> bool:
    """What every accepted header promises."""
    size, end = path.stat().st_size, 8
    for info in infos:
        if not end <= info.begin <= info.end <= size:
            return False
        if info.bytes != torch.Size(info.shape).numel() * info.dtype.itemsize:
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


def shards(folder: Path, files: Mapping[str, Mapping[str, Tensor]], weight_map: object = None) -> Path:
    """A sharded checkpoint; the index is right unless a weight_map is given."""
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file(dict(tensors), folder / name)
    if weight_map is None:
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


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


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    weight_map = {"x": "one.safetensors", "y": "two.safetensors"}
    folder = shards(tmp_path / "m", {"one.safetensors": X, "two.safetensors": X | Y}, weight_map)
    open_refused(folder, "two.safetensors", "x", "one.safetensors")


def test_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    weight_map = {"x": "one.safetensors", "y": "two.safetensors", "z": "two.safetensors"}
    open_refused(shards(tmp_path / "m", PAIR, weight_map), INDEX, "z", "two.safetensors")
    weight_map = {"x": "two.safetensors", "y": "one.safetensors"}
    open_refused(shards(tmp_path / "m", PAIR, weight_map), INDEX)


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


# The reader


def test_safetensors_reads_the_same_header(tmp_path: Path) -> None:
    path = layout(tmp_path / SINGLE, random_tensors())
    infos = {info.name: info for info in read_header(path)}
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(infos)
        for name, info in infos.items():
            found = file.get_slice(name)
            assert found.get_dtype() == NAMES[info.dtype]
            assert tuple(found.get_shape()) == info.shape


@pytest.mark.parametrize("seed", [0, 1])
def test_every_layout_is_read_as_safetensors_does(tmp_path: Path, seed: int) -> None:
    tensors = random_tensors(seed)
    path = tmp_path / SINGLE
    save_file(tensors, path)  # sorted and aligned, as the library does
    same(everything({info.name: info for info in read_header(path)}), load_file(path))
    layout(path, tensors)  # as they come
    same(everything({info.name: info for info in read_header(path)}), tensors)
    layout(path, tensors, gap=3)  # which safetensors itself refuses
    same(everything({info.name: info for info in read_header(path)}), tensors)


def test_shards_are_read_as_safetensors_does(tmp_path: Path) -> None:
    tensors = list(random_tensors().items())
    files = {f"model-{i}.safetensors": dict(tensors[i::3]) for i in range(3)}
    folder = shards(tmp_path / "m", files)
    theirs = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    same(everything(Checkpoint.open(folder).tensors), theirs)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_rounded_as_torch_does(tmp_path: Path, target: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"odd": torch.ones(3, dtype=torch.uint8)}
    for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        exponents = torch.randint(-30, 30, (31, 9), generator=generator)
        values = torch.randn(31, 9, generator=generator, dtype=torch.float64) * 2.0**exponents
        tensors[f"{kind}"] = values.to(kind)
        tensors[f"{kind} edge"] = torch.tensor([0.0, -0.0, float("inf"), 1e-40, 65519.0, 65520.0, 3e38]).to(kind)
        tensors[f"{kind} scalar"], tensors[f"{kind} none"] = torch.tensor(1 / 3, dtype=kind), torch.empty(0, dtype=kind)
    infos = {info.name: info for info in read_header(layout(tmp_path / SINGLE, tensors)) if info.name != "odd"}
    same(everything(infos, target), {name: tensor.to(target) for name, tensor in tensors.items() if name != "odd"})


def test_a_large_tensor_is_converted_piece_by_piece(tmp_path: Path) -> None:
    values = torch.randn(5_000_001, generator=torch.Generator().manual_seed(0))  # 20 MB: several bounces
    (info,) = read_header(layout(tmp_path / SINGLE, {"x": values}))
    same(everything({"x": info}, torch.bfloat16), {"x": values.to(torch.bfloat16)})


def test_neighbours_are_one_run(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(4) for name in "abcdef"}
    one, two = (read_header(layout(tmp_path / f"{i}.safetensors", tensors)) for i in range(2))
    gaps = read_header(layout(tmp_path / "gaps.safetensors", tensors, gap=1))

    def names(infos: list[TensorInfo]) -> list[str]:
        return ["".join(info.name for info in run) for run in runs(infos)]

    assert names(one) == ["abcdef"]
    assert names(one[::-1]) == ["abcdef"]
    assert names(one[:2] + one[3:]) == ["ab", "def"]
    assert names([one[4], one[0], one[2]]) == ["a", "c", "e"]
    assert names(two + one) == ["abcdef", "abcdef"]
    assert names(gaps) == list("abcdef")
    assert names([]) == []
    empty = {"a": torch.zeros(4), "none": torch.zeros(0), "b": torch.zeros(4)}
    assert names(read_header(layout(tmp_path / "empty.safetensors", empty))) == ["anoneb"]


def test_a_run_is_one_read_however_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{i}": torch.full((3,), float(i)) for i in range(1300)}
    infos = {info.name: info for info in read_header(layout(tmp_path / SINGLE, tensors))}
    calls: list[int] = []
    system = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        calls.append(len(buffers))
        return system(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    same(everything({name: infos[name] for name in list(infos)[:500]}), dict(list(tensors.items())[:500]))
    assert calls == [500]
    same(everything(infos), tensors)
    assert len(calls) == 1 + 3
    assert max(calls) <= 1024, "IOV_MAX"


@pytest.mark.parametrize("most", [1, 7, 100])
def test_a_system_that_returns_less_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    tensors = random_tensors()
    infos = {info.name: info for info in read_header(layout(tmp_path / SINGLE, tensors))}

    def some(fd: int, views: Any, offset: int) -> int:
        data = os.pread(fd, most, offset)
        done = 0
        for view in views:
            piece = data[done : done + len(view)]
            view[: len(piece)] = piece
            done += len(piece)
        return done

    monkeypatch.setattr(os, "preadv", some)
    same(everything(infos), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_cut_after_its_header_was_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = layout(tmp_path / SINGLE, {"x": torch.ones(1000), "y": torch.ones(1000)})
    infos = read_header(path)
    os.truncate(path, path.stat().st_size - 10)
    refused(path, "cut short", call=lambda _: everything({info.name: info for info in infos}, dtype))
    path.unlink()
    refused(path, call=lambda _: everything({info.name: info for info in infos}, dtype))


# Direct reads


@pytest.fixture
def directly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Bytes of each direct read that was made; skips where there are none."""
    try:
        (tmp_path / "probe").write_bytes(bytes(PAGE))
        os.close(os.open(tmp_path / "probe", os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        pytest.skip("this file system has no direct reads")
    honest, made = os.preadv, list[int]()

    def record(fd: int, parts: list[Any], offset: int) -> int:
        count = honest(fd, parts, offset)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            made.append(count)
        return count

    monkeypatch.setattr(os, "preadv", record)
    return made


def large_tensors() -> dict[str, Tensor]:
    """Two that direct reads are for, small ones around them, and one whose end shares a page with its begin's."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"a": 3, "b": LARGE // 2 + 77, "c": 5, "d": LARGE + 1, "e": 1, "f": LARGE // 2 - 1}
    return {name: torch.randn(size, generator=generator).to(torch.bfloat16) for name, size in sizes.items()}


def read_directly(
    infos: list[TensorInfo], phases: bool, dtype: torch.dtype = torch.bfloat16
) -> tuple[Reader, dict[str, Tensor]]:
    arena, reader = Arena(sum(padded(2 * info.bytes) for info in infos)), Reader(direct=True)
    tensors = {i.name: arena.take(i.shape, dtype, i.begin % PAGE if phases else None) for i in infos}
    reader.read({info: tensors[info.name] for info in infos})
    return reader, tensors


@pytest.mark.parametrize("gap", [0, 1, 2, 61, 4095])
@pytest.mark.parametrize("phases", [True, False])
def test_direct_reads_give_the_same_bytes(tmp_path: Path, gap: int, phases: bool, directly: list[int]) -> None:
    infos = read_header(layout(tmp_path / SINGLE, large_tensors(), gap))
    reader, tensors = read_directly(infos, phases)
    reader.close()
    same(tensors, large_tensors())
    assert reader.bytes == sum(info.bytes for info in infos)
    large = [info for info in infos if info.bytes >= LARGE]
    assert [info.name for info in large] == ["b", "d"]
    pages = sum(info.end // PAGE - -(-info.begin // PAGE) for info in large)
    assert sum(directly) == PAGE * pages  # all but what shares a page with a neighbour


def test_direct_reads_are_converted_too(tmp_path: Path, directly: list[int]) -> None:
    infos = read_header(layout(tmp_path / SINGLE, large_tensors(), gap=2))
    _, tensors = read_directly(infos, True, torch.float32)
    same(tensors, {name: tensor.float() for name, tensor in large_tensors().items()})
    assert directly


def test_a_file_system_that_refuses_direct_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directly: list[int]
) -> None:
    """Everything is there all the same, and what was read is dropped from the page cache."""
    infos = read_header(layout(tmp_path / SINGLE, large_tensors()))
    honest, refusals, dropped = os.preadv, list[int](), list[int]()

    def refuse(fd: int, parts: list[Any], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refusals.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return honest(fd, parts, offset)

    def advise(fd: int, offset: int, size: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append(size)

    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    reader, tensors = read_directly(infos, True)
    reader.close()
    same(tensors, large_tensors())
    assert len(refusals) == 1  # it is not tried again
    assert reader.bytes == sum(info.bytes for info in infos)
    assert sum(dropped) >= infos[3].bytes


def test_an_arena_sets_large_tensors_to_a_phase() -> None:
    arena = Arena(8 * LARGE)
    small = arena.take((5,), torch.uint8, phase=100)
    one, two = (arena.take((LARGE,), torch.uint8, phase=phase) for phase in (100, 0))
    assert [t.data_ptr() % PAGE for t in (small, one, two)] == [0, 100, 0]
    assert arena.used <= padded(5) + 2 * padded(LARGE)


# The reading thread


class Recorder(Reader):
    """A reader that remembers which tensors were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def read(self, wanted: Mapping[TensorInfo, Tensor]) -> None:
        super().read(wanted)
        self.seen += [info.name for info in wanted]


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "griffin-reader"]


def layers(folder: Path, count: int = 6) -> list[Load]:
    """`count` layers of one tensor each, that share two buffers."""
    buffers = [torch.zeros(1000), torch.zeros(1000)]
    tensors = {f"{i}": torch.full((1000,), float(i)) for i in range(count)}
    return [Load({info: buffers[i % 2]}) for i, info in enumerate(read_header(layout(folder / SINGLE, tensors)))]


def test_the_thread_is_never_more_than_the_ring_ahead(tmp_path: Path) -> None:
    reader, reads = Recorder(), layers(tmp_path)
    with Prefetch(reader, reads, 2) as prefetch:
        for index in range(6):
            prefetch.wait(index)
            ahead = min(index + 2, 6)
            assert until(lambda ahead=ahead: len(reader.seen) >= ahead)
            time.sleep(0.02)
            assert reader.seen == [f"{i}" for i in range(ahead)]
            (buffer,) = reads[index].read.values()
            assert buffer.eq(index).all(), "what is in the buffer stays until it is given back"
            prefetch.release()
    assert reading_threads() == []


def test_what_the_reader_raises_comes_out_of_wait(tmp_path: Path) -> None:
    reads = layers(tmp_path)
    (info,) = reads[3].read
    os.truncate(tmp_path / SINGLE, info.begin + 8)
    with Prefetch(Recorder(), reads, 2) as prefetch:
        for index in range(3):
            prefetch.wait(index)
            prefetch.release()
        with pytest.raises(CheckpointError, match="cut short"):
            prefetch.wait(3)
    assert reading_threads() == []


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_closing_in_the_middle_ends_the_thread(tmp_path: Path, after: int) -> None:
    reader = Recorder()
    with Prefetch(reader, layers(tmp_path), 2) as prefetch:
        for index in range(after):
            prefetch.wait(index)
            prefetch.release()
    assert reading_threads() == []
    assert len(reader.seen) <= after + 2
    prefetch.close()  # harmless


def test_an_exception_inside_ends_the_thread_and_a_thread_never_started_is_no_matter(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Prefetch(Recorder(), layers(tmp_path), 2):
        raise KeyboardInterrupt
    assert reading_threads() == []
    Prefetch(Recorder(), layers(tmp_path), 2).close()


# The writer


SHAPES = {"a": (3, 5), "scalar": (), "none": (0, 4), "b": (7,), "c": (16, 16), "d": (1,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", [2**32, 520, 1])
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_written_safetensors_reads(tmp_path: Path, dtype: torch.dtype, shard: int, order: int) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    with CheckpointWriter(tmp_path, SHAPES, dtype, shard) as writer:
        for name in list(SHAPES)[::order]:
            writer.write(name, tensors[name])
    found = sorted(tmp_path.glob("*.safetensors"))
    assert found == sorted(writer.files)
    assert writer.bytes == sum(path.stat().st_size for path in found)
    read: dict[str, Tensor] = {}
    for path in found:
        read |= load_file(path)
        assert (path.stat().st_size - sum(i.bytes for i in read_header(path))) % 8 == 0, "the data begins aligned"
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    same(read, tensors)
    same(everything(Checkpoint.open(tmp_path).tensors), tensors)
    if shard == 2**32:
        assert [path.name for path in found] == [SINGLE]
        assert not (tmp_path / INDEX).exists()
    else:
        assert len(found) > 1
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for path in found:
            assert {name for name, file in index["weight_map"].items() if file == path.name} == set(load_file(path))
            assert sum(tensor.nbytes for tensor in load_file(path).values()) <= max(shard, 256 * dtype.itemsize)


def test_a_tensor_never_written_or_of_another_shape_or_dtype(tmp_path: Path) -> None:
    def attempt(name: str, *tensors: Tensor) -> None:
        with CheckpointWriter(tmp_path / name, {"a": (2,), "b": (2,)}, torch.float32) as writer:
            for key, tensor in zip("ab", tensors, strict=False):
                writer.write(key, tensor)

    ok = torch.zeros(2)
    for number, tensors in enumerate(([ok], [ok, torch.zeros(3)], [ok, ok.half()], [])):
        (tmp_path / f"{number}").mkdir()
        with pytest.raises(AssertionError):
            attempt(f"{number}", *tensors)


def test_a_writer_left_with_an_error_keeps_that_error_and_closes_its_files(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, {"a": (2,)}, torch.float32):
        raise KeyboardInterrupt
    with pytest.raises(FileExistsError), CheckpointWriter(tmp_path, {"a": (2,)}, torch.float32):
        pass
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_real_checkpoint_is_read_as_safetensors_does(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    same(everything(checkpoint.tensors), load_file(tiny / SINGLE))


@pytest.mark.real
def test_a_real_model_is_read_as_safetensors_does(smol: Path) -> None:
    checkpoint = Checkpoint.open(smol)
    theirs = {n: t for path in {i.file for i in checkpoint.tensors.values()} for n, t in load_file(path).items()}
    same(everything(checkpoint.tensors), theirs)
