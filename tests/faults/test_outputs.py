"""No output is lost or overwritten, no input is an output, and a job that ended well ends well again."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from disk import files
from faults.commands import Inputs, Outcome, make_inputs, places, run_line
from faults.injection import Faults
from griffin_offload.cli._signals import Stopped

from griffin_offload.engine import Engine
from griffin_offload.errors import ExportError, GriffinError
from griffin_offload.files import write_whole
from griffin_offload.jsonl import Results, read_content, read_rows
from griffin_offload.pruning.prior import load_prior

pytestmark = pytest.mark.fault
PLAIN = {"prompt_text": "x", "sparsity": 0.5, "fold": False, "prior": "off"}
SHORT = ("--sparsity", "0.5", "--rest", "drop", "--prior", "off", "--no-fold", "--greedy", "--max-new-tokens", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("outputs"))


@pytest.fixture
def inputs(made: Inputs, tmp_path: Path) -> Iterator[Inputs]:
    """A copy that a fault may change; the cache and the folder for temporary files are the test's own."""
    folder = shutil.copytree(made.folder, tmp_path / "in", copy_function=shutil.copy2)
    with places(tmp_path / "places"):
        yield Inputs(folder)


def many(inputs: Inputs, source: object, output: object, *options: str) -> Outcome:
    given = ("--input", str(source), "--output", str(output), *SHORT, *options)
    return run_line(("generate", "--model", inputs["model"], *given))


def export(inputs: Inputs, out: object, *options: str) -> Outcome:
    if "--prompt-file" not in options:
        options = ("--prompt-file", inputs["p.txt"], *options)
    return run_line(("export-pruned", "--model", inputs["model"], *options, "--out", str(out)))


# An output that somebody else touches while it is written


def deleted(out: Path) -> None:
    out.unlink()


def replaced(out: Path) -> None:
    out.rename(out.with_name("moved"))
    out.write_text("mine\n")


def with_its_folder(out: Path) -> None:
    shutil.rmtree(out.parent)


def emptied(out: Path) -> None:
    out.write_text("")


def added_to(out: Path) -> None:
    with out.open("a") as file:
        file.write("mine\n")


@pytest.mark.parametrize("at", ["in the middle", "at the end"])
@pytest.mark.parametrize("touch", [deleted, replaced, with_its_folder, emptied, added_to])
def test_results_that_are_touched_while_they_are_written(
    inputs: Inputs, tmp_path: Path, touch: Callable[[Path], None], at: str
) -> None:
    out = tmp_path / "results" / "o.jsonl"
    out.parent.mkdir()

    def run() -> None:
        with Results(out, {}, source=Path(inputs["rows.jsonl"])) as results:
            results.add({"id": 1})
            touch(out)
            if at == "in the middle":
                results.add({"id": 2})

    with pytest.raises(GriffinError, match=r"cannot write to .*o\.jsonl"):
        run()
    if touch is deleted:
        assert not list(out.parent.iterdir())
    if touch is replaced:
        assert out.read_text() == "mine\n"


@pytest.mark.parametrize("name", ["out", "o.gguf"])
def test_an_export_whose_files_are_removed_while_it_is_written(inputs: Inputs, tmp_path: Path, name: str) -> None:
    def remove(done: int, total: int) -> None:
        for work in tmp_path.glob(".griffin-*"):
            for path in [*work.rglob("*.safetensors"), *work.rglob("*.gguf")]:
                path.unlink()

    form = "gguf" if name.endswith("gguf") else "safetensors"
    with pytest.raises(ExportError, match="removed or replaced while it was written"):
        Engine(inputs["model"]).export([1, 9, 8], tmp_path / name, on_layer=remove, format=form, **PLAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "places"]


# Two at once


@pytest.mark.parametrize("name", ["out", "o.gguf"])
def test_two_exports_to_one_new_place(inputs: Inputs, tmp_path: Path, name: str) -> None:
    """The one that ends first stays."""
    form = "gguf" if name.endswith("gguf") else "safetensors"
    options = {"format": form, **PLAIN}

    def other(done: int, total: int) -> None:
        if done == 1:
            Engine(inputs["model"]).export([1, 7], tmp_path / name, **options)

    with pytest.raises(ExportError, match="written by another program meanwhile"):
        Engine(inputs["model"]).export([1, 9, 8], tmp_path / name, on_layer=other, **options)
    Engine(inputs["model"]).export([1, 7], tmp_path / "again.gguf" if form == "gguf" else tmp_path / "again", **options)
    assert files(tmp_path / name) == files(tmp_path / "again")
    if form == "gguf":
        assert (tmp_path / name).read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert not list(tmp_path.glob(".griffin-*"))


def test_a_prior_that_another_run_wrote_meanwhile_is_left_alone(inputs: Inputs, tmp_path: Path) -> None:
    path = tmp_path / "new"

    def write() -> None:
        with write_whole(path, new=True) as temporary:
            temporary.write_text("ours")
            path.write_text("another's")

    with pytest.raises(FileExistsError):
        write()
    assert path.read_text() == "another's"


def test_a_new_file_where_the_disk_knows_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    path = tmp_path / "new"
    with write_whole(path, new=True) as temporary:
        temporary.write_text("ours")
    assert path.read_text() == "ours"
    with pytest.raises(FileExistsError), write_whole(path, new=True) as temporary:
        temporary.write_text("theirs")
    assert path.read_text() == "ours"


# What --force may remove


@pytest.mark.parametrize("what", ["griffin.json alone", "another file", "a folder", "a link", "a damaged griffin.json"])
def test_force_deletes_nothing_that_no_export_wrote(inputs: Inputs, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    if what == "griffin.json alone":
        out.mkdir()
        (out / "griffin.json").write_text("{}")
    else:
        assert export(inputs, out).code == 0
    if what == "another file":
        (out / "thesis.txt").write_text("mine")
    elif what == "a folder":
        (out / "thesis").mkdir()
    elif what == "a link":
        (out / "config.json").unlink()
        (out / "config.json").symlink_to(inputs["p.txt"])
    elif what == "a damaged griffin.json":
        (out / "griffin.json").write_text("[" * 5000)
    before = sorted(path.name for path in out.iterdir())
    result = export(inputs, out, "--force", "--seed", "1")
    assert result.code == 0, result.stderr
    assert "the previous content is now in" in result.stderr
    (backup,) = tmp_path.glob("out.backup-*")
    assert sorted(path.name for path in backup.iterdir()) == before


def test_force_that_fails_keeps_what_was_there(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(inputs, out).code == 0
    before = files(out)

    def stop(done: int, total: int) -> None:
        if done == total:
            raise OSError(5, "no")

    with pytest.raises(ExportError):
        Engine(inputs["model"]).export([1, 9, 8], out, force=True, on_layer=stop, **PLAIN)
    assert files(out) == before


class Killed(Faults):
    """Where a fault would be, the process ends."""

    def tick(self, name: str) -> None:
        try:
            super().tick(name)
        except OSError:
            raise KeyboardInterrupt from None


def stopped(out: Path, source: Path, seed: int, *, force: bool = False, at: int = 0) -> bool:
    """A run that is killed after its first row, or at its call `at`, if there is one: whether there was."""
    with (
        suppress(KeyboardInterrupt),
        Killed(at) as killed,
        Results(out, {"seed": seed}, source=source, force=force) as results,
    ):
        killed.at = killed.at or killed.calls + 2  # it is written, and put on the disk next
        results.add({"id": 1, "text": f"by seed {seed}"})
    return bool(killed.hit)


def test_rows_of_a_run_never_get_the_settings_of_another(tmp_path: Path) -> None:
    """--force, killed at whatever moment: the old rows are not gone on with."""
    source, out = tmp_path / "in.jsonl", tmp_path / "o.jsonl"
    source.write_text('{"prompt": "a"}\n')
    at = 1
    while True:
        for path in (out, out.with_name("o.jsonl.state")):
            path.unlink(missing_ok=True)
        assert stopped(out, source, seed=0)
        assert "by seed 0" in out.read_text()
        if not stopped(out, source, seed=1, force=True, at=at):
            break
        with suppress(GriffinError), Results(out, {"seed": 1}, source=source) as results:
            assert [row["text"] for row in results.rows] in ([], ["by seed 1"])
        at += 1
    assert at > 10


@pytest.mark.parametrize("name", ["o.png", "o.pdf", "o.svg"])
def test_a_figure_replaces_figures_alone(inputs: Inputs, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    command = ("plot", "statistic", "--model", inputs["model"], "--prompt-file", inputs["p.txt"], "--out", str(out))
    out.write_text("a photograph")
    refused = run_line(command)
    assert (refused.code, out.read_text()) == (1, "a photograph")
    assert "--force" in refused.stderr
    for options in (("--force",), ()):
        result = run_line((*command, *options))
        assert result.code == 0, result.stderr


def test_the_scores_of_questions_replace_nothing(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    out.write_text("mine")
    command = ("eval", "choice", "--model", inputs["model"], "--data", inputs["choice.jsonl"], "--out", str(out))
    refused = run_line(command)
    assert (refused.code, out.read_text()) == (1, "mine")
    assert "--force" in refused.stderr
    assert run_line((*command, "--force")).code == 0


# No input is an output


def hard(source: str, path: Path) -> Path:
    os.link(source, path)
    return path


def soft(source: str, path: Path) -> Path:
    path.symlink_to(source)
    return path


def same(source: str, path: Path) -> Path:
    return Path(source)


GENERATE = ("generate", "--model", "{model}", "--max-new-tokens", "1")
EXPORT = ("export-pruned", "--model", "{model}", "--force")
CONFUSED = {
    "generate: the input": (*GENERATE, "--input", "{rows.jsonl}", "--output", "<rows.jsonl>", "--force"),
    "generate: the model's config": (
        *GENERATE,
        "--input",
        "{rows.jsonl}",
        "--output",
        "<model/config.json>",
        "--force",
    ),
    "generate: the prior": (
        *(*GENERATE, "--input", "{rows.jsonl}", "--prior", "{prior.safetensors}", "--output", "<prior.safetensors>"),
        "--force",
    ),
    "generate: the shares": (
        *(*GENERATE, "--input", "{rows.jsonl}", "--sparsity", "{shares.txt}", "--output", "<shares.txt>", "--force"),
    ),
    "generate: the prompt as its page": (*GENERATE, "--prompt-file", "{page.html}", "--report", "<page.html>"),
    "export: the prompt": (*EXPORT, "--format", "gguf", "--prompt-file", "{p.gguf}", "--out", "<p.gguf>"),
    "export: the model": (
        *("export-pruned", "--model", "{model.gguf}", "--force", "--format", "gguf"),
        *("--prompt", "a b", "--out", "<model.gguf>"),
    ),
    "export: the texts": (*EXPORT, "--calibration", "{texts.jsonl}", "--prior-out", "<texts.jsonl>"),
    "export: the texts with a share": (*EXPORT, "--calibration", "{texts.jsonl}:2", "--prior-out", "<texts.jsonl>"),
    "eval choice: the questions": (
        *("eval", "choice", "--model", "{model}", "--data", "{choice.jsonl}", "--out", "<choice.jsonl>", "--force"),
    ),
    "eval summarise: the articles": (
        *(
            "eval",
            "summarise",
            "--model",
            "{model}",
            "--data",
            "{articles.jsonl}",
            "--out",
            "<articles.jsonl>",
            "--force",
        ),
    ),
    "eval compare: the text": (
        *("eval", "compare", "--model", "{model}", "--text", "{long.txt}", "--out", "<long.txt>", "--force"),
    ),
    "eval compare: the summaries": (
        *("eval", "compare", "--model", "{model}", "--text", "{long.txt}", "--summaries", "{articles.jsonl}"),
        *("--out", "<articles.jsonl>", "--force"),
    ),
    "plot: the prompt": (
        *("plot", "statistic", "--model", "{model}", "--prompt-file", "{p.svg}", "--out", "<p.svg>", "--force"),
    ),
    "plot: the results": ("plot", "compare", "--results", "{p.svg}", "--out", "<p.svg>", "--force"),
    "bench: the prompt": ("bench", "--model", "{model}", "--prompt-file", "{p.svg}", "--plot", "<p.svg>"),
}


@pytest.mark.parametrize("through", [same, soft, hard])
@pytest.mark.parametrize("name", CONFUSED)
def test_no_input_is_an_output(inputs: Inputs, tmp_path: Path, name: str, through: Callable[[str, Path], Path]) -> None:
    for text in ("page.html", "p.gguf", "p.svg"):
        (inputs.folder / text).write_text("What is it?")
    (inputs.folder / "shares.txt").write_text("0.5, 0.5")
    words = []
    for word in CONFUSED[name]:
        if word.startswith("<"):
            source = Path(inputs[word[1:-1]])
            word = str(through(str(source), tmp_path / f"link{source.suffix}"))  # noqa: PLW2901
        words.append(word.replace("{", f"{inputs.folder}/").replace("}", ""))
    before = files(inputs.folder)
    result = run_line(tuple(words))
    assert (result.code, result.traceback) == (1, None), result.stderr
    assert "of the input" in result.stderr
    assert files(inputs.folder) == before


def test_the_state_of_results_is_no_input(inputs: Inputs, tmp_path: Path) -> None:
    source = shutil.copy(inputs["rows.jsonl"], tmp_path / "q.state")
    before = Path(source).read_bytes()
    result = many(inputs, source, tmp_path / "q")
    assert result.code == 1
    assert "of the input" in result.stderr
    assert Path(source).read_bytes() == before


def test_an_export_replaces_no_folder_that_holds_an_input(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(inputs["p.txt"], out)
    result = export(inputs, out, "--force", "--prompt-file", str(out / "p.txt"))
    assert result.code == 1
    assert "which is an input" in result.stderr
    assert [path.name for path in out.iterdir()] == ["p.txt"]


@pytest.mark.parametrize("name", ["model/out", "model/o.gguf", "model/sub/deep"])
def test_no_export_goes_among_the_models_files(inputs: Inputs, name: str) -> None:
    form = ("--format", "gguf") if name.endswith("gguf") else ()
    before = files(inputs.folder)
    result = export(inputs, inputs[name], *form)
    assert result.code == 1
    assert "among the model's files" in result.stderr
    assert files(inputs.folder) == before


def test_two_outputs_are_two(inputs: Inputs, tmp_path: Path) -> None:
    both = ("--out", str(tmp_path / "x"), "--prior-out", str(tmp_path / "in" / ".." / "x"))
    result = run_line(("export-pruned", "--model", inputs["model"], "--calibration", inputs["texts.jsonl"], *both))
    assert result.code == 1
    assert "two outputs" in result.stderr


def test_a_pipe_is_known_by_what_came_through_it(tmp_path: Path) -> None:
    """Another run's prompts do not get this one's answers."""
    out = tmp_path / "o.jsonl"

    def run(prompt: str) -> list[dict[str, object]]:
        reading, writing = os.pipe()
        os.write(writing, json.dumps({"prompt": prompt}).encode())
        os.close(writing)
        try:
            source = Path(f"/dev/fd/{reading}")
            content = read_content(source)
            with Results(out, {}, source=source, content=content) as results:
                for row in read_rows(source, content=content):
                    if not results.has(row):
                        results.add({"id": row["id"], "text": f"an answer to {row['prompt']}"})
                        raise KeyboardInterrupt
                return results.rows
        finally:
            os.close(reading)

    with pytest.raises(KeyboardInterrupt):
        run("Who?")
    with pytest.raises(GriffinError, match="begun with input"):
        run("Where?")
    assert run("Who?") == [{"id": 1, "text": "an answer to Who?"}]


# Once more


def again(command: tuple[str, ...], *outs: Path) -> Outcome:
    """The command twice: it ends well twice, and changes nothing the second time."""
    first = run_line(command)
    assert first.code == 0, first.stderr
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in outs]
    second = run_line(command)
    assert second.code == 0, second.stderr
    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in outs] == before
    return second


def finished(inputs: Inputs, place: Path) -> dict[str, tuple[tuple[str, ...], tuple[str, ...], str]]:
    """Name -> command, its outputs, and what it says at the second time."""
    model, out = ("--model", inputs["model"]), str(place / "out")
    texts = ("--calibration", inputs["texts.jsonl"], "--samples", "2", "--tokens", "16")
    prompt = ("--prompt-file", inputs["p.txt"])
    return {
        "generate": (
            ("generate", *model, "--input", inputs["rows.jsonl"], "--output", out, *SHORT),
            (out,),
            "are answered already",
        ),
        "export": (("export-pruned", *model, *prompt, "--out", out), (out,), "is there already"),
        "export --json": (("export-pruned", *model, *prompt, "--out", out, "--json"), (out,), "is there already"),
        "export gguf": (
            ("export-pruned", *model, *prompt, "--format", "gguf", "--out", f"{out}.gguf"),
            (f"{out}.gguf",),
            "is there already",
        ),
        "prior": (("export-pruned", *model, *texts, "--prior-out", out), (out,), "is there already"),
        "export and prior": (
            ("export-pruned", *model, *texts, "--out", out, "--prior-out", f"{out}.st"),
            (out, f"{out}.st"),
            "is there already",
        ),
        "eval choice": (
            ("eval", "choice", *model, "--data", inputs["choice.jsonl"], "--out", out),
            (out,),
            "already",
        ),
        "eval summarise": (
            ("eval", "summarise", *model, "--data", inputs["articles.jsonl"], "--out", out, "--max-new-tokens", "2"),
            (out,),
            "already",
        ),
        "pull": (("pull", inputs["model.gguf"]), (), ""),
    }


NAMES = ["generate", "export", "export --json", "export gguf", "prior", "export and prior"]
NAMES += ["eval choice", "eval summarise", "pull"]


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_job_ends_well_again(inputs: Inputs, tmp_path: Path, name: str) -> None:
    command, outs, said = finished(inputs, tmp_path)[name]
    second = again(command, *map(Path, outs))
    assert said in second.stderr


def test_a_finished_job_with_other_settings_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    for name, option in (("export", ("--seed", "1")), ("export gguf", ("--seed", "1")), ("prior", ("--samples", "3"))):
        command, outs, _ = finished(inputs, tmp_path / name)[name]
        (tmp_path / name).mkdir()
        assert run_line(command).code == 0
        refused = run_line((*command, *option))
        assert refused.code == 1, name
        assert "--force" in refused.stderr
        assert all(Path(out).exists() for out in outs)


def test_a_prior_that_is_missing_beside_its_export_is_measured(inputs: Inputs, tmp_path: Path) -> None:
    command, (out, prior), _ = finished(inputs, tmp_path)["export and prior"]
    assert run_line(command).code == 0
    scores = load_prior(Path(prior)).scores
    Path(prior).unlink()
    before = files(Path(out))
    assert run_line(command).code == 0
    assert [s.tolist() for layer in load_prior(Path(prior)).scores for s in layer] == [
        s.tolist() for layer in scores for s in layer
    ]
    assert files(Path(out)) == before


def test_an_export_that_lost_a_file_is_not_taken_for_whole(inputs: Inputs, tmp_path: Path) -> None:
    command, (out,), _ = finished(inputs, tmp_path)["export"]
    assert run_line(command).code == 0
    os.truncate(Path(out) / "model.safetensors", 5)
    refused = run_line(command)
    assert refused.code == 1
    assert "--force" in refused.stderr


def test_a_cache_that_cannot_be_written_does_not_undo_a_job(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What remembers finished jobs is there, or else the state stays."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "file"))
    command, (out,), _ = finished(inputs, tmp_path)["generate"]
    again(command, Path(out))


def test_a_figure_of_a_stopped_run_says_so(tmp_path: Path) -> None:
    results = tmp_path / "compared.jsonl"
    row = {"task": "text", "way": "dense", "share": 0.0, "id": 0, "resident_bytes": 9, "loss": 1.0}
    results.write_text(json.dumps(row) + "\n")
    command = ("plot", "compare", "--results", str(results), "--out", str(tmp_path / "o.svg"))
    assert "stopped" not in run_line(command).stderr
    results.with_name("compared.jsonl.state").write_text("{}")
    result = run_line(command)
    assert result.code == 0
    assert "of a run that was stopped" in result.stderr


def test_a_stopped_run_says_what_is_missing(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "o.jsonl", Results.add

    def add(results: Results, row: dict[str, object]) -> None:
        real(results, row)
        if len(results.rows) == 2:
            raise Stopped(15)

    monkeypatch.setattr(Results, "add", add)
    stopped = many(inputs, inputs["rows.jsonl"], out)
    assert "2 of 3 prompts are in" in stopped.stderr
    assert "the same command continues" in stopped.stderr
    monkeypatch.undo()
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    went_on = many(inputs, inputs["rows.jsonl"], out)
    assert "continuing after 2 of 3 prompts" in went_on.stderr
    assert went_on.code == 0


def test_an_export_whose_tokenizer_cannot_be_found_fails(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search for names in a folder that cannot be read finds none, and says nothing."""
    engine, scandir, listdir = Engine(inputs["model"]), os.scandir, os.listdir

    def refused(real: Callable[..., object]) -> Callable[..., object]:
        def call(path: object = ".") -> object:
            if str(path) == inputs["model"] and list(tmp_path.glob(".griffin-*/out")):
                raise PermissionError(13, "no", str(path))
            return real(path)

        return call

    monkeypatch.setattr(os, "scandir", refused(scandir))
    monkeypatch.setattr(os, "listdir", refused(listdir))
    with pytest.raises(ExportError):
        engine.export([1, 9, 8], tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()
