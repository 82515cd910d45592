"""A tour of the library, as short programs. Read from top to bottom: open a model, plan, answer, prune, export."""

import inspect
from pathlib import Path

import pytest
from tiny import text_paragraph, tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import griffin_offload
from griffin_offload import Decoding, Engine, ExportFormat, Placement, Prior, Pruning
from griffin_offload.chat import Chat
from griffin_offload.errors import BudgetError
from griffin_offload.pruning.calibration import Calibration
from griffin_offload.pruning.prior import save_prior

QUESTION = "Why is the sky blue?"
SHORT = Decoding(max_new_tokens=8, greedy=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json, safetensors and a tokenizer. An alias or a hub id would do as well."""
    return tiny_checkpoint(tmp_path_factory.mktemp("usage") / "llama", "llama", chat=True)


def test_open_a_model(model: Path) -> None:
    engine = Engine(model, device_memory="2GiB")  # reads the headers; the weights wait for the first prompt

    ids = engine.encode(QUESTION)  # through the chat template, where the model has one
    assert engine.has_chat_template
    assert engine.tokenizer.decode(ids, skip_special_tokens=True).count(QUESTION) == 1
    assert len(engine.encode(QUESTION, raw=True)) < len(ids) < engine.context_length
    same = Engine(model, Placement(device_memory="2GiB"))  # options come as groups, or as plain keywords
    assert same.budget == engine.budget == 2 * 2**30


def test_plan_before_anything_is_read(model: Path) -> None:
    engine = Engine(model)

    whole = engine.plan(prompt_tokens=100, max_new_tokens=50, sparsity=0.0)
    half = engine.plan(100, 50, Pruning(sparsity=0.5))

    assert half.resident_bytes < whole.resident_bytes <= whole.full_bytes
    assert half.fits
    assert half.peak <= half.budget


def test_answer_a_prompt(model: Path) -> None:
    engine = Engine(model)

    answer = engine.generate(engine.encode(QUESTION), Pruning(sparsity=0.5), Decoding(max_new_tokens=8, greedy=True))

    assert answer.text == engine.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert answer.finish_reason in ("length", "stop")
    assert answer.report.measured_peak > 0  # bytes; answer.report.plan is what was predicted
    # The same as keywords; what is no option of ours goes to transformers' generate.
    again = engine.generate(engine.encode(QUESTION), sparsity=0.5, max_new_tokens=8, do_sample=False)
    assert again.token_ids == answer.token_ids
    # The neurons that the prompt kept, by layer and block: here half of 96, for one block in each layer.
    assert [len(layer[0]) for layer in engine.kept_neurons()] == [48, 48, 48]


def test_answer_several_prompts_from_one_reading(model: Path) -> None:
    engine = Engine(model)
    prompts = [engine.encode(QUESTION), engine.encode("What is rain?")]

    each = engine.generate_batch(prompts, Pruning(sparsity=0.5), SHORT, per_prompt=True)

    alone = [engine.generate(ids, Pruning(sparsity=0.5), SHORT) for ids in prompts]
    assert [answer.token_ids for answer in each] == [answer.token_ids for answer in alone]
    shared = engine.generate_batch(prompts, Pruning(sparsity=0.5), SHORT)  # one set of kept neurons for all
    assert len(shared) == 2


def test_stream_an_answer(model: Path) -> None:
    engine = Engine(model)
    ids = engine.encode(QUESTION)

    tokens = engine.stream(ids, Pruning(sparsity=0.5), SHORT)
    text = "".join(token.text for token in tokens)

    assert text == tokens.answer.text  # the whole answer, with its report, once it has ended
    with engine.stream(ids, Pruning(sparsity=0.5), SHORT) as tokens:  # leaving the block cancels what is to come
        first = next(tokens)
    assert tokens.answer.token_ids == [first.id]
    assert tokens.answer.finish_reason == "interrupted"


def test_chat(model: Path, tmp_path: Path) -> None:
    chat = Chat(Engine(model), Pruning(sparsity=0.5), SHORT, system="Answer in one word.")

    chat.ask(QUESTION)
    answer = chat.ask("And at night?")  # the whole conversation is the prompt

    assert [turn["role"] for turn in chat.conversation.messages] == ["system", *["user", "assistant"] * 2]
    assert chat.conversation.messages[-1]["content"] == answer.text
    chat.conversation.save(tmp_path / "chat.json")


def test_export_and_load_in_transformers(model: Path, tmp_path: Path) -> None:
    engine = Engine(model)
    ids = engine.encode(QUESTION)

    export = engine.export(ids, tmp_path / "pruned", Pruning(sparsity=0.5), prompt_text=QUESTION)

    pruned = AutoModelForCausalLM.from_pretrained(export.path)
    assert pruned.config.intermediate_size == 48  # of 96
    assert AutoTokenizer.from_pretrained(export.path)("rain").input_ids
    gguf = ExportFormat("gguf", gguf_type="q8_0")  # for llama.cpp
    assert engine.export(ids, tmp_path / "p.gguf", Pruning(sparsity=0.5), gguf, prompt_text=QUESTION).path.is_file()


def test_neurons_of_many_texts(model: Path, tmp_path: Path) -> None:
    engine = Engine(model)
    texts = Calibration([engine.encode(text_paragraph(60), raw=True), engine.encode(QUESTION, raw=True)])

    prior = engine.score_samples(texts)  # a score for every neuron, from one reading of the weights

    save_prior(tmp_path / "prior.safetensors", prior)
    for scores in (prior, tmp_path / "prior.safetensors"):  # the scores, or the file
        pruning = Pruning(sparsity=0.5, prior=scores, prior_weight=0.4)
        assert engine.generate(engine.encode(QUESTION), pruning, SHORT).token_ids
    export, static = engine.export_static(texts, tmp_path / "static", sparsity=0.5)  # one model for all prompts
    assert isinstance(static, Prior)
    assert AutoModelForCausalLM.from_pretrained(export.path).config.intermediate_size == 48


def test_what_does_not_fit_is_refused_before_it_is_read(model: Path) -> None:
    engine = Engine(model, device_memory="1MiB")

    with pytest.raises(BudgetError, match="needs") as error:
        engine.generate(engine.encode(QUESTION))

    assert isinstance(error.value, griffin_offload.GriffinError)  # as is every mistake that a user can make


def test_progress(model: Path) -> None:
    engine, layers, pieces = Engine(model), [], []

    answer = engine.generate(
        engine.encode(QUESTION),
        decoding=SHORT,
        on_layer=lambda done, total: layers.append((done, total)),  # as the prompt passes
        on_text=pieces.append,  # as the answer is made
    )

    assert layers == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert "".join(pieces) == answer.text


def test_the_public_names() -> None:
    """What `from griffin_offload import ...` gives: each of them is there, and nothing else is promised."""
    promised = {"Engine", "Pruning", "Decoding", "Placement", "ExportFormat", "FfnSkip", "Prior", "Answer", "Plan"}
    promised |= {"Report", "GriffinError", "__version__"}
    assert set(griffin_offload.__all__) == promised
    for name in promised - {"__version__"}:
        assert inspect.isclass(getattr(griffin_offload, name)), name
    assert griffin_offload.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="nonsense"):
        griffin_offload.nonsense  # noqa: B018
