"""The config of a folder: read once, and as transformers reads it."""

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_checkpoint
from transformers import AutoConfig

from griffin_offload import Engine
from griffin_offload.model.pretrained import load_config, read_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "m", "llama", chat=True)


def test_config_json_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)  # then it is in config.json
    opened = []

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def open_noted(path: Any, *more: Any, **options: Any) -> Any:
            opened.append(os.path.basename(str(path)))
            return real(path, *more, **options)

        return open_noted

    monkeypatch.setattr(os, "open", noting(os.open))
    monkeypatch.setattr(builtins, "open", noting(open))
    Engine(folder)
    assert opened.count("tokenizer_config.json") >= 1
    assert opened.count("config.json") == 1


@pytest.mark.parametrize("versions", [["config.4.0.0.json"], ["config.4.0.0.json", "config.99.0.0.json"], []])
def test_other_versions_of_a_config_are_taken_as_by_transformers(folder: Path, versions: list[str]) -> None:
    facts = json.loads((folder / "config.json").read_text())
    for number, name in enumerate(versions):
        (folder / name).write_text(json.dumps({**facts, "rms_norm_eps": 0.25 * (number + 1)}))
    (folder / "config.json").write_text(json.dumps({**facts, "configuration_files": versions}))
    ours = load_config(folder, read_config(folder))
    assert ours.rms_norm_eps == AutoConfig.from_pretrained(folder).rms_norm_eps
    assert (ours.rms_norm_eps == 0.25) == bool(versions)


@pytest.mark.parametrize("tag", ["Infinity", "-Infinity"])
def test_a_float_that_json_has_not_is_read_as_by_transformers(folder: Path, tag: str) -> None:
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "rms_norm_eps": {"__float__": tag}}))
    ours = load_config(folder, read_config(folder))
    assert ours.rms_norm_eps == AutoConfig.from_pretrained(folder).rms_norm_eps == float(tag)
