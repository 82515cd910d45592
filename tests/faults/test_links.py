"""Links and names that lead out of a checkpoint's folder: nothing that they point to is read as weights, or copied."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.checkpoint.headers import Checkpoint
from griffin_offload.checkpoint.inside import inside
from griffin_offload.checkpoint.which_files import INDEX
from griffin_offload.errors import CheckpointError, ExportError

pytestmark = pytest.mark.fault

PROMPT = tiny_prompt(8)
SECRET = "TOP SECRET"
NAMES = """LICENSE LICENSE.md NOTICE NOTICE.txt USE_POLICY.md tokenizer_notes.txt tokenizer.model added_tokens.json
    chat_template.jinja vocab.json merges.txt special_tokens_map.json""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("links") / "m", "llama")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text(SECRET)
    return Path(shutil.copytree(made, tmp_path / "m"))


def export(engine: Engine, out: Path, format: str = "safetensors") -> None:
    engine.export(PROMPT, out, sparsity=0.5, prior="off", prompt_text="x", format=format)


def refuses(engine: Engine, out: Path, name: str, format: str = "safetensors") -> None:
    with pytest.raises(ExportError, match=f"{name} is a link out of the folder"):
        export(engine, out, format)
    assert not out.exists()
    assert not [path for path in out.parent.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_behind_a_link_is_not_exported(model: Path, tmp_path: Path, name: str) -> None:
    engine = Engine(model)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    refuses(engine, tmp_path / "out", name)
    refuses(engine, tmp_path / "out.gguf", name, "gguf")


def chain(path: Path, secret: Path) -> None:
    path.with_name("a").symlink_to(secret)
    path.with_name("b").symlink_to("a")
    path.symlink_to("b")


def through_a_folder(path: Path, secret: Path) -> None:
    path.with_name("up").symlink_to("..")
    path.symlink_to(Path("up") / secret.name)


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "absolute": lambda path, secret: path.symlink_to(secret),
    "relative": lambda path, secret: path.symlink_to(Path("..") / secret.name),
    "dots": lambda path, secret: path.symlink_to(Path("../m/../m/..") / secret.name),
    "chain": chain,
    "through_a_folder": through_a_folder,
    "proc": lambda path, secret: path.symlink_to("/proc/self/cmdline"),
}


@pytest.mark.parametrize("way", LINKS)
def test_ways_of_linking(model: Path, tmp_path: Path, way: str) -> None:
    LINKS[way](model / "NOTICE", tmp_path / "secret")
    refuses(Engine(model), tmp_path / "out", "NOTICE")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_read_through_a_link_are_not_exported(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    engine = Engine(model)
    assert engine.generate(PROMPT, sparsity=0.5, max_new_tokens=2, prior="off").token_ids
    refuses(engine, tmp_path / "out", name)


@pytest.mark.parametrize("target", ["nothing", "LICENSE", "."])
def test_links_to_nothing_to_themselves_and_to_folders_are_left_out(model: Path, tmp_path: Path, target: str) -> None:
    engine = Engine(model)
    (model / "LICENSE").symlink_to(target)
    export(engine, tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE").exists()


def test_a_link_within_the_folder_is_copied(model: Path, tmp_path: Path) -> None:
    (model / "docs").mkdir()
    (model / "docs" / "LICENSE").write_text("free")
    (model / "LICENSE").symlink_to("docs/LICENSE")
    export(Engine(model), tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()


def test_the_hubs_cache_is_links_and_works(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (model / "LICENSE").write_text("free")
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    engine = Engine(snapshot)
    export(engine, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    (snapshot / "NOTICE").symlink_to("../../../secret")
    refuses(engine, tmp_path / "again", "NOTICE")


def test_a_folder_that_is_a_link_itself_works(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("m")
    export(Engine(tmp_path / "link"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/../../secret", "x\0y", "x\ny", "\x1b[2J", "x" * 300, "m/" * 2000, "", "linked"],
    ids=["up", "absolute", "up_from_a_folder", "nul", "line", "escape", "long", "deep", "empty", "link"],
)
def test_an_index_that_names_files_elsewhere(tmp_path: Path, name: str) -> None:
    model = tiny_checkpoint(tmp_path / "m", "llama", shards=2)
    (tmp_path / "secret").write_text(SECRET)
    (model / "linked").symlink_to("../secret")
    index = json.loads((model / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(model)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["model.safetensors"])
def test_weights_behind_a_link_out_are_refused_as_before(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a link, which leaves the folder"):
        Engine(model)


@pytest.mark.parametrize(
    ("file", "key"), [("config.json", "configuration_files"), ("tokenizer_config.json", "fast_tokenizer_files")]
)
@pytest.mark.parametrize("named", ["../config.4.0.0.json", "/etc/tokenizer.4.0.0.json", 7, "a/tokenizer.1.0.json"])
def test_other_versions_of_a_file_are_in_the_folder(model: Path, file: str, key: str, named: object) -> None:
    facts = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**facts, key: [named]}))
    with pytest.raises(CheckpointError, match=f"{key} names .* which is no file of the folder"):
        Engine(model)


def test_what_is_inside(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "loop").symlink_to("loop")
    (tmp_path / "mm").write_text("beside")
    assert inside(folder, folder / "none")
    assert not inside(folder, folder / "../mm")
    assert not inside(folder, tmp_path / "mm")
