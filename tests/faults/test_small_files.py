"""Small files of Griffin's own, damaged: what can be made again is, and what was named is an error in one line."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from griffin_offload.cli.main import griffin
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_checkpoint

from griffin_offload.checkpoint.gguf.link import NOTE, read_link
from griffin_offload.errors import GriffinError
from griffin_offload.memory.measured import add_entry, read_entry
from griffin_offload.model import format_speeds
from griffin_offload.pruning.layer_allocation import Curves, load_curves, save_curves, share_neurons
from griffin_offload.pruning.prior import Prior, load_prior, save_prior
from griffin_offload.quant import products
from griffin_offload.quant.formats import FORMATS
from griffin_offload.small_json import as_kind, need, parse_object, read_object
from griffin_offload.sources import hub, resolve

pytestmark = pytest.mark.fault

ANSWER = ("--prompt", "x", "--sparsity", ".5", "--rest", "drop", "--max-new-tokens", "2")
HUGE = 10**400

# What any file of ours may be by the time it is read. None: a folder in its place.
CONTENTS: dict[str, bytes | None] = {
    "empty": b"",
    "cut_off": b'{"a": [1, 2',
    "not_utf8": b"\xff\xfe{}",
    "zeros": b"\0" * 500,
    "list": b"[1, 2]",
    "number": b"5",
    "null": b"null",
    "text": b'"last"',
    "nested_deep": b"[" * 100_000,
    "objects_nested_deep": b'{"a":' * 100_000,
    "number_of_5000_digits": b'{"a": ' + b"9" * 5000 + b"}",
    "another_s": b'{"hello": "world"}',
    "folder": None,
}


def put(path: Path, content: bytes | None) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(griffin, [str(argument) for argument in arguments])


def failed(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.rstrip("\n").isprintable()
    assert len(result.stderr) < 1000
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("small") / "llama", "llama", chat=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# The loader


@pytest.mark.parametrize("kind", [kind for kind in CONTENTS if kind != "another_s"])
def test_the_loader_takes_an_object_alone(kind: str, tmp_path: Path) -> None:
    put(tmp_path / "x.json", CONTENTS[kind])
    with pytest.raises((OSError, ValueError)) as refused:
        read_object(tmp_path / "x.json")
    assert not isinstance(refused.value, RecursionError)


@pytest.mark.parametrize("place", ["/dev/zero", "fifo", "large", "loop"])
def test_the_loader_waits_for_nothing_and_reads_no_more_than_its_limit(place: str, tmp_path: Path) -> None:
    path = Path(place) if place.startswith("/") else tmp_path / place
    if place == "fifo":
        os.mkfifo(path)
    if place == "large":
        path.touch()
        os.truncate(path, 2**40)
    if place == "loop":
        path.symlink_to(path)
    begin = time.monotonic()
    with pytest.raises(OSError, match=re.escape(str(path))):
        read_object(path)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, int),
        (1.0, int),
        ("1", int),
        (None, int),
        (True, float),
        (HUGE, float),
        (float("inf"), float),
        (float("nan"), float),
        (1, str),
        ("\ud800", str),
        ({}, list),
        ([], dict),
        (0, bool),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(value: object, kind: type) -> None:
    with pytest.raises(ValueError, match=r"^the field is not"):
        as_kind(value, kind, "the field")


def test_a_value_of_the_kind_is_taken() -> None:
    content = parse_object('{"whole": 3, "number": 2, "text": "x", "list": [], "yes": true}')
    assert need(content, "whole", int) == 3
    assert type(need(content, "number", float)) is float
    assert (need(content, "text", str), need(content, "list", list), need(content, "yes", bool)) == ("x", [], True)
    with pytest.raises(ValueError, match="gone is missing"):
        need(content, "gone", int)


# The last report


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_damaged_last_report(kind: str, cache: Path) -> None:
    put(cache / "last.json", CONTENTS[kind])
    failed(run("mem-report", "--last"), "last")


FIELDS = [
    ("sparsity",),
    ("model",),
    ("dtype",),
    ("device",),
    ("memory", "planned_peak_bytes"),
    ("memory", "measured_peak_bytes"),
    ("memory", "planned_host_peak_bytes"),
    ("memory", "budget_bytes"),
    ("io", "checkpoint_bytes"),
    ("io", "bytes_read"),
    ("timings", "limit_tokens_per_s"),
    ("timings", "decode_tokens_per_s"),
    ("timings", "expected_tokens_per_s"),
    ("memory",),
    ("io",),
    ("timings",),
]


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last report of a run."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRIFFIN_CACHE", str(folder))
        assert run("generate", "--model", model, *ANSWER).exit_code == 0
    return read_object(folder / "last.json")


@pytest.mark.parametrize("field", FIELDS, ids=".".join)
def test_a_field_of_the_last_report_may_be_anything(
    field: tuple[str, ...], report: dict[str, Any], cache: Path
) -> None:
    refused = 0
    for value in (None, "x", [], {}, True, HUGE, -1, 0, 1e308, "\x1b[2J", ...):
        content = json.loads(json.dumps(report))
        place = content if len(field) == 1 else content[field[0]]
        place[field[-1]] = value
        if value is ...:
            del place[field[-1]]
        put(cache / "last.json", json.dumps(content).encode())
        result = run("mem-report", "--last")
        assert "\x1b" not in result.output
        if result.exit_code:
            failed(result)
            refused += 1
    assert refused >= 4


# What a run measures once: damaged, it is measured again


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", ["products.json", "speeds.json", "calibration", "prior"])
def test_a_damaged_cache_is_no_matter(name: str, kind: str, model: Path, cache: Path) -> None:
    from griffin_offload import Engine
    from griffin_offload.checkpoint.key import checkpoint_key

    key = checkpoint_key(Engine(model).checkpoint)[:16]
    path = {"calibration": cache / name / f"{key}.json", "prior": cache / name / f"{key}.safetensors"}
    put(path.get(name, cache / name), CONTENTS[kind])
    result = run("generate", "--model", model, *ANSWER)
    assert result.exit_code == 0, result.output
    assert "error" not in result.stderr


ENTRIES: dict[str, Any] = {
    "a_list": [1],
    "no_time": {"bytes_per_s": 1},
    "time_a_text": {"time": "now"},
    "time_huge": {"time": HUGE},
    "time_infinite": {"time": float("inf")},
    "time_true": {"time": True},
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_entry_that_cannot_be_is_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"here": ENTRIES[kind], "there": {"time": 5.0, "x": 1}}))
    assert read_entry(path, "here") == (0.0, {})
    add_entry(path, "here", x=2)
    assert read_entry(path, "here")[1]["x"] == 2
    assert read_entry(path, "there")[1]["x"] == 1, "the others stay"


@pytest.mark.parametrize("value", [0, -1.0, 1e-320, 1e308, HUGE, "fast", None, True, [1], float("nan")], ids=str)
def test_a_speed_that_cannot_be_is_measured_again(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    add_entry(path, "key", bytes_per_s={**dict.fromkeys(FORMATS, 1e9), next(iter(FORMATS)): value})
    assert format_speeds._load(path, "key") == (0.0, None)
    add_entry(path, "key", seconds={"torch": [value] * len(products.TRIED), "blocks": [1.0] * len(products.TRIED)})
    found = products._valid(read_entry(path, "key")[1])
    assert found is None or value in (1e-320, 1e308)


# Curves


CURVES = Curves("k", (0.0, 0.5, 1.0), 0.5, ((2.0, 1.0, 0.0),) * 3, "t", 8, 4, 1, "float32")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kl", [[HUGE] * 3] * 3),
        ("kl", [[1e200, 1.0, -1e200]] * 3),
        ("kl", [[float("nan")] * 3] * 3),
        ("kl", [["a"] * 3] * 3),
        ("kl", [[1.0]] * 3),
        ("kl", [1.0]),
        ("kl", []),
        ("shares", [0.0, 0.5, HUGE]),
        ("shares", "0.5"),
        ("shares", [1.0, 0.5, 0.0]),
        ("others", "0.5"),
        ("others", HUGE),
        ("others", 0.3),
        ("windows", 0),
        ("windows", True),
        ("prompt_tokens", "8"),
        ("key", 5),
        ("dtype", "\ud800"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:12],
)
def test_curves_with_a_field_that_cannot_be(field: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    save_curves(path, CURVES)
    assert load_curves(path) == CURVES
    assert sum(share_neurons(CURVES, [16] * 3, 0.5)) == 24
    path.write_text(json.dumps(read_object(path) | {field: value}))
    with pytest.raises(GriffinError, match=r"is not a calibration \(.*; `griffin calibrate --force` writes a new one"):
        load_curves(path)


def test_curves_that_are_named_are_an_error(model: Path, cache: Path) -> None:
    from griffin_offload import Engine
    from griffin_offload.checkpoint.key import checkpoint_key

    path = cache / "calibration" / f"{checkpoint_key(Engine(model).checkpoint)[:16]}.json"
    put(path, b"{}")
    failed(run("generate", "--model", model, *ANSWER, "--allocation", "sensitivity"), "is not a calibration")
    few = ("--prompt-tokens", "16", "--continue-tokens", "4", "--windows", "1")
    failed(run("calibrate", "--model", model, *few), "--force")
    assert run("calibrate", "--model", model, *few, "--force").exit_code == 0
    assert load_curves(path)


# Priors


def tensors_of(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
PRIORS: dict[str, Change] = {
    "layers_infinite": lambda facts, tensors: facts.update(layers=float("inf")),
    "layers_huge": lambda facts, tensors: facts.update(layers=10**12),
    "layers_negative": lambda facts, tensors: facts.update(layers=-1),
    "layers_none": lambda facts, tensors: facts.update(layers=None),
    "score_a_list": lambda facts, tensors: facts.update(score=[1]),
    "model_a_number": lambda facts, tensors: facts.update(model=5),
    "samples_a_text": lambda facts, tensors: facts.update(samples="many"),
    "seconds_a_text": lambda facts, tensors: facts.update(measured_s="long"),
    "half_a_character": lambda facts, tensors: facts.update(score="\ud800"),
    "float8": lambda facts, tensors: tensors.update({"0.0": tensors["0.0"].to(torch.float8_e4m3fn)}),
    "complex": lambda facts, tensors: tensors.update({"0.0": tensors["0.0"].to(torch.complex64)}),
    "whole_numbers": lambda facts, tensors: tensors.update({"0.0": tensors["0.0"].to(torch.int64)}),
    "negative": lambda facts, tensors: tensors["0.0"].neg_().sub_(1),
    "infinite": lambda facts, tensors: tensors["0.0"].fill_(float("inf")),
    "no_number": lambda facts, tensors: tensors["0.0"].fill_(float("nan")),
    "another_shape": lambda facts, tensors: tensors.update({"0.0": torch.ones(3)}),
    "no_shape": lambda facts, tensors: tensors.update({"0.0": torch.ones(())}),
    "no_layer": lambda facts, tensors: tensors.pop("0.0"),
    "odd_names": lambda facts, tensors: tensors.update({"x.y.z": torch.ones(3)}) or tensors.pop("1.0"),
}


@pytest.mark.parametrize("kind", PRIORS)
def test_a_damaged_prior_is_one_line(kind: str, model: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the quick brown fox " * 50)
    few = ("--calibration", tmp_path / "t.txt", "--samples", "1", "--tokens", "32", "--prior-out", tmp_path / "prior")
    assert run("export-pruned", "--model", model, *few).exit_code == 0
    metadata, tensors = tensors_of(tmp_path / "prior")
    facts = json.loads(metadata["facts"])
    PRIORS[kind](facts, tensors)
    save_file(tensors, tmp_path / "prior", metadata | {"facts": json.dumps(facts)})
    failed(run("generate", "--model", model, *ANSWER, "--prior", tmp_path / "prior"), "prior")


@pytest.mark.parametrize("facts", ["[" * 100_000, "", "5", "{}", '{"layers": ' + "9" * 5000 + "}"], ids=lambda t: t[:9])
def test_facts_of_a_prior_may_be_anything(facts: str, tmp_path: Path) -> None:
    save_prior(tmp_path / "prior", Prior(((torch.ones(3),),)))
    metadata, tensors = tensors_of(tmp_path / "prior")
    save_file(tensors, tmp_path / "prior", metadata | {"facts": facts})
    with pytest.raises(GriffinError, match="is not a prior") as refused:
        load_prior(tmp_path / "prior")
    assert len(str(refused.value)) < 900


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_that_is_no_prior(kind: str, tmp_path: Path) -> None:
    put(tmp_path / "prior", CONTENTS[kind])
    with pytest.raises(GriffinError, match="is not a prior"):
        load_prior(tmp_path / "prior")


# The hub's cache, and notes in our own


HUB: dict[str, tuple[str, bytes | None]] = {
    "ref_not_utf8": ("refs/main", b"\xff\xfe"),
    "ref_empty": ("refs/main", b""),
    "ref_with_a_null": ("refs/main", b"ab\0c"),
    "ref_elsewhere": ("refs/main", b"../../../elsewhere"),
    "ref_absolute": ("refs/main", b"/etc"),
    "ref_long": ("refs/main", b"x" * 5000),
    "ref_a_folder": ("refs/main", None),
    "index_of_numbers": ("snapshots/abc/model.safetensors.index.json", b'{"weight_map": {"a": 5}}'),
    "index_of_long_names": (
        "snapshots/abc/model.safetensors.index.json",
        b'{"weight_map": {"a": "%s"}}' % (b"x" * 5000),
    ),
    "index_nested_deep": ("snapshots/abc/model.safetensors.index.json", b"[" * 100_000),
    "index_a_folder": ("snapshots/abc/model.safetensors.index.json", None),
    "config_nested_deep": ("snapshots/abc/config.json", b"[" * 100_000),
    "config_a_list": ("snapshots/abc/config.json", b"[]"),
    "config_not_utf8": ("snapshots/abc/config.json", b"\xff"),
    "config_a_folder": ("snapshots/abc/config.json", None),
    "model_type_a_list": ("snapshots/abc/config.json", b'{"model_type": ["llama"]}'),
    "weights_named_5": ("snapshots/abc/config.json", b'{"model_type": "llama", "transformers_weights": 5}'),
}


@pytest.mark.parametrize("kind", HUB)
def test_a_damaged_hub_cache_hides_one_model_alone(
    kind: str, model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(model, tmp_path / "elsewhere")
    for name in ("good", "bad"):
        repository = tmp_path / "hub" / f"models--own--{name}"
        (repository / "refs").mkdir(parents=True)
        shutil.copytree(model, repository / "snapshots" / "abc")
        (repository / "refs" / "main").write_text("abc")
    single = tmp_path / "hub" / "models--own--bad" / "snapshots" / "abc" / "model.safetensors"
    if "index" in kind:
        single.unlink()
    where, content = HUB[kind]
    put(tmp_path / "hub" / "models--own--bad" / where, content)
    result = run("models", "--json")
    assert result.exit_code == 0, result.output
    names = [row["name"] for row in json.loads(result.stdout)]
    assert "own/good" in names
    assert "own/bad" not in names
    found = hub.snapshot_of(tmp_path / "hub" / "models--own--bad")
    assert found is None or found.is_relative_to(tmp_path / "hub")
    answer = run("generate", "--model", "own/bad", "--prompt", "x", "--max-new-tokens", "1")
    if answer.exit_code:
        failed(answer)


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_damaged_note_of_where_a_model_came_from(kind: str, tmp_path: Path) -> None:
    put(tmp_path / resolve.NOTE, CONTENTS[kind])
    assert resolve.origin(tmp_path) == ""
    assert read_link(tmp_path) is None


@pytest.mark.parametrize(
    "note",
    [
        {"source": 5, "size": 1, "mtime_ns": 1, "tensors": {}},
        {"source": "x", "size": float("inf"), "mtime_ns": 1, "tensors": {}},
        {"source": "x", "size": 1, "mtime_ns": None, "tensors": {}},
        {"source": "x", "size": 1, "mtime_ns": 1, "tensors": [1]},
        {"source": "x", "size": 1, "mtime_ns": 1, "tensors": {"a": {"shape": 5}}},
        {"source": "x", "size": 1, "mtime_ns": 1, "tensors": {"a": {}}},
    ],
    ids=["source", "infinite", "none", "list", "shape", "fields"],
)
def test_a_note_with_a_field_that_cannot_be(note: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / NOTE).write_text(json.dumps(note))
    assert read_link(tmp_path) is None


# Settings, state, history


@pytest.mark.parametrize("kind", [*CONTENTS, "nested_toml", "missing"])
def test_a_damaged_settings_file_is_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "griffin.toml"
    monkeypatch.setenv("GRIFFIN_CONFIG", str(path))
    if kind != "missing":
        put(path, b"a = " + b"[" * 100_000 if kind == "nested_toml" else CONTENTS[kind])
    for command in (("config",), ("models",)):
        result = run(*command)
        if kind == "empty":
            assert result.exit_code == 0
        else:
            failed(result, "griffin.toml")


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_damaged_history_starts_anew(kind: str, tmp_path: Path) -> None:
    from griffin_offload.cli._terminal import _history

    put(tmp_path / "history", CONTENTS[kind])
    history = _history(tmp_path / "history")
    list(history.load_history_strings())
    history.append_string("hello")


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("place", ["state", "cache"])
def test_a_file_or_a_folder_where_ours_would_be(
    place: str, kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache or the state cannot be written: an answer does not need them."""
    path = tmp_path / place
    put(path, CONTENTS[kind])
    monkeypatch.setenv(f"GRIFFIN_{place.upper()}", str(path))
    assert run("generate", "--model", model, *ANSWER).exit_code == 0
    assert run("models").exit_code == 0
    assert run("sessions").exit_code == 0
