"""`griffin bench`: synthetic checkpoints, every method in its process, failures as rows, the table and the figure."""

import json
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from griffin_offload.cli.bench import cells, short, show
from griffin_offload.cli.main import griffin
from tiny import TINY, tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from griffin_offload import Engine
from griffin_offload.errors import BudgetError, OptionError
from griffin_offload.evaluation.bench import bench, competitors, limits, page_cache, runner, synthetic
from griffin_offload.evaluation.bench.asked import Asked, Lengths
from griffin_offload.evaluation.bench.bench import BenchRow
from griffin_offload.evaluation.bench.job import Deadline, Job
from griffin_offload.evaluation.bench.runner import Conditions, Model, Runner, look
from griffin_offload.options import FfnSkip, Pruning
from griffin_offload.sources.resolve import CATALOGUE, CatalogueModel
from griffin_offload.units import GIB, MIB
from griffin_offload.workspace import LOCK, workspace

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
LLAMA_CPP = """
import os
def llama_supports_gpu_offload():
    return False
class Llama:
    def __init__(self, model_path, *, n_ctx, n_threads, n_gpu_layers, logits_all, use_mmap, verbose):
        assert use_mmap and not logits_all
        if n_ctx == 13:
            os.kill(os.getpid(), 9)
        if n_ctx == 14:
            self.held = bytearray(300 << 20)
        self.seen = []
    def eval(self, tokens):
        self.seen += tokens
    def sample(self, temp):
        assert temp == 0
        return len(self.seen)
"""


def shape(kind: str, **more: Any) -> CatalogueModel:
    config = {"model_type": kind, "tie_word_embeddings": True, "dtype": "bfloat16", **SIZES, **more}
    return CatalogueModel("tiny", "a/tiny", "none", False, 0, config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bench") / "llama", "llama")


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for a llama.cpp that is not the real one: 8+5 tokens end its process, 8+6 take 300 MiB."""
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(griffin, ["bench", *map(str, arguments)])


def asked(folder: Path, **more: Any) -> Asked:
    settings: dict[str, Any] = {
        "lengths": [Lengths(8, 4)],
        "methods": ["llama-cpp"],
        "sparsities": [0.5],
        "repeats": 1,
        "capped": False,
        "cold": False,
    }
    return Asked(name="tiny", folder=folder, budget=2 * GIB, **settings | more)


# ---- synthetic checkpoints


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2"])
def test_a_synthetic_checkpoint_is_one_for_transformers_and_for_griffin(tmp_path: Path, kind: str) -> None:
    folder = synthetic.synthesise(shape(kind), tmp_path / "synthetic" / "tiny")
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    weights = dict(model.named_parameters())
    assert weights["model.layers.1.mlp.up_proj.weight"].float().std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(weights["model.layers.1.mlp.up_proj.weight"], weights["model.layers.2.mlp.up_proj.weight"])
    norm = model.model.norm(torch.full((1, 64), 3.0, dtype=torch.bfloat16))
    assert torch.equal(norm, torch.ones(1, 64, dtype=torch.bfloat16)), "a norm that scales by 1"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Häuser, 24")["input_ids"], skip_special_tokens=True) == "Häuser, 24"
    assert len(Engine(folder, device="cpu").generate([5, 6, 7], max_new_tokens=6, do_sample=False).token_ids) == 6


@pytest.mark.parametrize("kind", ["gemma4_text", "glm4_moe", "nemotron_h", "qwen3_5_text", "granitemoehybrid"])
def test_a_synthetic_checkpoint_of_todays_types_is_whole(tmp_path: Path, kind: str) -> None:
    """With the tensors that are no parameters: scales of layers, the bias of a router."""
    known = CatalogueModel("tiny", "a/tiny", "none", False, 0, {"model_type": kind, **TINY[kind]})
    folder = synthetic.synthesise(known, tmp_path / "synthetic" / "tiny")
    _, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    answer = Engine(folder, device="cpu").generate([5, 6, 7], sparsity=0.5, max_new_tokens=6, do_sample=False)
    assert len(answer.token_ids) == 6


def test_a_synthetic_checkpoint_is_found_again(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []

    def write() -> Path:
        return synthetic.synthesise(shape("llama"), tmp_path / "tiny", lambda *update: heard.append(update))

    first = write()
    assert heard[-1][1] == heard[-1][2] > 0
    heard.clear()
    assert write() == first
    assert not heard
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=MIB))
    with pytest.raises(BudgetError, match=r"a synthetic tiny needs 64 MiB of disk and .* has 1.00 MiB free"):
        synthetic.synthesise(shape("llama"), tmp_path / "synthetic" / "tiny")
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.synthesise(shape("llama"), tmp_path / "tiny", interrupt)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".griffin-00000001.tmp").mkdir()
    (tmp_path / ".griffin-00000001.tmp" / LOCK).touch()
    with workspace(tmp_path) as work:  # of a process that runs
        synthetic.synthesise(shape("llama"), tmp_path / "tiny")
        assert {path.name for path in tmp_path.iterdir()} == {"tiny", work.name}


# ---- what is asked for


def test_lengths() -> None:
    assert bench.parse_lengths("512+128, 2048 + 256,512+128") == [Lengths(512, 128), Lengths(2048, 256)]
    for text in ("", "512", "512+1", "0+8", "8+-1", "8+8,", "a+b"):
        with pytest.raises(OptionError, match=r"are not PROMPT\+ANSWER tokens"):
            bench.parse_lengths(text)


def test_methods() -> None:
    assert bench.parse_methods(None, ()) == ["full", "accelerate", "magnitude", "griffin"]
    assert bench.parse_methods(None, [Path("x.gguf")])[-1] == "llama-cpp"
    assert bench.parse_methods("griffin, full,griffin", ()) == ["griffin", "full"]
    with pytest.raises(OptionError, match="method 'vllm' is not known"):
        bench.parse_methods("full,vllm", ())
    with pytest.raises(OptionError, match=r"give --llama-cpp FILE\.gguf"):
        bench.parse_methods("llama-cpp", ())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "give one model"),
        (("--model", "m", "--synthetic", "smollm2-135m"), 2, "give one model"),
        (("--synthetic", "llama-9"), 2, "is not an alias"),
        (("--model", "m", "--llama-cpp", "gone.gguf"), 2, "no file gone.gguf"),
        (("--model", "m", "--lengths", "5"), 1, "not PROMPT+ANSWER"),
        (("--model", "m", "--sparsity", "1.5"), 1, "sparsity 1.5 is outside its range"),
        (("--model", "m", "--device-memory", "much"), 1, "not an amount of memory"),
        (("--model", "no-such-model"), 1, "no model goes by the name"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], code: int, said: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1)
    assert said in result.stderr


def test_lengths_beyond_the_context_are_refused(llama: Path) -> None:
    context = look(asked(llama)).context
    with pytest.raises(OptionError, match=f"{context}\\+2 tokens are more than tiny can take: {context}"):
        look(asked(llama, lengths=[Lengths(context, 2)]))


# ---- a whole run


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """What --json prints of every method on a tiny model, and what stderr says."""
    result = invoke("--model", llama, "--device-memory", "2GiB", "--lengths", "8+4", "--repeats", 1, "--uncapped",
                    "--warm", "--threads", 1, "--host-memory", "100MiB", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr


def test_json_has_the_machine_then_runs_then_rows(whole: tuple[list[dict[str, Any]], str]) -> None:
    machine, *others, memory = whole[0]
    methods = [("full", None), ("accelerate", None), ("magnitude", 0.5), ("griffin", 0.5)]
    assert [line["kind"] for line in others] == ["run"] * 4 + ["row"] * 4
    assert [(line["method"], line["sparsity"]) for line in others] == methods * 2
    assert (machine["kind"], machine["capped"], machine["cold"], machine["threads"]) == ("machine", False, False, 1)
    assert machine["conditions"] == "memory not capped (as asked), caches warm (as asked)"
    assert machine["reading"]["bandwidth"] > 0
    assert machine["arithmetic"]["8"]["seconds"] > 0
    assert torch.backends.cpu.get_cpu_capability() in machine["arithmetic"]["8"]["instructions"]
    assert machine["arithmetic"]["8"]["products"] == "torch's own products", "the model is too small for a choice"
    assert memory["kind"] == "memory"
    assert memory["bandwidth"] > 0
    assert "griffin 50%, 8+4 tokens, run 1 of 1: prompt" in whole[1]


def test_every_method_makes_the_tokens_and_takes_time(whole: tuple[list[dict[str, Any]], str]) -> None:
    times = ("load_s", "prompt_s", "ttft_s", "decode_s", "tokens_per_s", "peak_bytes", "rchar", "bytes_per_token")
    for run in (line for line in whole[0] if line["kind"] == "run"):
        assert "error" not in run
        assert run["tokens"] == 4
        assert all(run[name] > 0 for name in times), run
        assert run["prompt_s"] <= run["ttft_s"] < run["total_s"] - run["load_s"] < run["total_s"]
        assert run["tokens_per_s"] == pytest.approx(3 / run["decode_s"])
    for row in (line for line in whole[0] if line["kind"] == "row"):
        assert (row["runs"], row["error"], row["extrapolated"]) == (1, None, False)
        assert all(row[name] > 0 for name in ("x_floor", "of_limit", "prompt_s", "tokens_per_s"))
        pruned = row["method"] in ("griffin", "magnitude")
        assert (row["planned_peak_bytes"] is not None) == pruned
        assert row["prompt_again_s"] > 0
        assert row["x_floor_again"] > 0


# ---- a GPU: what needs none of its numbers


def test_the_limits_of_a_gpu_are_its_bus_and_the_best_that_its_memory_gave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """26 GB over a bus of 52 GB/s from a page cache of 13 GB/s; tokens of 10 GB from a memory of 2 TB/s."""
    run = {
        **{"prompt_s": 4.0, "ttft_s": 4.0, "total_s": 9.0, "decode_s": 1.0, "tokens": 4, "tokens_per_s": 100.0},
        **{"peak_bytes": 10 * GIB, "ram_peak_bytes": 30 * GIB, "bytes_per_token": 10**10, "memory_bandwidth": 1e12},
    }
    rows = [
        BenchRow("griffin", Lengths(512, 4), Pruning(0.5, "bfloat16"), runs=[run | {"prompt_again_s": 1.0}]),
        BenchRow("griffin", Lengths(512, 4), Pruning(), runs=[run | {"note": "took int8"}]),
        BenchRow("full", Lengths(512, 4), runs=[{"error": "out of memory"}]),
    ]
    settings = asked(tmp_path, device="cuda")
    card = {"name": "A card", "driver": "1.2", "bus_bandwidth": 52e9, "memory_bandwidth": 2e12, "total_bytes": GIB}
    model, held = Model(26 * 10**9, 26 * 10**9, 300, 256), runner.try_conditions(settings)
    reading = {"bandwidth": 13e9, "how": "direct", "page_cache": 30e9}
    done = bench.Bench(settings, model, held, reading, {512: {"seconds": 0.1, "threads": 1}}, rows, device=card)
    assert done.floor(512) == 2.0
    assert done.floor(512, again=True) == 0.5
    first = done.summary(rows[0])
    assert (first["x_floor"], first["x_floor_again"], first["of_limit"]) == (2.0, 2.0, 0.5)
    assert not first["limit_disturbed"]
    fast = done.summary(replace(rows[0], runs=[run | {"tokens_per_s": 201.0}]))
    assert fast["of_limit"] is None, "never above 100 %"
    assert fast["limit_disturbed"]
    assert "disturbed" in cells(fast, "512+4", "griffin")
    assert done.machine()["device_facts"] == card
    slow = replace(done, arithmetic={512: {"seconds": 3.0}}, device={"error": "no bus"})
    assert (slow.floor(512), slow.floor(512, again=True)) == (3.0, 3.0)

    show(done)
    _, _, columns, _, *lines = capsys.readouterr().out.splitlines()
    assert "again (s)" in columns
    assert "peak of RAM" in columns
    assert lines[1].split()[:3] == ["griffin", "without", "options"]
    assert lines[1].endswith("took int8")
    assert any(line.split() == ["bus", "52.00", "GB/s", "from", "pinned", "RAM"] for line in lines)


def test_other_formats_and_no_options_have_rows_of_their_own(tmp_path: Path) -> None:
    found = asked(
        tmp_path, methods=["griffin"], rests=["drop", "int4"], auto=True, compiles=True, resident_dtypes=["bfloat16"]
    )
    labels = [row.label for row in bench.bench_rows(found)]
    dropped = "griffin 50% rest drop"
    assert labels == [dropped, "griffin 50% rest int4", "griffin without options", f"{dropped} compiled"]
    by_itself = asked(tmp_path, methods=["griffin", "magnitude"], resident_dtypes=["bfloat16"])
    assert [row.label for row in bench.bench_rows(by_itself)] == ["griffin 50%", "magnitude 50%"]
    assert [row.pruning.rest for row in bench.bench_rows(by_itself)] == ["auto", "drop"]
    with pytest.raises(OptionError, match="int3"):
        asked(tmp_path, rests=["int3"])


@pytest.mark.parametrize(
    ("pruning", "note"),
    [
        (Pruning(), "took bfloat16"),
        (Pruning(0.5), "took bfloat16, 50% in int4"),
        (Pruning(0.0), None),
        (Pruning(0.5, rest="int4"), None),
    ],
)
def test_a_row_says_what_was_taken_where_nothing_was_asked(llama: Path, pruning: Pruning, note: str | None) -> None:
    job = Job("griffin", str(llama), 8, 4, 300, 2 * GIB, GIB, 60.0, None, "", False, pruning)
    assert competitors.griffin(job).get("note") == note


@pytest.mark.parametrize("cold", [True, False])
def test_reading_for_a_gpu_and_its_bus(llama: Path, monkeypatch: pytest.MonkeyPatch, cold: bool) -> None:
    monkeypatch.setattr(limits, "SAMPLE", 64 * 1024)
    job = Job("reading", str(llama), 8, 4, 300, GIB, GIB, 1.0, None, "", cold, device="cuda")
    found = limits.reading(job)
    assert found["bandwidth"] > 0
    assert ("page_cache" in found) == cold
    monkeypatch.setattr(limits, "PINNED", 4 * MIB)
    copied = limits.device(replace(job, device="cpu"))
    assert copied["name"] == "cpu"
    assert copied["bus_bandwidth"] > 0 < copied["memory_bandwidth"]


def test_llama_cpp_says_when_its_build_has_no_gpu(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(gguf.parent)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    job = Job("llama-cpp", str(gguf), 8, 4, 300, GIB, GIB, 1.0, None, "", False, device="mps", gpu_layers=-1)
    assert competitors.llama_cpp(job)["note"] == "on the CPU: this build of llama.cpp has no GPU support"
    assert "note" not in competitors.llama_cpp(replace(job, device="cpu"))
    monkeypatch.setattr(sys.modules["llama_cpp"], "llama_supports_gpu_offload", lambda: True)
    assert "note" not in competitors.llama_cpp(job)


def test_only_the_models_files_are_dropped_for_a_gpu(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[Path] = []
    monkeypatch.setattr(runner, "drop_caches", lambda: pytest.fail("the whole page cache"))
    monkeypatch.setattr(runner, "drop_files", dropped.extend)
    assert not runner.try_conditions(asked(llama, device="cuda", cold=None)).not_cold
    assert dropped == [llama / "model.safetensors"]


def test_a_dropped_file_is_read_again_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * MIB)
    page_cache.drop_files([tmp_path / "f"])
    page_cache.fill_cache([tmp_path / "f"])
    assert (tmp_path / "f").read_bytes() == b"abc" * MIB
    with pytest.raises(FileNotFoundError):
        page_cache.drop_files([tmp_path / "gone"])


def test_as_many_layers_of_llama_cpp_as_fit() -> None:
    assert runner.gpu_layers(8 * GIB, 9 * GIB, 32) == -1
    assert runner.gpu_layers(16 * GIB, 9 * GIB, 32) == 18


def test_no_run_begins_after_the_time_is_over(llama: Path) -> None:
    settings = asked(llama, stop_after=1e-9)
    runs = Runner(settings, look(settings), Conditions(GIB, "as asked", "as asked"), "")
    assert runs.run("griffin", Lengths(8, 4)) == {"error": "not run: 1e-09 s were over"}


def test_a_child_on_the_cpu_sees_no_gpu(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(runner, "run_child", lambda *arguments: told.append(arguments) or {})
    held = Conditions(GIB, "as asked", "as asked")
    for device in ("cpu", "cuda"):
        settings = asked(llama, device=device, ram=MIB)
        Runner(settings, look(settings), held, "").run("griffin", Lengths(8, 4))
    (_, here), (_, there) = ((Job.from_json(command[-1]), env) for command, _, env in told)
    assert here == {"CUDA_VISIBLE_DEVICES": ""}
    assert there == {}
    job = Job.from_json(told[1][0][-1])
    assert (job.device, job.ram, job.again, job.resident) == ("cuda", MIB, True, int(2 * GIB * 0.9) // MIB * MIB)


# ---- what goes wrong becomes a row


def test_without_llama_cpp_the_row_says_what_to_install(llama: Path, gguf: Path) -> None:
    (gguf.parent / "llama_cpp.py").write_text("raise ImportError('not there')")
    settings = asked(llama, ggufs=[gguf])
    runs = Runner(settings, look(settings), Conditions(GIB, "as asked", "as asked"), "")
    assert runs.run("llama-cpp", Lengths(8, 4), gguf=gguf) == {"error": "needs llama.cpp: pip install llama-cpp-python"}


def test_a_child_that_dies_is_a_row(
    llama: Path, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, Any]] = []
    notes: list[str] = []
    lengths = [Lengths(8, 5), Lengths(8, 4)]
    done = bench.bench(asked(llama, ggufs=[gguf], lengths=lengths, repeats=2), notes.append, lines.append)
    died, worked = done.rows
    assert died.error == "the process was ended by SIGKILL"
    assert (len(died.runs), len(died.good), len(worked.good)) == (1, 0, 2), "what fails is not tried again"
    assert done.summary(died)["tokens_per_s"] is None
    assert done.summary(worked)["tokens_per_s"] > 0
    assert [line["kind"] for line in lines] == ["machine", "run", "run", "run", "row", "row", "memory"]
    assert notes[2] == "llama-cpp model, 8+5 tokens, run 1 of 2: the process was ended by SIGKILL"

    show(done)
    title, _, columns, _, first, second, *facts = capsys.readouterr().out.splitlines()
    assert title == "tiny, memory not capped (as asked), caches warm (as asked)"
    assert columns.split()[:4] == ["method", "tokens", "prompt", "pass"]
    assert re.fullmatch(r" llama-cpp model +8\+5( +-){10} +the process was ended by SIGKILL", first)
    assert re.match(r" llama-cpp model +8\+4 +\d", second)
    assert any(line.startswith("reading ") and line.endswith(" KiB") for line in facts)

    pytest.importorskip("matplotlib")
    bench.draw(done, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_a_budget_that_is_too_small_does_not_fit() -> None:
    said = competitors._describe(BudgetError("tiny needs 2 MiB"))
    assert said == "does not fit: tiny needs 2 MiB"
    assert short(said) == "does not fit"
    assert competitors._describe(MemoryError()) == "out of memory"


def test_the_deadline_counts_from_the_first_token() -> None:
    ids = torch.zeros(1, 5, dtype=torch.int64)
    deadline = Deadline(0.05)
    assert not deadline(ids, None).item()
    assert not deadline(ids, None).item()
    time.sleep(0.06)
    assert deadline(ids, None).item()


def test_one_prompt_for_all_methods() -> None:
    def job(method: str) -> Job:
        return Job(method, "m", 50, 4, 300, GIB, GIB, 1.0, None, "", False, Pruning((0.5, 0.25), "int8"))

    assert job("full").prompt() == job("griffin").prompt()
    assert len(job("full").prompt()) == 50
    assert max(job("full").prompt()) < 300
    assert Job.from_json(job("full").to_json()) == job("full")


def test_a_figure_that_cannot_be_written_is_refused_first(llama: Path) -> None:
    pytest.importorskip("matplotlib")
    result = invoke("--model", llama, "--plot", "bars.txt")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the name of a figure ends in .png" in result.stderr


def test_a_child_that_says_nothing_sensible_is_an_error() -> None:
    assert runner.run_child([sys.executable, "-c", "raise SystemExit('gone wrong')"], 60) == {
        "error": "the process failed (1): gone wrong"
    }
    assert "not done after" in runner.run_child([sys.executable, "-c", "import time; time.sleep(9)"], 0.2)["error"]


def test_the_full_model_is_not_run_uncapped_beyond_the_budget(tmp_path: Path) -> None:
    model = Model(file_bytes=GIB, weight_bytes=3 * GIB, vocabulary=300, context=256)
    free = Runner(asked(tmp_path), model, Conditions(2 * GIB, "as asked", ""), "")
    capped = Runner(asked(tmp_path), model, Conditions(2 * GIB, "", ""), "")
    refused = free.refusal("full")
    assert refused is not None
    assert refused["error"].startswith("not run: 3.00 GiB of weights, more than the budget")
    assert capped.refusal("full") is None
    assert free.refusal("accelerate") is None
    assert Runner(asked(tmp_path, device="cuda"), model, free.conditions, "").refusal("full") is None


def test_a_control_group_holds_a_child_to_its_memory(tmp_path: Path, gguf: Path) -> None:
    try:
        with runner.control_group(GIB) as group:
            assert group.path.is_dir()
    except OSError as error:
        pytest.skip(f"no control group here: {error}")
    assert not group.path.exists()
    model = Model(file_bytes=GIB, weight_bytes=GIB, vocabulary=300, context=256)
    settings = Asked("tiny", tmp_path, 150 * MIB, [Lengths(8, 6)], ["llama-cpp"], [0.5], ggufs=[gguf])
    runs = Runner(settings, model, Conditions(150 * MIB, "", "as asked"), "")
    killed = runs.run("llama-cpp", Lengths(8, 6), gguf=gguf)
    assert killed["error"] == "out of memory at 150 MiB"
    assert 100 * MIB < killed["group_peak_bytes"] <= 150 * MIB
    assert runs.run("llama-cpp", Lengths(8, 4), gguf=gguf)["tokens"] == 4


# ---- what is said


def test_the_conditions_say_what_held() -> None:
    held = "memory capped at 4.84 GiB by a control group, caches cold"
    assert str(Conditions(5_200_000_000, "", "")) == held
    on_a_gpu = str(runner.try_conditions(asked(Path(), device="cuda", capped=True)))
    assert on_a_gpu.startswith("memory capped at 2.00 GiB by torch's allocator (accelerate)")
    assert "torch has no limit for mps" in str(runner.try_conditions(asked(Path(), device="mps", capped=True)))
    missing = Conditions(GIB, "no control group: read-only file system", "they cannot be dropped: permission denied")
    assert str(missing) == (
        "memory not capped (no control group: read-only file system), "
        "caches warm (they cannot be dropped: permission denied)"
    )


def test_a_stopped_run_is_marked(tmp_path: Path) -> None:
    run = {"tokens": 3, "tokens_per_s": 2.0, "prompt_s": 1.0, "peak_bytes": MIB}
    row = BenchRow("griffin", Lengths(8, 4), Pruning(0.5, "bfloat16"), runs=[run, run | {"tokens_per_s": 4.0}])
    assert (row.extrapolated, row.median("tokens_per_s"), row.label) == (True, 3.0, "griffin 50%")


def test_rows_that_skip_blocks_stand_beside_those_that_do_not(tmp_path: Path) -> None:
    found = asked(tmp_path, methods=["griffin"], ffn_skips=[0.25, 0.5], ffn_skip_mode="prompt")
    labels = [row.label for row in bench.bench_rows(found)]
    assert labels == ["griffin 50%", "griffin 50% skip 25% by prompt", "griffin 50% skip 50% by prompt"]
    for wrong in ({"ffn_skips": [1.5]}, {"ffn_skips": [0.0]}, {"ffn_skip_mode": "layer"}):
        with pytest.raises(OptionError):
            asked(tmp_path, **wrong)


@pytest.mark.parametrize("mode", ["token", "prompt"])
def test_a_run_that_skips_blocks_reads_less_for_a_token(tmp_path: Path, mode: str) -> None:
    folder = tiny_checkpoint(tmp_path / "llama", "llama", num_hidden_layers=8)
    plain = Job("griffin", str(folder), 8, 24, 300, 2 * GIB, GIB, 60.0, None, "", False, Pruning(0.0))
    full = competitors.griffin(plain)
    less = competitors.griffin(replace(plain, pruning=Pruning(0.0, skip=FfnSkip(1.0, mode))))
    assert full["skipped"] == 0 < less["skipped"]
    assert full["bytes_per_token"] - less["bytes_per_token"] == pytest.approx(
        less["skipped"] * 8 * 3 * 96 * 32 * 4, 1e-3
    )


def test_synthetic_is_written_to_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from griffin_offload.cli import bench as command

    monkeypatch.setitem(CATALOGUE, "tiny", shape("llama"))
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path))
    assert command.folder_of("Tiny", None) == tmp_path / "synthetic" / "tiny"
    assert (tmp_path / "synthetic" / "tiny" / "model.safetensors").is_file()


def test_lossless_answers_a_text_and_its_tokens_are_those_of_the_whole_model(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("What is said here is answered.")
    asked = ("--methods", "lossless,full", "--prompt-file", text, "--lengths", "3+6", "--repeats", "1", "--uncapped")
    result = invoke("--model", llama, *asked, "--warm", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    rows = {line["method"]: line for line in lines if line["kind"] == "row"}
    assert rows["lossless"]["same_tokens"] == [6, 6]
    assert rows["full"]["same_tokens"] is None
    assert rows["lossless"]["prompt_tokens"] == len(Engine(llama).encode(text.read_text()))
    assert "nothing is drafted" in rows["lossless"]["note"]


def test_tokens_that_differ_are_counted_up_to_the_first(tmp_path: Path) -> None:
    given = asked(tmp_path, methods=["accelerate", "lossless"])
    done = bench.Bench(given, Model(1, 1, 1, 1), Conditions(GIB, "", ""), {}, {}, bench.bench_rows(given))
    whole, mine = done.rows
    whole.runs.append({"token_ids": [1, 2, 3]})
    mine.runs.append({"token_ids": [1, 2, 4, 5]})
    assert done.same_tokens(mine) == [2, 3]
