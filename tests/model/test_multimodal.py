"""The text model of every multimodal wrapper, opened in place: against the wrapper itself, and none that nobody
looked at."""

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from engines import copying, greedy
from safetensors.torch import load_file, save_file
from tiny import tiny_prompt
from tiny_wrappers import tiny_wrapper, writer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from griffin_offload import Engine
from griffin_offload.errors import PromptError, UnsupportedArchitecture
from griffin_offload.model.multimodal import TWINS, text_config
from griffin_offload.model.refused import REFUSED_WRAPPERS
from griffin_offload.model.wrappers import WRAPPERS

PROMPT, NEW = tiny_prompt(), 12
# The same wrapper around another text model, as Ministral 3, InternVL 3.5 and LLaVA's many models come.
OTHER_TEXTS = [("mistral3", "ministral3"), ("internvl", "qwen3"), ("llava", "mistral"), ("llava_onevision", "qwen3")]


def test_every_wrapper_works_or_is_refused_with_a_reason() -> None:
    there = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.keys()
    assert not MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - there
    assert not there - WRAPPERS - REFUSED_WRAPPERS.keys(), "look at these; list them in multimodal.py or refused.py"
    assert not (WRAPPERS | REFUSED_WRAPPERS.keys()) - there
    assert not WRAPPERS & REFUSED_WRAPPERS.keys()
    assert all(len(reason) > 10 for reason in REFUSED_WRAPPERS.values())


def test_text_types_with_a_class_of_their_own_have_no_twin() -> None:
    assert not TWINS.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


@pytest.mark.parametrize("kind", ["llama4", "mllama", "blip-2", "fast_vlm"])
def test_a_refused_wrapper_is_named_with_its_reason(kind: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=kind) as error:
        text_config(CONFIG_MAPPING[kind]())
    assert REFUSED_WRAPPERS[kind] in str(error.value)


def test_a_text_model_that_is_refused_is_named() -> None:
    with pytest.raises(UnsupportedArchitecture, match="llama4_text"):
        text_config(CONFIG_MAPPING["llava"](text_config={"model_type": "llama4_text"}))


@pytest.mark.parametrize(("kind", "text"), [*((kind, None) for kind in sorted(WRAPPERS)), *OTHER_TEXTS])
def test_each_wrapper(tmp_path: Path, kind: str, text: str | None) -> None:
    """Its text model answers as the wrapper, whole and pruned; nothing else is read or counted; an export is a model of
    the text class."""
    folder = tmp_path / "m"
    model = writer(tiny_wrapper(folder, kind, text))
    engine = Engine(folder, dtype="float32")
    expected = oracle.full_generate(model, PROMPT, NEW)[0]
    assert len(set(expected)) > 1
    ids = torch.tensor([PROMPT])
    own = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    assert own[0, len(PROMPT) :].tolist() == expected
    answer, _ = greedy(engine, PROMPT, 0.0, NEW)
    assert answer.token_ids == expected
    kept = oracle.experts(model, PROMPT, 0.5)
    pruned, _ = greedy(engine, PROMPT, 0.5, NEW)
    assert pruned.token_ids == oracle.masked_generate(model, PROMPT, kept, NEW)[0]
    assert_only_the_text_model_is_read(engine, answer.report.bytes_read)
    engine.export(PROMPT, tmp_path / "out", prompt_text="x", sparsity=0.5, fold=False)
    loaded, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(facts.values()), facts
    assert type(loaded) is type(engine.skeleton.model)


def assert_only_the_text_model_is_read(engine: Engine, read: int) -> None:
    """The checkpoint that is counted is the text model, each tensor once; of an embedding the tokens' rows are read."""
    layout = engine.skeleton.layout
    bytes_of = {n: torch.Size(s).numel() * 4 for n, s in layout.shapes.items() if n not in layout.aliases}
    buffers = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.buffers.values())
    assert engine.opened.checkpoint.bytes == sum(bytes_of.values()) + buffers
    table = bytes_of[layout.table] if layout.table else 0
    rows = 1000 + (len(PROMPT) + NEW) * 4 * 32 if table else 1000  # the system counts a little more than weights
    assert 0 <= read - (engine.opened.checkpoint.bytes - table) <= rows


OLD_NAMES = {
    "llava": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")],
    "gemma3": [("model.language_model.", "language_model.model.")],
    "qwen2_vl": [("model.language_model.", "model."), ("model.visual.", "visual.")],
}


@pytest.mark.parametrize("kind", OLD_NAMES)
def test_names_of_older_files_are_found_as_transformers_finds_them(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "m"
    expected = oracle.full_generate(tiny_wrapper(folder, kind), PROMPT, NEW)[0]
    tensors = load_file(folder / "model.safetensors")
    for new, old in OLD_NAMES[kind]:
        tensors = {old + name.removeprefix(new) if name.startswith(new) else name: t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert greedy(Engine(folder), PROMPT, 0.0, NEW)[0].token_ids == expected


def test_an_older_config_with_the_text_models_fields_outside_is_understood(tmp_path: Path) -> None:
    """As Qwen2-VL's were published: one flat config, and rotary settings of type "mrope"."""
    folder = tmp_path / "m"
    expected = oracle.full_generate(tiny_wrapper(folder, "qwen2_vl"), PROMPT, NEW)[0]
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {name: value for name, value in text.items() if name not in ("model_type", "layer_types")}
    flat |= {"rope_theta": rope["rope_theta"]}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    (folder / "config.json").write_text(json.dumps(config | flat))
    engine = Engine(folder)
    assert greedy(engine, PROMPT, 0.0, NEW)[0].token_ids == expected
    assert "mrope" not in str(engine.opened.config.rope_parameters)


@pytest.mark.parametrize("open_engine", [Engine, copying])
def test_experts_are_turned_where_the_published_files_have_them_so(tmp_path: Path, open_engine: Any) -> None:
    """Qwen3-VL's mixtures: (E, D, 2 F) and (E, F, D) on disk, as transformers turns them."""
    folder = tmp_path / "m"
    tiny_wrapper(folder, "qwen3_vl_moe", fields={"moe_intermediate_size": 24})
    tensors = load_file(folder / "model.safetensors")
    turns = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert turns
    tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in turns}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for sparsity in (0.0, 0.5):
        kept = oracle.experts(model, PROMPT, sparsity) if sparsity else None
        expected = oracle.masked_generate(model, PROMPT, kept, NEW)[0]
        assert greedy(open_engine(folder), PROMPT, sparsity, NEW)[0].token_ids == expected


def test_end_tokens_of_the_wrapper_end_the_answer(tmp_path: Path) -> None:
    """Without a generation config, those of the wrapper's config count before the text model's, as in transformers."""
    folder = tmp_path / "m"
    expected = oracle.full_generate(tiny_wrapper(folder, "llava"), PROMPT, NEW)[0]
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": expected[2]}))
    answer, _ = greedy(Engine(folder), PROMPT, 0.0, NEW)
    assert answer.token_ids == expected[: expected.index(expected[2]) + 1]


def test_an_image_in_a_message_is_refused_and_text_parts_are_not(tmp_path: Path) -> None:
    tiny_wrapper(tmp_path / "m", "llava")
    engine = Engine(tmp_path / "m")
    image = {"type": "image", "url": "cat.png"}
    with pytest.raises(PromptError, match=r"'image'.*reads no images.*describe it in words"):
        engine.encode_chat([{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}])
    assert engine.encode_chat([{"role": "user", "content": "What is a cat?"}])


def test_the_chat_template_of_a_processor_is_used(tmp_path: Path) -> None:
    """Older multimodal checkpoints have it in a file of its own."""
    folder = tmp_path / "m"
    tiny_wrapper(folder, "llava")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert not Engine(folder).opened.prompts.has_chat_template
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert "assistant" in Engine(folder).opened.tokenizer.decode(Engine(folder).encode("What is a cat?"))
