"""`griffin export-pruned`: what is printed, and what is refused."""

import json
from pathlib import Path

import pytest
from command_line import Run, failed
from transformers import AutoModelForCausalLM


def test_an_export_says_which_blocks_are_zeros(run: Run, deep: Path, tmp_path: Path) -> None:
    skip = ("--ffn-skip", "1", "--ffn-skip-mode", "prompt", "--ffn-skip-cold", "2,3")
    result = run("export-pruned", "--model", deep, "--prompt", "Hello", "--out", tmp_path / "out", *skip)
    assert "3 blocks are left out, of layers 2, 3, 4: they are zeros in the file" in result.stderr
    result = run("export-pruned", "--model", deep, "--prompt", "Hello", "--out", tmp_path / "b", *skip, "--json")
    assert json.loads(result.stdout)["skipped"] == [2, 3, 4]


def test_export_prints_the_folder_and_how_to_load_it(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("export-pruned", "--model", model, "--prompt", "Hello", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}\n"
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path / 'out'}')" in result.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 48
    failed(
        run("export-pruned", "--model", model, "--prompt-file", "-", "--out", tmp_path / "out", stdin="a"), 1, "--force"
    )
    again = run(
        "export-pruned", "--model", model, "--prompt", "a", "--sparsity", "0.75", "--out", tmp_path / "out", "--force"
    )
    assert again.exit_code == 0, again.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24


def test_export_json(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("export-pruned", "--model", model, "--prompt", "Hello", "--out", tmp_path / "out", "--json")
    facts = json.loads(result.stdout)
    assert facts["path"] == str(tmp_path / "out")
    assert facts["sparsity"] == 0.5
    assert set(facts["files"]) == {file.name for file in (tmp_path / "out").iterdir()}
    assert facts["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_export_takes_the_prompt_from_a_file_of_that_name(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("What is the sky?\n")

    def prompt_hash(*prompt: str) -> str:
        result = run("export-pruned", "--model", model, *prompt, "--out", "out", "--force")
        assert result.exit_code == 0, result.stderr
        assert ("the text in the file p.txt" in result.stderr) == (prompt == ("--prompt", "p.txt"))
        assert ("the text given with --prompt" in result.stderr) == (prompt == ("--prompt", "What is the sky?"))
        return str(json.loads(Path("out/griffin.json").read_text())["prompt_sha256"])

    named = prompt_hash("--prompt", "p.txt")
    assert named == prompt_hash("--prompt-file", "p.txt") == prompt_hash("--prompt", "What is the sky?")
    Path("p.txt").write_text("")
    result = run("export-pruned", "--model", model, "--prompt", "p.txt", "--out", "none")
    assert result.exit_code == 1
    assert "prompt is empty" in result.stderr
    assert not Path("none").exists()


def test_a_sparsity_for_each_layer(run: Run, model: Path, tmp_path: Path) -> None:
    """Given with commas or in a file; a wrong number of them, or no number, is told."""
    (tmp_path / "shares.json").write_text("[0.25, 0.5, 1]\n")
    common = ("generate", "--model", model, "--prompt", "a", "--max-new-tokens", "2", "--json", "--sparsity")
    for shares in ("0.25,0.5,1", tmp_path / "shares.json"):
        answer = json.loads(run(*common, shares).stdout)
        assert answer["experts"]["kept_per_layer"] == [72, 48, 0]
        assert answer["sparsity"] == pytest.approx(1 - 120 / 288, abs=1e-3)
    failed(run(*common, "0.5,0.5"), 1, "2 sparsities", "3 layers")
    failed(run(*common, "half"), 2, "'half'", "is not a number")


def test_export_where_it_cannot(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    common = ("export-pruned", "--model", model, "--prompt-file", "-", "--out")
    failed(run(*common, tmp_path / "file", stdin="a"), 1, "is a file")
    failed(run(*common, tmp_path / "file" / "below", stdin="a"), 1, "file")
    assert (tmp_path / "file").read_text() == "mine"
    failed(run(*common, tmp_path / "out", "--sparsity", "2", stdin="a"), 1, "sparsity")
    assert not (tmp_path / "out").exists()


def test_export_as_gguf(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a b.gguf"
    common = ("export-pruned", "--model", model, "--prompt-file", "-", "--format", "gguf", "--out")
    result = run(*common, file, stdin="Hello")
    assert (result.exit_code, result.stdout) == (0, f"{file}\n"), result.stderr
    assert "in one file, of a model of " in result.stderr
    assert f"llama-cli -m '{file}'" in result.stderr
    again = run(*common, file, stdin="Hello")
    assert (again.exit_code, again.stdout) == (0, f"{file}\n"), again.stderr
    assert "is there already" in again.stderr
    failed(run(*common, file, stdin="Hi"), 1, "exists", "--force")
    options = ("--force", "--gguf-type", "q8_0", "--multiple-of", "96", "--json")
    facts = json.loads(run(*common, file, *options, stdin="Hello").stdout)
    assert facts["files"] == [file.name]
    assert facts["bytes"] == file.stat().st_size
    prompt = ("--prompt", "Hello", "--sparsity", "0", "--greedy", "--max-new-tokens", "8", "--json")
    answer = json.loads(run("generate", "--model", file, *prompt).stdout)
    assert answer["experts"]["kept_per_layer"] == [96] * 3


def test_export_options_that_do_not_go_together(run: Run, model: Path, tmp_path: Path) -> None:
    common = ("export-pruned", "--model", model, "--prompt-file", "-", "--out", tmp_path / "out.gguf")
    failed(run(*common), 2, "--format gguf")
    failed(run(*common[:-1], tmp_path / "out", "--gguf-type", "q8_0"), 2, "--format gguf")
    failed(run(*common[:-1], tmp_path / "out", "--format", "gguf", stdin="a"), 1, "does not end in .gguf")
    for option in ("--resident-dtype", "--rest"):
        failed(run(*common, "--format", "gguf", option, "int4"), 2, "--gguf-type q8_0", "llama-quantize")
    assert list(tmp_path.iterdir()) == []
