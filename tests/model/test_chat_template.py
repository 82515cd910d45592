"""Chat templates in every form that transformers accepts."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.errors import PromptError

BEGIN = "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n"
END = "<|end|>\n{% endfor %}<|start|>assistant\n"
PARTS = BEGIN + "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}" + END
STRICT = BEGIN + "{% if m['content'] is string %}{{ raise_exception('parts only') }}{% endif %}" + PARTS[len(BEGIN) :]
MIXED = (
    BEGIN + "{% if m['role'] == 'system' %}{{ m['content'] }}{% else %}{% for p in m['content'] %}{{ p['text'] }}"
    "{% endfor %}{% endif %}" + END
)
BOTH = (
    BEGIN + "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}!{% endif %}" + END
)
NO_SYSTEM = (
    BEGIN + "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m['content'] }}" + END
)
TWO = [{"name": "default", "template": PARTS}, {"name": "rag", "template": ""}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Rayleigh."},
    {"role": "user", "content": "And red?"},
]
SAID = "<s>" + "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in TALK) + "<|start|>assistant"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bare") / "m", "llama")


def with_files(bare: Path, out: Path, files: dict[str, Any]) -> Engine:
    for file in bare.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    for name, content in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        whole = json.loads((out / name).read_text()) | content if name == "tokenizer_config.json" else content
        (out / name).write_text(whole if isinstance(whole, str) else json.dumps(whole))
    return Engine(out)


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": PARTS},
        {"chat_template.jinja": STRICT},
        {"chat_template.jinja": MIXED},
        {"chat_template.jinja": BOTH},
        {"chat_template.jinja": CHAT_TEMPLATE},
        {"tokenizer_config.json": {"chat_template": PARTS}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": PARTS}]}},
        {"tokenizer_config.json": {"chat_template": TWO}},
        {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": CHAT_TEMPLATE}]}},
        {"additional_chat_templates/rag.jinja": "", "chat_template.jinja": PARTS},
        {"chat_template.json": {"chat_template": PARTS}},
        {"processor_config.json": {"chat_template": MIXED}},
    ],
)
def test_the_whole_conversation_is_in_the_prompt(bare: Path, tmp_path: Path, files: dict[str, Any]) -> None:
    engine = with_files(bare, tmp_path, files)
    assert engine.has_chat_template
    assert engine.tokenizer.decode(engine.encode_chat(TALK)).rstrip() == SAID
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    assert engine.tokenizer.decode(engine.encode_chat(parts)).rstrip() == SAID
    assert "Why is the sky blue?" in engine.tokenizer.decode(engine.encode("Why is the sky blue?"))


def test_a_template_without_a_system_message(bare: Path, tmp_path: Path) -> None:
    engine = with_files(bare, tmp_path, {"chat_template.jinja": NO_SYSTEM})
    assert "And red?" in engine.tokenizer.decode(engine.encode_chat(TALK[1:]))
    with pytest.raises(PromptError, match="no system"):
        engine.encode_chat(TALK)


def test_several_templates_without_a_default_are_named(bare: Path, tmp_path: Path) -> None:
    several = [{"name": name, "template": CHAT_TEMPLATE} for name in ("rag", "tool_use")]
    engine = with_files(bare, tmp_path, {"tokenizer_config.json": {"chat_template": several}})
    with pytest.raises(PromptError, match=r"rag, tool_use.*--raw"):
        engine.encode("Hello")
    assert engine.encode("Hello", raw=True)


@pytest.mark.parametrize("template", ["{{ bos_token }}", "{% for m in messages %}{{ m['role'] }}{% endfor %}"])
def test_a_template_that_leaves_the_question_out_is_refused(bare: Path, tmp_path: Path, template: str) -> None:
    engine = with_files(bare, tmp_path, {"chat_template.jinja": template})
    with pytest.raises(PromptError, match=r"leaves out.*--raw"):
        engine.encode("Hello")
