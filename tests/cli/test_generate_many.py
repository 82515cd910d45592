"""A file of prompts, answered row by row: what is written of each, and that a stop loses none."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from griffin_offload.cli._opening import Opening
from griffin_offload.cli._pace import Pace, duration
from griffin_offload.cli.generate_many import Job, generate_many, recorded
from griffin_offload.cli.main import griffin
from safetensors.torch import load_file, save_file
from screen import Screen
from tiny import CONTEXT, SPECIALS, tiny_checkpoint
from waiting import wait_for

from griffin_offload import Engine
from griffin_offload.errors import BudgetError, GriffinError
from griffin_offload.jsonl import Results, Row, read_rows
from griffin_offload.many.answers import Answers
from griffin_offload.many.rows import PromptForm
from griffin_offload.options import Decoding, FfnSkip, Placement, Pruning

CHOSEN = Pruning(sparsity=0.5), Decoding(max_new_tokens=6, greedy=True)
PLAIN = PromptForm()
PROMPTS = ["Alice was tired", "Down the rabbit hole she fell", "Orange", "What is the use of a book", "Curious!"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("many") / "llama", "llama", chat=True)


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights, but more layers and a long context: time enough to be stopped, between two rows or within one."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("many") / "llama", "llama", num_hidden_layers=10, max_position_embeddings=20_000
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def many(
    source: Path, model: Path, device_memory: str | None = None, form: PromptForm = PLAIN, **options: Any
) -> list[Row]:
    """The rows of a run that ends well."""
    output = source.with_name("out.jsonl")
    placement = Placement("cpu", device_memory, "float32")
    generate_many(Job(source, output, form, **options), Opening(str(model), placement), *CHOSEN)
    assert not output.with_name("out.jsonl.state").exists()
    return untimed(output)


def untimed(output: Path) -> list[Row]:
    """Without what no two runs share."""
    rows = read_rows(output)
    for row in rows:
        row.pop("timings", None)
    return rows


def test_each_row_is_the_answer_that_its_prompt_gets_alone(source: Path, model: Path) -> None:
    engine = Engine(model, dtype="float32")
    alone = [engine.generate(engine.encode(prompt), *CHOSEN) for prompt in PROMPTS]
    assert len({answer.text for answer in alone}) == len(PROMPTS)
    assert many(source, model) == [
        {
            "id": number,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(answer.prompt_token_ids),
            "tokens": len(answer.token_ids),
            "sparsity": 0.5,
        }
        for number, answer in enumerate(alone, 1)
    ]
    timings = read_rows(source.with_name("out.jsonl"))[0]["timings"]
    assert timings["prompt_s"] > 0
    assert timings["decode_s"] > 0


def test_ids_system_texts_and_messages(tmp_path: Path, model: Path) -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    source = write(
        tmp_path / "in.jsonl",
        [
            {"prompt": "Alice", "system": "Be brief.", "id": "a"},
            {"messages": [turn("system", "Be brief."), turn("user", "Alice")], "id": 7},
            {"messages": [turn("user", "Alice")]},
            {"prompt": "Alice"},
            {"messages": [turn("user", "Alice"), turn("assistant", "Who?"), turn("user", "Alice")]},
        ],
    )
    rows = many(source, model)
    assert [row["id"] for row in rows] == ["a", 7, 3, 4, 5]
    texts = [row["text"] for row in rows]
    assert texts[0] == texts[1] != texts[2] == texts[3] != texts[4]
    told = many(source, model, form=PromptForm("Be long."), force=True)
    assert told[:2] == rows[:2]  # a system text of the row's own comes first
    assert told[2]["text"] == told[3]["text"] != texts[2]


def test_parts_of_a_message_are_read_and_media_refused(tmp_path: Path, model: Path) -> None:
    """As other programs write conversations; a row with an image is refused by itself, with the reason."""
    text, image = {"type": "text", "text": "Alice"}, {"type": "image_url", "image_url": {"url": "cat.png"}}
    contents = ["Alice", [text], [image, text]]
    source = write(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": each}]} for each in contents])
    with pytest.raises(GriffinError, match="1 of 3 prompts have no answer"):
        many(source, model)
    plain, parts, refused = read_rows(source.with_name("out.jsonl"))
    assert parts["text"] == plain["text"]
    assert "'image_url'" in refused["error"]
    assert "reads no images" in refused["error"]


def test_raw_leaves_out_the_template(source: Path, model: Path) -> None:
    engine = Engine(model, dtype="float32")
    alone = [engine.generate(engine.encode(prompt, raw=True), *CHOSEN).text for prompt in PROMPTS]
    assert [row["text"] for row in many(source, model, form=PromptForm(raw=True))] == alone


@pytest.mark.parametrize(
    ("row", "raw", "word"),
    [
        ({}, False, "either"),
        ({"prompt": "a", "messages": []}, False, "either"),
        ({"prompt": 3}, False, '"prompt" is not a text'),
        ({"prompt": "a", "system": None}, False, '"system" is not a text'),
        ({"messages": []}, False, '"messages"'),
        ({"messages": ["a"]}, False, '"messages"'),
        ({"messages": [{"role": "robot", "content": "a"}]}, False, "user or assistant"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, False, '"messages"'),
        ({"messages": [{"role": "user", "content": "a"}], "system": "b"}, False, "make it their first"),
        ({"messages": [{"role": "user", "content": "a"}]}, True, "--raw"),
        ({"prompt": "a", "system": "b"}, True, "--raw"),
    ],
)
def test_a_row_that_no_model_could_answer_is_refused_first(tmp_path: Path, row: Row, raw: bool, word: str) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(GriffinError, match=r"in\.jsonl, line 2: ") as error:
        many(source, tmp_path / "no-such-model", form=PromptForm(raw=raw))
    assert word in str(error.value)
    assert not source.with_name("out.jsonl").exists()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_cannot_be_answered_is_written_down_and_the_rest_goes_on(
    tmp_path: Path, model: Path, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["", "Alice", "word " * CONTEXT, " \n", "Orange"]
    source = write(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
    with pytest.raises(GriffinError, match=r'3 of 5 prompts have no answer: see "error" in .*out\.jsonl'):
        many(source, model, batch_size=batch_size, per_prompt=True, as_json=True)
    rows = untimed(source.with_name("out.jsonl"))
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5]
    assert ["error" in row for row in rows] == [True, False, True, True, False]
    assert "empty" in rows[0]["error"]
    assert str(CONTEXT) in rows[2]["error"]
    assert set(rows[0]) == {"id", "error"}
    printed = capsys.readouterr().out
    told = json.loads(printed)
    run = told.pop("run")
    assert told == {"output": str(source.with_name("out.jsonl")), "rows": 5, "failed": 3}
    assert run["answered"] == 2
    assert not source.with_name("out.jsonl.state").exists()
    good = write(tmp_path / "good.jsonl", [{"prompt": prompt} for prompt in ("Alice", "Orange")])
    assert [row["text"] for row in many(good, model, force=True)] == [rows[1]["text"], rows[4]["text"]]


def test_a_number_that_overflows_is_the_error_of_its_own_prompt(tmp_path: Path, model: Path) -> None:
    """Where the others do not depend on it. In float16 one token is too much for what the last layer adds."""
    folder = shutil.copytree(model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    answers = Answers(Engine(folder), *CHOSEN, per_prompt=True)
    ids = [answers._engine.encode(prompt) for prompt in PROMPTS]
    (token, *_) = set(ids[2]).difference(*ids[:2], *ids[3:])
    weights["model.embed_tokens.weight"][token] = 65_000.0
    down = weights["model.layers.2.mlp.down_proj.weight"]
    down *= 20_000 / down.abs().sum(1).mean()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    engine = Engine(folder, dtype="float16")
    for per_prompt in (True, False):
        found = Answers(engine, *CHOSEN, per_prompt=per_prompt).answer(dict(enumerate(ids)))
        assert ["NaN or infinite" in row.get("error", "") for row in found.values()] == [
            number == 2 or not per_prompt for number in range(5)
        ]
    found = Answers(engine, *CHOSEN, per_prompt=True).answer(dict(enumerate(ids)))
    alone = {row: engine.generate(one, *CHOSEN).text for row, one in enumerate(ids) if row != 2}
    assert {row: answer["text"] for row, answer in found.items() if row != 2} == alone
    assert found.took.prompts == 4


def test_a_prompt_of_no_tokens_is_an_error_of_its_own_row(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    without_z = {"type": "Replace", "pattern": {"String": "z"}, "content": ""}
    path.write_text(json.dumps({**tokenizer, "normalizer": without_z, "post_processor": None}), "utf-8")
    source = write(
        tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in ("Alice", "zz", "word " * CONTEXT, "Orange")]
    )
    with pytest.raises(GriffinError, match="2 of 4 prompts have no answer"):
        many(source, folder)
    assert [row.get("error", "")[:14] for row in untimed(source.with_name("out.jsonl"))] == [
        "",
        "the prompt is ",
        "the prompt has",
        "",
    ]


def test_answers_are_not_written_among_the_prompts(source: Path, model: Path) -> None:
    (folder := source.parent / "prompts").mkdir()
    source.rename(folder / source.name)
    args = ["generate", "--model", str(model), "--input", str(folder), "--output", str(folder / "out.jsonl")]
    result = CliRunner().invoke(griffin, args)
    assert result.exit_code == 1
    assert "would be one of the files of prompts" in result.output
    assert [path.name for path in folder.iterdir()] == [source.name]


def test_an_empty_address_is_no_cluster(source: Path, model: Path) -> None:
    args = ["generate", "--model", str(model), "--cluster", ""]
    assert "need --input" in CliRunner().invoke(griffin, [*args, "Alice"]).output
    result = CliRunner().invoke(
        griffin, [*args, "--input", str(source), "--output", str(source.with_name("out.jsonl"))]
    )
    assert result.exit_code == 1
    assert "--cluster" in result.output
    assert not source.with_name("out.jsonl").exists()


def test_a_memory_that_holds_no_prompt_is_an_error_of_the_options(source: Path, model: Path) -> None:
    with pytest.raises(BudgetError):
        many(source, model, device_memory="1MiB")
    assert [path.name for path in source.parent.iterdir()] == [source.name]
    assert len(many(source, model)) == len(PROMPTS)  # nothing is there yet to go on with or to force


def test_a_batch_shares_its_neurons_and_per_prompt_has_them_apart(source: Path, model: Path) -> None:
    engine = Engine(model, dtype="float32")
    ids = [engine.encode(prompt) for prompt in PROMPTS]
    pooled = [engine.generate_batch(batch, *CHOSEN) for batch in (ids[:2], ids[2:4], ids[4:])]
    alone = many(source, model)
    shared = many(source, model, batch_size=2, force=True)
    assert [row["text"] for row in shared] == [answer.text for batch in pooled for answer in batch]
    assert shared != alone
    assert many(source, model, batch_size=2, per_prompt=True, force=True) == alone


def test_auto_takes_as_many_as_fit_with_the_neurons_of_one(source: Path, model: Path) -> None:
    """Against a search through all numbers, at budgets from what one prompt needs to what ten do."""
    for options in ({"sparsity": 0.5}, {"sparsity": 0.5, "per_prompt": True}, {}):
        per_prompt = options.pop("per_prompt", False)
        answers = Answers(engine := Engine(model, dtype="float32"), Pruning(**options), CHOSEN[1], bool(per_prompt))
        peaks = [engine.plan(20, 6, sequences=n, per_prompt=per_prompt and n > 1, **options).peak for n in range(1, 11)]
        for budget in range(peaks[0], peaks[-1], (peaks[-1] - peaks[0]) // 7 + 1):
            engine.budget = budget
            alone = engine.plan(20, 6, **options)
            found = 0
            for prompts in range(1, 11):
                with suppress(BudgetError):
                    plan = engine.plan(20, 6, sequences=prompts, per_prompt=per_prompt and prompts > 1, **options)
                    same = (plan.kept, plan.precision, plan.fold) == (alone.kept, alone.precision, alone.fold)
                    found = prompts if same else found
            assert answers.fitting(20, 10) == found
        engine.budget = "8GiB"
        assert answers.fitting(20, 10) == 10
        assert answers.fitting(20, 1000) == 32


def test_auto_gives_the_same_answers_where_they_do_not_depend_on_it(
    source: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    answer = Answers.answer
    monkeypatch.setattr(
        Answers, "answer", lambda self, rows, *more: sizes.append(len(rows)) or answer(self, rows, *more)
    )
    alone = many(source, model)
    assert sizes == [1] * 5
    assert many(source, model, batch_size="auto", per_prompt=True, force=True) == alone
    assert many(source, model, per_prompt=True, force=True) == alone
    shared = many(source, model, batch_size="auto", force=True)
    assert sizes[5:] == [5, 5, 5]
    assert shared == many(source, model, batch_size=5, force=True) != alone


def test_what_prompts_begin_with_alike_is_computed_once(
    source: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = PromptForm(system="Answer as a white rabbit would, who is late, and looks at his watch. " * 2)
    alone = many(source, model, form=form)
    capsys.readouterr()
    assert many(source, model, form=form, per_prompt=True, force=True, as_json=True) == alone
    told = json.loads(capsys.readouterr().out)["run"]
    system = Engine(model).encode("Alice was tired", system=form.system).index(SPECIALS.index("<|end|>"))
    assert told["shared_prompt_tokens"] >= 5 * system
    assert told["shared_prompt_tokens"] < told["prompt_tokens"]
    engine = Engine(model, dtype="float32")
    whole = engine.generate_batch([engine.encode(prompt, system=form.system) for prompt in PROMPTS], *CHOSEN)
    together = many(source, model, form=form, batch_size=5, force=True, as_json=True)
    assert [row["text"] for row in together] == [answer.text for answer in whole]
    assert json.loads(capsys.readouterr().out)["run"]["shared_prompt_tokens"] == told["shared_prompt_tokens"]


def test_a_run_with_auto_goes_on_with_the_size_that_it_was_begun_with(tmp_path: Path, slow: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": f"{number} {p}"} for number in range(5) for p in PROMPTS])
    stop(source, slow, signal.SIGKILL, rows=4)  # with 2, but auto would now take all 25
    rows = many(source, slow, batch_size="auto")
    assert many(source, slow, batch_size="auto") == rows  # which is answered already
    assert rows == many(source, slow, batch_size=2, force=True) != many(source, slow, batch_size="auto", force=True)


@pytest.mark.parametrize(("workers", "options"), [(2, {"batch_size": 2}), (4, {"batch_size": 2, "per_prompt": True})])
def test_workers_write_what_one_process_writes(
    source: Path, model: Path, workers: int, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    one = many(source, model, **options)
    capsys.readouterr()
    assert many(source, model, workers=workers, force=True, device_memory="2GiB", **options) == one
    assert f"{workers} workers: CPU, " in capsys.readouterr().err


def test_the_recorded_options_are_those_of_earlier_versions() -> None:
    plain = {"sparsity": None, "max_new_tokens": 256, "seed": None, "selection": "topk", "allocation": "auto"}
    earlier = plain | {"resident_dtype": None, "rest": None}
    plain = earlier | {"fold": 0.3, "prior": "auto"}  # what is dropped was not folded, nor chosen with a prior
    assert recorded(Pruning(), Decoding()) == plain
    assert recorded(Pruning(), Decoding(greedy=True)) == plain | {"do_sample": False}
    assert recorded(Pruning(), Decoding(seed=3)) == plain | {"seed": 3, "do_sample": True}
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    assert recorded(Pruning(), Decoding(temperature=0.7, top_p=0.9, top_k=0)) == plain | sampled
    with_prior = recorded(Pruning(0.5, prior="p.st", prior_weight=0.3), Decoding())
    assert with_prior == plain | {"sparsity": 0.5, "rest": "auto", "prior": "p.st", "prior_weight": 0.3}
    dropped = earlier | {"sparsity": 0.5}  # an earlier version's file, which only the paper's method continues
    assert recorded(Pruning(0.5, method="griffin"), Decoding()) == dropped | {"allocation": "uniform"}
    assert recorded(Pruning(0.5, rest="drop", prior="off", fold=False), Decoding()) == dropped
    assert recorded(Pruning(0.5, rest="drop"), Decoding()) == dropped | {"fold": 0.3, "prior": "auto"}
    assert recorded(Pruning(fold=False, prior="off"), Decoding()) == earlier
    assert recorded(Pruning(0.5, rest="int4"), Decoding()) == dropped | {"rest": "int4"}
    assert recorded(Pruning(0.5, rest="auto"), Decoding()) == recorded(Pruning(0.5), Decoding()) != dropped
    skip = {"share": 0.25, "mode": "prompt", "cold": (2, 2), "warmup": 4, "run": 0}
    assert recorded(Pruning(skip=FfnSkip(0.25, "prompt")), Decoding()) == plain | {"skip": skip}


STOPPED = """
import sys
import torch
from click.testing import CliRunner
from griffin_offload.cli._opening import Opening
from griffin_offload.cli.generate_many import Job, generate_many
from griffin_offload.options import Decoding, Placement, Pruning
from pathlib import Path
torch.set_num_threads(1)
source, output, model = map(Path, sys.argv[1:4])
decoding = Decoding(max_new_tokens=int(sys.argv[4]), greedy=True)
engine = Opening(str(model), Placement("cpu", dtype="float32"))
workers = int(sys.argv[5])
generate_many(Job(source, output, batch_size=2, workers=workers), engine, Pruning(sparsity=0.5), decoding)
"""


def test_a_killed_driver_and_a_killed_worker_lose_nothing(tmp_path: Path, slow: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": f"{number} {p}"} for number in range(5) for p in PROMPTS])
    output = tmp_path / "out.jsonl"
    stop(source, slow, signal.SIGKILL, rows=3, workers=2)
    with begun(source, slow, workers=2) as process:  # goes on, and loses a worker
        wait_for(lambda: output.read_bytes().count(b"\n") >= 7)
        psutil.Process(process.pid).children()[-1].kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"worker \d was ended by SIGKILL; the others go on", errors)
    rows = untimed(output)
    assert [row["id"] for row in rows] == list(range(1, 26))
    assert rows == many(source, slow, batch_size=2, force=True)


def test_a_run_that_is_stopped_twice_comes_to_the_same_end(tmp_path: Path, slow: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": f"{number} {p}"} for number in range(5) for p in PROMPTS])
    output = tmp_path / "out.jsonl"
    assert stop(source, slow, signal.SIGKILL, rows=4) == ""
    # Half of a batch, and half of a line: what a kill between two writes, and within one, would leave.
    kept = output.read_bytes().splitlines(keepends=True)[:3]
    output.write_bytes(b"".join([*kept, b'{"id": 4, "te']))
    with pytest.raises(GriffinError, match=r"begun with batch_size 2, and this run has 3"):
        many(source, slow, batch_size=3)
    told = stop(source, slow, signal.SIGINT, rows=8)
    assert "continuing after 3 of 25 prompts" in told
    assert re.search(r"\d+ of 25 prompts are in .*out\.jsonl; the same command continues", told)
    assert output.read_bytes().startswith(b"".join(kept))
    rows = many(source, slow, batch_size=2)
    assert output.read_bytes().startswith(b"".join(kept))
    assert [row["id"] for row in rows] == list(range(1, 26))
    assert rows == many(source, slow, batch_size=2, force=True)


def test_a_half_made_answer_is_not_written(tmp_path: Path, slow: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    told = stop(source, slow, signal.SIGINT, rows=0, tokens=15_000, after=1)  # by then the first batch is decoding
    assert "0 of 5 prompts are in" in told
    assert source.with_name("out.jsonl").read_bytes() == b""


def stop(
    source: Path, model: Path, how: signal.Signals, rows: int, tokens: int = 6, after: float = 0, workers: int = 1
) -> str:
    """Begin a run or go on with it, and end it when it has `rows` rows, `after` seconds later; what it said."""
    output = source.with_name("out.jsonl")
    with begun(source, model, tokens, workers) as process:
        wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") >= rows)
        time.sleep(after)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert rows <= output.read_bytes().count(b"\n") < 25
    return errors


@contextmanager
def begun(source: Path, model: Path, tokens: int = 6, workers: int = 1) -> Iterator["subprocess.Popen[str]"]:
    """A run in a process of its own, which is ended with the block."""
    output = source.with_name("out.jsonl")
    command = [sys.executable, "-c", STOPPED, source, output, model, str(tokens), str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()


def test_the_pace_is_told(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Results(tmp_path / "out.jsonl", {}, source=source) as results, Pace(results, 3, "prompts", every=0) as pace:
        for number in range(3):
            results.add({"id": number})
            pace.step()
    told = capsys.readouterr().err.splitlines()
    assert told == ["1 of 3 prompts, about 0 s left", "2 of 3 prompts, about 0 s left"]  # the end is told by others


def test_a_bar_shows_the_rows_and_goes_away(tmp_path: Path, slow: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": f"{number} {p}"} for number in range(5) for p in PROMPTS])
    files = ("--input", source, "--output", tmp_path / "out.jsonl", "--greedy", "--max-new-tokens", "40")
    screen = Screen("generate", "--model", slow, "--device", "cpu", "--batch-size", "2", *files, columns=160)
    screen.wait_for("prompts/s, about")
    assert re.search(r"prompts \S+ \d+/25 [\d.]+ prompts/s, about \d+ s left", screen.text)
    screen.wait_for("25 prompts answered in")
    assert "left" not in screen.text
    assert "prompt tokens/s" in screen.text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3569, "59 min"), (3600, "1 h 0 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
