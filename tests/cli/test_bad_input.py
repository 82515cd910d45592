"""Bad models, prompts, budgets and disks through the command line: one line, never a traceback."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from griffin_offload.cli.main import griffin
from safetensors.torch import load_file, save_file
from tiny import UNSUPPORTED, tiny_checkpoint

from griffin_offload.memory.measure import bytes_read
from griffin_offload.model.refused import REFUSED
from griffin_offload.units import MIB

Change = Callable[[Path], object]
PYTHON = [sys.executable, "-c", "from griffin_offload.cli.main import main; main()"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bad") / "llama", "llama", chat=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bad-shards") / "llama", "llama", shards=3)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A good model, to be spoilt."""
    return shutil.copytree(llama, tmp_path / "model")


def run(*arguments: object, stdin: str = "") -> Result:
    result = CliRunner().invoke(griffin, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback is never the answer
    return result


def generate(model: Path, *options: object) -> Result:
    return run(
        "generate", "--model", model, "--prompt", "Hello", "--sparsity", "0.5", "--max-new-tokens", "2", *options
    )


def export(model: Path, out: Path, *options: object) -> Result:
    return run("export-pruned", "--model", model, "--prompt-file", "-", "--out", out, *options, stdin="Hello")


def failed(result: Result, *words: str, code: int = 1) -> None:
    """Exactly one line on stderr, nothing on stdout, the exit code; the words are in the line."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.rstrip("\n").isprintable()
    assert len(result.stderr) < 1000, result.stderr
    for word in words:
        assert word in result.stderr


def edit(name: str, **changes: Any) -> Change:
    """Change keys of a JSON file; ... takes one out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def put(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = SINGLE) -> Change:
    """Change the tensors of a file."""

    def apply(folder: Path) -> None:
        content = load_file(folder / file)
        change(content)
        save_file(content, folder / file, {"format": "pt"})

    return apply


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of a file and nothing else."""

    def apply(folder: Path) -> None:
        content = (folder / SINGLE).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return apply


DOWN = "model.layers.1.mlp.down_proj.weight"


# Weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: os.truncate(f / SINGLE, (f / SINGLE).stat().st_size - 1), [SINGLE, "cut short"]),
        (lambda f: os.truncate(f / SINGLE, 100), [SINGLE]),
        (put(SINGLE, b""), [SINGLE, "0 bytes"]),
        (put(SINGLE, b"\xff" * 5000), [SINGLE, "header"]),
        (header(lambda h: h[DOWN]["data_offsets"].reverse()), [SINGLE, DOWN]),
        (header(lambda h: h[DOWN].update(data_offsets=[0, 2**60])), [SINGLE, DOWN]),
        (header(lambda h: h[DOWN].update(data_offsets=h["lm_head.weight"]["data_offsets"])), [SINGLE]),
        (header(lambda h: h[DOWN].update(dtype="F12")), [SINGLE, DOWN, "F12"]),
        (header(lambda h: h[DOWN].update(dtype=[])), [SINGLE, DOWN]),
        (header(lambda h: h.update({"a\nb": 1})), [SINGLE]),
        (header(lambda h: h[DOWN]["shape"].reverse()), [SINGLE, DOWN, "[96, 32]", "[32, 96]"]),
        (tensors(lambda t: t.pop(DOWN)), [DOWN]),
        (tensors(lambda t: [t.pop(name) for name in list(t) if "mlp" in name]), ["and 8 more"]),
        (tensors(lambda t: t.clear()), ["no tensors"]),
        (tensors(lambda t: t.update({DOWN: t[DOWN][:, :-1].contiguous()})), [DOWN, "[32, 95]", "[32, 96]"]),
        (tensors(lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})), [DOWN, "int8"]),
        (tensors(lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)})), [DOWN, "float8"]),
        (tensors(lambda t: t[DOWN].fill_(float("nan"))), [SINGLE, DOWN, "NaN"]),
        (tensors(lambda t: t["lm_head.weight"][5].fill_(float("inf"))), [SINGLE, "lm_head.weight", "infinite"]),
        (tensors(lambda t: t["model.embed_tokens.weight"].fill_(float("nan"))), ["embed_tokens", "NaN"]),
        (remove(SINGLE), ["safetensors"]),
        (lambda f: (f / SINGLE).rename(f / "weights.safetensors"), ["safetensors"]),
        (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), ["pytorch_model.bin"]),
    ],
)
def test_bad_weights(model: Path, tmp_path: Path, change: Change, words: list[str]) -> None:
    change(model)
    failed(generate(model), *words)
    failed(export(model, tmp_path / "out"), *words)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("model-00002-of-00003.safetensors"), ["model-00002-of-00003.safetensors", "missing"]),
        (remove(INDEX), ["safetensors"]),
        (put(INDEX, b"{"), [INDEX]),
        (put(INDEX, b'{"weight_map": {"x": "../../x.safetensors"}}'), [INDEX, "leaves the folder"]),
        (put(INDEX, b'{"weight_map": {"x": "/etc/passwd"}}'), [INDEX, "leaves the folder"]),
        (put(INDEX, b'{"weight_map": {"x": "\\ud800"}}'), []),
        (lambda f: os.truncate(f / "model-00003-of-00003.safetensors", 3000), ["model-00003-of-00003.safetensors"]),
        (tensors(lambda t: t.popitem(), "model-00001-of-00003.safetensors"), ["index says", "model-00001-of-00003"]),
    ],
)
def test_bad_shards(sharded: Path, tmp_path: Path, change: Change, words: list[str]) -> None:
    folder = shutil.copytree(sharded, tmp_path / "model")
    change(folder)
    failed(generate(folder), *words)


# Configs and tokenizers


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_an_unsupported_architecture(tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind)
    failed(generate(folder), f"'{kind}'", "not supported: ", REFUSED[kind])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("config.json"), ["config.json"]),
        (put("config.json", b""), ["config.json"]),
        (put("config.json", b"not JSON\n{"), ["config.json"]),
        (put("config.json", b"\xff\xfe\x00"), ["config.json"]),
        (put("config.json", b"[]"), ["config.json"]),
        (put("config.json", b"[1, 2]"), ["config.json"]),
        (put("config.json", b"null"), ["config.json"]),
        (put("config.json", b'"llama"'), ["config.json"]),
        (put("config.json", b"[" * 100_000), ["config.json"]),
        (put("config.json", b"{}"), ["model"]),
        (edit("config.json", model_type=...), ["model"]),
        (edit("config.json", model_type=None), ["model"]),
        (edit("config.json", model_type=7), ["model"]),
        (edit("config.json", model_type=["llama"]), ["model"]),
        (edit("config.json", model_type="griffin\nllama"), ["supported"]),
        (edit("config.json", model_type="no-such-type"), ["no-such-type", "supported"]),
        (edit("config.json", model_type="bert"), ["bert", "supported"]),
        (edit("config.json", model_type="t5"), ["t5", "supported"]),
        (put("config.json", b'{"model_type": "llama"}'), []),  # every field at its default: not these weights
        (edit("config.json", hidden_size=...), ["model.safetensors"]),
        (edit("config.json", intermediate_size=...), ["model.safetensors"]),
        *(
            (edit("config.json", quantization_config={"quant_method": method, "bits": 4}), [method, "take that field"])
            for method in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors")  # the files are not
        ),
        (edit("config.json", quantization_config={"quant_method": "nonsense"}), ["nonsense", "GGUF"]),
        (edit("config.json", quantization_config={"load_in_4bit": True}), ["quantized by bitsandbytes"]),
        (edit("config.json", quantization_config={"bits": 4}), ["quantized by a method that has no name"]),
        (edit("config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="evil"), ["evil"]),
    ],
)
def test_bad_configs(model: Path, change: Change, words: list[str]) -> None:
    change(model)
    failed(generate(model), *words)


FIELDS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
FIELDS += ["num_key_value_heads", "max_position_embeddings", "head_dim", "rms_norm_eps", "hidden_act"]
FIELDS += ["tie_word_embeddings", "rope_parameters", "attention_bias", "bos_token_id", "dtype"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_field_of_another_type_or_size(model: Path, field: str) -> None:
    """It is one line, or it is no matter and there is an answer."""
    values: list[Any] = ["abc", -1, 0, 10**9, 1.5, [], {}, [7], True, None]
    original, wrong = (model / "config.json").read_bytes(), []
    for value in values:
        if field == "num_hidden_layers" and value == 10**9:
            continue  # below, in a process that may be killed
        edit("config.json", **{field: value})(model)
        try:
            result = generate(model)
            if result.exit_code == 0:
                assert "resident" in result.stderr
            else:
                failed(result, str(model))
        except Exception as error:  # to tell of all values at once
            wrong.append(f"{value!r}: {type(error).__name__}: {str(error)[:200]}")
        (model / "config.json").write_bytes(original)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", "abc"),
        ("hidden_size", 33),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 5),
        ("intermediate_size", 97),
        ("head_dim", 7),
        ("max_position_embeddings", 0),
        ("hidden_act", "no such function"),
    ],
)
def test_a_config_that_does_not_describe_the_weights(model: Path, field: str, value: object) -> None:
    edit("config.json", **{field: value})(model)
    failed(generate(model))


@pytest.mark.parametrize("layers", [10**18])
def test_a_config_with_endless_layers_is_refused_at_once(model: Path, layers: int) -> None:
    """Before modules without end are built: in a process that may be killed."""
    edit("config.json", num_hidden_layers=layers)(model)
    arguments = ["generate", "--model", str(model), "--prompt", "Hello"]
    done = subprocess.run([*PYTHON, *arguments], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        remove("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        remove("tokenizer.json"),
        put("tokenizer.json", b""),
        put("tokenizer.json", b"{}"),
        put("tokenizer.json", b"not\nJSON"),
        put("tokenizer.json", b"\xff\xfe"),
        put("tokenizer_config.json", b"["),
        put("tokenizer_config.json", b"[]"),
        edit("tokenizer.json", model=None),
        edit("tokenizer_config.json", tokenizer_class="NoSuchTokenizer", auto_map={"AutoTokenizer": ["evil.T", None]}),
    ],
)
def test_bad_tokenizers(model: Path, change: Change) -> None:
    """It is one line that names the tokenizer, or it is no matter (another file says the same)."""
    change(model)
    result = generate(model)
    if result.exit_code:
        failed(result, str(model), "tokenizer")


@pytest.mark.parametrize(
    "template", ["{{ nonsense(", "{{ 1 / 0 }}", "{{ raise_exception('No\nsuch turn') }}", "{% for %}"]
)
def test_bad_chat_templates(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    failed(generate(model), "chat template")


def test_a_chat_template_that_says_nothing(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ '' }}")
    failed(generate(model), "chat template leaves out")


@pytest.mark.parametrize(
    "change",
    [
        put("generation_config.json", b""),
        put("generation_config.json", b"not\nJSON"),
        put("generation_config.json", b"[]"),
        put("generation_config.json", b"\xff"),
        edit("generation_config.json", eos_token_id="abc"),
        edit("generation_config.json", eos_token_id=[[1]]),
        edit("generation_config.json", eos_token_id={}),
        edit("generation_config.json", pad_token_id="abc"),
        edit("generation_config.json", do_sample=True, temperature=-1),
        edit("generation_config.json", do_sample=True, temperature="hot"),
        edit("generation_config.json", num_beams=4),
        edit("generation_config.json", max_new_tokens=-5),
        edit("generation_config.json", prefill_chunk_size=4),
    ],
)
def test_bad_generation_configs(model: Path, change: Change) -> None:
    """It is one line, or it is no matter and there is an answer."""
    change(model)
    result = generate(model)
    if result.exit_code:
        failed(result)
    else:
        assert "resident" in result.stderr


# Prompts and budgets


def test_prompts(llama: Path, tmp_path: Path) -> None:
    for text in ("", " \n\t "):
        failed(run("generate", "--model", llama, "--prompt", text), "empty")
        failed(run("export-pruned", "--model", llama, "--prompt-file", "-", "--out", tmp_path / "out"), "empty")
    failed(run("generate", "--model", llama, "--prompt", "word " * 300), "tokens", "at most 256")
    (tmp_path / "long.txt").write_text("word " * 300)
    failed(
        run("export-pruned", "--model", llama, "--prompt-file", tmp_path / "long.txt", "--out", tmp_path / "out"),
        "at most 256",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]
    result = run(
        "generate", "--model", llama, "--prompt", "a", "--raw", "--sparsity", "0.5", "--max-new-tokens", "2", "--json"
    )
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["prompt_token_ids"]) == 2  # <s> and a


def test_a_budget_too_small_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", vocab_size=300, intermediate_size=40_000)  # 48 MB
    generate(folder)
    before = bytes_read()
    failed(generate(folder, "--device-memory", "20MiB"), "20 MiB", "--device-memory")
    failed(export(folder, tmp_path / "out", "--device-memory", "20MiB"), "20 MiB", "--device-memory")
    failed(generate(folder, "--device-memory", "0"), "device_memory 0")
    assert before is None or (bytes_read() or 0) - before < 4 * MIB
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sparsity", ["1.01", "-0.01", "1.5", "nan", "inf", "-inf"])
def test_sparsity_out_of_range(llama: Path, tmp_path: Path, sparsity: str) -> None:
    failed(generate(llama, "--sparsity", sparsity), "sparsity")
    failed(export(llama, tmp_path / "out", "--sparsity", sparsity), "sparsity")
    failed(generate(llama, "--sparsity", "half"), "--sparsity", code=2)


@pytest.mark.parametrize(
    "name", ["", " ", "no-such-model", "./none", "/none/at/all", "x.gguf", "a\nb", "a\0", "\x1b[31m"]
)
def test_no_such_model(name: str) -> None:
    failed(run("generate", "--model", name, "--prompt", "Hello"))


def test_models_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    failed(generate(tmp_path / "empty"), "config.json", "nothing")
    failed(generate(tmp_path / "file.safetensors"), "is a file")


# The folder of an export, and the disk


def test_outs(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    failed(export(llama, tmp_path / "file"), "is a file")
    failed(export(llama, tmp_path / "file" / "below"), "file")
    failed(export(llama, tmp_path / "full"), "not empty", "--force")
    failed(export(llama, tmp_path / ("x" * 300)), "ile name too long")
    failed(export(llama, Path("/proc/none/out")), "/proc/none")
    failed(export(llama, Path("")))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "full", "full/mine.txt"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files larger than 60 kB cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
def test_the_disk_full_during_an_export(llama: Path, tmp_path: Path) -> None:
    failed(export(llama, tmp_path / "out"), "out cannot be written", "nothing was left behind")
    assert list(tmp_path.iterdir()) == []


# Ctrl-C


def reading(pid: int, file: Path) -> bool:
    """Whether a process holds a file open now."""
    try:
        return any(os.readlink(fd) == str(file) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # a file that was closed meanwhile
        return False


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into the process to see when the sweep runs")
@pytest.mark.parametrize("command", ["generate", "export-pruned"])
def test_ctrl_c_in_the_sweep(tmp_path: Path, command: str) -> None:
    folder = tiny_checkpoint(
        tmp_path / "m", "llama", num_hidden_layers=64, intermediate_size=1024, max_position_embeddings=20_000
    )
    (tmp_path / "p.txt").write_text("The sky is blue. " * 900)
    (tmp_path / "work").mkdir()
    more = [] if command == "generate" else ["--out", str(tmp_path / "work" / "out")]
    arguments = [command, "--model", str(folder), "--prompt-file", str(tmp_path / "p.txt"), "--sparsity", "0.5", *more]
    with subprocess.Popen(
        [*PYTHON, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        end = time.monotonic() + 60
        while not reading(process.pid, folder / SINGLE) and time.monotonic() < end:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    assert err.count("\n") == 1
    assert "interrupted" in err
    assert list((tmp_path / "work").iterdir()) == []
