"""`griffin generate`: streams, JSON, prompts, options, and what is refused."""

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import Result
from command_line import ANSWER, KEYS, Run, failed
from griffin_offload.cli.main import griffin
from transformers import AutoTokenizer


def test_the_answer_alone_is_on_stdout_and_the_report_on_stderr(run: Run, model: Path) -> None:
    facts = json.loads(run("generate", "--model", model, "--prompt", "Hello", *ANSWER, "--json").stdout)
    result = run("generate", "--model", model, "--prompt", "Hello", *ANSWER)
    assert result.exit_code == 0
    assert result.stdout == facts["text"] + "\n"
    assert facts["text"]
    for label in ("resident", "peak memory", "budget", "decoding"):
        assert re.search(rf"^{label} ", result.stderr, re.MULTILINE)
    assert "\x1b" not in result.stderr, "no bar and no colour where there is no terminal"


PLAIN = {
    *("text", "reply", "prompt_token_ids", "token_ids", "finish_reason"),
    *("model", "model_path", "sparsity", "dtype", "device", "kernels", "fold", "ffn_skip", "steps", "fidelity"),
    *("overridden", "calibrated", "turn", "shared", "lossless", "refreshes"),
}


def test_json_is_one_object_with_the_promised_keys(run: Run, model: Path) -> None:
    result = run("generate", "--model", model, "--prompt", "Hello", "--sparsity", "0.5", *ANSWER, "--json")
    assert result.stdout.count("\n") == 1
    facts = json.loads(result.stdout)
    assert set(facts) == PLAIN | set(KEYS)
    for name, keys in KEYS.items():
        assert set(facts[name]) >= keys
    assert (facts["model"], facts["model_path"]) == (str(model), str(model))
    assert (facts["sparsity"], facts["dtype"], facts["device"]) == (0.5, "float32", "cpu")
    assert facts["finish_reason"] == "length"
    assert len(facts["token_ids"]) == 8
    assert facts["experts"] == {"kept_per_layer": [48, 48, 48], "layers": 3}
    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert facts["prompt_token_ids"] == chat["input_ids"]


def ids(result: Result) -> list[int]:
    assert result.exit_code == 0, result.output
    return list(json.loads(result.stdout)["prompt_token_ids"])


def test_a_prompt_is_the_same_from_its_three_sources(run: Run, model: Path, tmp_path: Path) -> None:
    common = ("generate", "--model", model, "--max-new-tokens", "1", "--json")
    text = "Grüße,\nwhat is 1+1?"
    (tmp_path / "p.txt").write_text(text + "\n")
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    expected = ids(run(*common, "--prompt", text))
    assert ids(run(*common, stdin=text + "\n")) == expected, "a newline at the end belongs to the file"
    assert ids(run(*common, "--prompt-file", tmp_path / "p.txt")) == expected
    assert ids(run(*common, "--prompt-file", tmp_path / "windows.txt")) == expected
    assert ids(run(*common, "--prompt-file", "-", stdin=text)) == expected
    assert ids(run(*common, "--prompt", text + "\n")) != expected, "an argument is taken as it is"


def test_raw_and_system(run: Run, model: Path) -> None:
    common = ("generate", "--model", model, "--max-new-tokens", "1", "--json", "--prompt", "Hello")
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert ids(run(*common, "--raw")) == tokenizer("Hello")["input_ids"]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids(run(*common, "--system", "Be brief.")) == expected


def test_sampling_options(run: Run, model: Path) -> None:
    def tokens(*options: str) -> list[int]:
        result = run("generate", "--model", model, "--prompt", "Hi", "--max-new-tokens", "8", "--json", *options)
        return list(json.loads(result.stdout)["token_ids"])

    greedy = tokens("--greedy")
    assert tokens() == greedy, "this model's own generation config does not sample"
    assert tokens("--seed", "1", "--temperature", "5") == tokens("--seed", "1", "--temperature", "5")
    assert tokens("--seed", "1", "--temperature", "5") != tokens("--seed", "2", "--temperature", "5")
    assert tokens("--temperature", "5", "--seed", "1") != greedy
    assert tokens("--top-k", "1") == greedy
    assert tokens("--top-p", "0.0001", "--temperature", "0.01") == greedy


def test_nothing_is_pruned_unless_asked_where_the_model_fits(run: Run, model: Path) -> None:
    common = ("generate", "--model", model, "--prompt", "Hello", *ANSWER, "--json")
    whole, pruned = run(*common), run(*common, "--sparsity", "0.5")
    assert json.loads(whole.stdout)["sparsity"] == 0
    assert "the whole model fits the device: no offloading needed" in whole.stderr
    assert "whole model fits" not in pruned.stderr
    assert "whole model fits" not in run(*common, "--sparsity", "0").stderr, "asked for, so there is nothing to say"


def test_text_streams_to_stdout_as_it_is_made(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdout:
        """Remembers what was there at each flush."""

        encoding = "utf-8"

        def __init__(self) -> None:
            self.text, self.flushed = "", [""]

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None:
            if self.text != self.flushed[-1]:
                self.flushed.append(self.text)

        def isatty(self) -> bool:
            return False

    stdout = Stdout()
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as caught:
        griffin.main(["generate", "--model", str(model), "--prompt", "Hello", "--max-new-tokens", "24", "--greedy"])
    assert caught.value.code == 0
    assert len(stdout.flushed) > 8
    assert stdout.flushed[-1].endswith("\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sparsity", "1.5"], ["sparsity", "1.5"]),
        (["--sparsity", "-0.5"], ["sparsity", "-0.5"]),
        (["--sparsity", "nan"], ["sparsity", "nan"]),
        (["--max-new-tokens", "0"], ["max_new_tokens"]),
        (["--temperature", "-1"], ["temperature", "greedy"]),
        (["--stop", ""], ["stop", "empty"]),
        (["--top-p", "1.5"], ["top_p"]),
        (["--top-k", "-1"], ["top_k"]),
        (["--seed", "-1"], ["seed"]),
        (["--device-memory", "much"], ["'much'", "4GiB"]),
        (["--device-memory", "10MB"], ["10 MiB", "budget"]),
        (["--device", "toaster"], ["'toaster'", "cpu"]),
    ],
)  # fmt: skip
def test_an_option_outside_its_range_is_one_line_and_code_1(
    run: Run, model: Path, options: list[str], words: list[str]
) -> None:
    words = [word.replace("10 MiB", "9.54 MiB") for word in words]
    failed(run("generate", "--model", model, "--prompt", "Hello", *options), 1, *words)


def test_skipped_blocks_are_reported(run: Run, deep: Path) -> None:
    options = ("--model", deep, "--prompt", "Hello", *ANSWER, "--ffn-skip", "1", "--ffn-skip-cold", "2,3")
    facts = json.loads(run("generate", *options, "--ffn-skip-warmup", "0", "--json").stdout)
    assert facts["ffn_skip"]["by_layer"] == [0, 0, 1, 1, 1, 0, 0, 0]
    block = facts["experts"]["kept_per_layer"][2] * 3 * 32 * 4
    assert facts["memory"]["resident_bytes"] - facts["memory"]["bytes_per_token"] == 3 * block
    said = run("generate", *options, "--ffn-skip-warmup", "0").stderr
    assert re.search(r"^skipped blocks +37.5% of 100.0% asked; by layer, in %: 0 0 100 100 100 0 0 0$", said, re.M)
    said = run("generate", *options, "--ffn-skip-mode", "prompt").stderr
    assert re.search(r"^skipped blocks +37.5% of 100.0% asked; layers: 2 3 4$", said, re.MULTILINE)


def test_the_defaults_in_the_help_are_those_of_the_rule(run: Run) -> None:
    from griffin_offload.options import FfnSkip

    defaults, screen = FfnSkip(0.5), " ".join(run("generate", "--help").stdout.split())
    first, last = defaults.cold
    for name, default in (
        ("cold FIRST,LAST", f"{first},{last}"),
        ("warmup N", defaults.warmup),
        ("run N", defaults.run),
    ):
        assert re.search(rf"--ffn-skip-{name} [^\[]*\[default: {default}[\],]", screen), name
    assert re.search(rf"--ffn-skip-mode [^\[]*\[token\|prompt\][^\[]*\[default: {defaults.mode}\]", screen)


def test_bad_prompts(run: Run, model: Path, tmp_path: Path) -> None:
    common = ("generate", "--model", model)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    failed(run(*common, "--prompt", ""), 1, "prompt is empty")
    failed(run(*common, stdin=""), 1, "prompt is empty")
    failed(run(*common, "--prompt-file", tmp_path / "empty.txt"), 1, "prompt is empty")
    failed(run(*common, "--prompt-file", tmp_path / "none.txt"), 1, "none.txt", "no such file")
    failed(run(*common, "--prompt-file", tmp_path), 1, str(tmp_path), "is a directory")
    failed(run(*common, "--prompt-file", "nul\0"), 1, "null")
    failed(run(*common, "--prompt-file", tmp_path / "latin.txt"), 1, "latin.txt", "not UTF-8", "byte 2")
    failed(run(*common, stdin=b"\xff\xfe"), 1, "stdin", "not UTF-8")
    failed(run(*common, "--prompt", "\udcff"), 1, "not UTF-8")
    failed(run(*common, "--prompt", "x" * 300), 1, "256")


def test_a_one_token_prompt_works(run: Run, base: Path) -> None:
    result = run("generate", "--model", base, "--prompt", "a", "--raw", "--sparsity", "0.5", *ANSWER)
    assert result.exit_code == 0
    assert result.stdout.strip()


@pytest.mark.parametrize("command", ["generate", "chat", "export-pruned", "mem-report"])
def test_no_such_model(run: Run, tmp_path: Path, command: str) -> None:
    more: dict[str, list[object]] = {
        "generate": ["--prompt", "a"],
        "export-pruned": ["--prompt-file", "-", "--out", tmp_path / "out"],
    }
    result = run(command, "--model", tmp_path / "nothing", *more.get(command, []), stdin="a")
    failed(result, 1, "nothing")


def test_a_broken_model_is_one_line(run: Run, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: 3000 if file.suffix == ".safetensors" else None])
    failed(run("generate", "--model", copy, "--prompt", "a"), 1, "model.safetensors")


def test_a_variable_names_the_default_device(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_DEVICE", "toaster")
    command = ("generate", "--model", model, "--prompt", "Hello", *ANSWER)
    failed(run(*command), 1, "GRIFFIN_DEVICE: there is no device 'toaster'", "cpu")
    assert run(*command, "--device", "cpu").exit_code == 0


def test_lossless_gives_the_full_models_answer_and_tells_how(run: Run, model: Path) -> None:
    whole = run("generate", "--model", model, "--prompt", "Hello", "--sparsity", "0", *ANSWER)
    asked = ("--sparsity", "0.5", "--rest", "int4", "--lossless")
    result = run("generate", "--model", model, "--prompt", "Hello", *asked, *ANSWER)
    assert result.stdout == whole.stdout
    assert re.search(r"^lossless +\d+ tokens by \d+ passes", result.stderr, re.MULTILINE)
    assert "fidelity" not in result.stderr, "it is the full model's answer"


def test_quiet_is_for_one_command(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("generate", "--model", model, "--prompt", "Hello", "--quiet", *ANSWER).stderr == ""
    assert (
        "AutoModelForCausalLM"
        in run("export-pruned", "--model", model, "--prompt", "a", "--out", tmp_path / "o").stderr
    )
