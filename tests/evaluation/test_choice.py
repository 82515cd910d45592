"""Multiple choice against log-likelihoods made by hand from the oracle's logits, and the command."""

import json
from pathlib import Path

import oracle
import pytest
import torch
from click.testing import CliRunner, Result
from griffin_offload.cli import eval_choice
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import GriffinError, OptionError, PromptError
from griffin_offload.evaluation import choice
from griffin_offload.evaluation.choice import Question, answer, encode_pair, log_likelihoods, read_questions
from griffin_offload.evaluation.scoring.variant import FULL, Variant

ROWS: list[dict[str, object]] = [
    {"context": "Alice was beginning to get very", "choices": ["tired", "happy indeed", "old"], "answer": 0},
    {"question": "Down, down, ", "choices": ["down", "up and away"], "answer": 1},
    {"query": "The sky is", "choices": [" blue", " green"], "answer": 0},
]
QUESTIONS = [
    Question("Alice was beginning to get very", ("tired", "happy indeed", "old"), 0),
    Question("Down, down, ", ("down", "up and away"), 1),
    Question("The sky is", (" blue", " green"), 0),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("choice") / "llama", "llama")


def jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def by_token(model: torch.nn.Module, context: list[int], continuation: list[int], sparsity: float) -> list[float]:
    """Log-probability of each token of the continuation, pruned to the context."""
    experts = oracle.experts(model, context, sparsity)
    logits = oracle.continuation_logits(model, context, continuation, experts).log_softmax(-1)
    return [row[token].item() for row, token in zip(logits, continuation, strict=True)]


def test_gen_mode_prunes_to_the_context(llama: Path) -> None:
    model, ids = oracle.load(llama), tiny_prompt(40)
    pairs = [(ids[:30], ids[30:]), (ids[:12], ids[12:13])]
    found = log_likelihoods(Engine(llama, dtype="float32"), pairs, [FULL, Variant(0.5, method="griffin")])
    for (context, continuation), (full, half) in zip(pairs, found, strict=True):
        assert full.total == pytest.approx(sum(by_token(model, context, continuation, 0.0)), abs=1e-3)
        assert half.total == pytest.approx(sum(by_token(model, context, continuation, 0.5)), abs=1e-3)
    assert found[0][0] != found[0][1]
    assert found[1][0] == found[1][1], "an answer of one token is the full model's"


def test_class_mode_prunes_the_last_input_token_alone(llama: Path) -> None:
    """The paper's: all but the last input token is the prompt, the answer's own tokens included."""
    model, ids = oracle.load(llama), tiny_prompt(40)
    pairs = [(ids[:30], ids[30:]), (ids[:12], ids[12:13]), (ids[:20], ids[20:22])]
    found = log_likelihoods(Engine(llama, dtype="float32"), pairs, [FULL, Variant(0.5, method="griffin")], "class")
    for (context, continuation), (full, half) in zip(pairs, found, strict=True):
        whole = context + continuation
        earlier = by_token(model, context, continuation, 0.0)[:-1]  # from the prompt's pass: the full model
        last = by_token(model, whole[:-2], whole[-2:], 0.5)[-1]  # whole[-2] is the one pruned input token
        assert half.total == pytest.approx(sum(earlier) + last, abs=1e-3)
        assert full.total == pytest.approx(sum(by_token(model, context, continuation, 0.0)), abs=1e-3)
        assert half.total != pytest.approx(full.total, abs=1e-3), "even an answer of one token is pruned"


@pytest.mark.parametrize("mode", choice.MODES)
def test_greedy_is_said_of_the_whole_answer(llama: Path, mode: str) -> None:
    context = tiny_prompt(30)
    tokens, _ = oracle.full_generate(oracle.load(llama), context, 6)
    others = [[(token + (i == place)) % 300 for i, token in enumerate(tokens)] for place in (0, 5)]
    found = log_likelihoods(Engine(llama, dtype="float32"), [(context, a) for a in (tokens, *others)], [FULL], mode)
    assert [one.greedy for (one,) in found] == [True, False, False]


def test_the_last_token_decides_greedy_in_class_mode(llama: Path) -> None:
    model, context = oracle.load(llama), tiny_prompt(30)
    tokens, _ = oracle.full_generate(model, context, 5)
    prompt, last = context + tokens[:-1], tokens[-1:]
    choices = []
    for experts in (oracle.experts(model, prompt, 0.9), None):
        logits = oracle.continuation_logits(model, prompt, [*last, 0], experts)
        choices.append(int(logits[-1].argmax()))
    pruned, full = choices
    assert pruned != full
    pairs = [(context, [*tokens, pruned]), (context, [*tokens, full])]
    found = log_likelihoods(Engine(llama, dtype="float32"), pairs, [Variant(0.9, method="griffin")], "class")
    assert [one.greedy for (one,) in found] == [True, False]


def test_an_unknown_mode_or_a_prompt_too_short(llama: Path) -> None:
    with pytest.raises(OptionError, match="gen, class"):
        log_likelihoods(Engine(llama), [([5, 6], [7])], [FULL], "best")
    with pytest.raises(PromptError, match="no context"):  # one token is read by the experts, and none chose them
        log_likelihoods(Engine(llama), [([5], [7])], [FULL], "class")


# Tokens


def characters(text: str) -> list[int]:
    return list(text.encode())


def merging(text: str) -> list[int]:
    """Two equal characters in a row are one token."""
    ids: list[int] = []
    for code in text.encode():
        ids = [*ids[:-1], code + 1000] if ids and ids[-1] == code else [*ids, code]
    return ids


def test_white_space_goes_to_the_continuation() -> None:
    assert encode_pair(characters, "ab \n", "cd") == (characters("ab"), characters(" \ncd"))
    assert encode_pair(characters, "ab", " cd") == (characters("ab"), characters(" cd"))


def test_the_continuation_is_what_the_whole_has_more() -> None:
    assert encode_pair(merging, "xa", "abc") == (merging("xa"), merging("bc")), "the a was merged into the context"
    with pytest.raises(PromptError, match="'a' is no token of its own after 'xa'"):
        encode_pair(merging, "xa", "a")


def test_a_space_joins_where_there_is_none() -> None:
    assert [question.continuations() for question in QUESTIONS] == [
        [" tired", " happy indeed", " old"],
        ["down", "up and away"],
        [" blue", " green"],
    ]


# Questions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    file.write_text(jsonl(ROWS))
    return file


def test_questions_are_read_under_any_of_the_three_keys(data: Path) -> None:
    assert read_questions(data) == QUESTIONS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ('{"choices": ["a"], "answer": 0}', '"context" is not a text'),
        ('{"context": 3, "choices": ["a"], "answer": 0}', '"context" is not a text'),
        ('{"query": " ", "choices": ["a"], "answer": 0}', '"query" is not a text'),
        ('{"context": "a", "answer": 0}', '"choices" is not a list of texts'),
        ('{"context": "a", "choices": [], "answer": 0}', '"choices" is not a list of texts'),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', '"choices" is not a list of texts'),
        ('{"context": "a", "choices": "bc", "answer": 0}', '"choices" is not a list of texts'),
        ('{"context": "a", "choices": ["b", "c"]}', '"answer" is not a number from 0 to 1'),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', '"answer" is not a number from 0 to 1'),
        ('{"context": "a", "choices": ["b", "c"], "answer": -1}', '"answer" is not a number from 0 to 1'),
        ('{"context": "a", "choices": ["b", "c"], "answer": "b"}', '"answer" is not a number from 0 to 1'),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', '"answer" is not a number from 0 to 1'),
    ],
)
def test_a_bad_row_is_named_by_line_and_key(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS[0]) + "\n\n" + line)
    with pytest.raises(GriffinError, match=rf"q\.jsonl, line 3: {words}"):
        read_questions(tmp_path / "q.jsonl")


# Answers


def test_the_likeliest_choice_is_taken_and_the_likeliest_a_character(llama: Path) -> None:
    model, engine = oracle.load(llama), Engine(llama, dtype="float32")
    variants = [FULL, Variant(0.5, method="griffin")]
    for variant, found in zip(variants, answer(engine, QUESTIONS, variants), strict=True):
        taken, normalised = [], []
        for question, totals in zip(QUESTIONS, found.log_likelihoods, strict=True):
            context = engine.encode(question.context.rstrip(), raw=True)
            hand = {}
            for text in question.continuations():
                spaces = question.context[len(question.context.rstrip()) :]
                ids = engine.tokenizer(spaces + text, add_special_tokens=False)["input_ids"]  # no merge at the seam
                hand[text] = sum(by_token(model, context, ids, variant.sparsity))
            assert totals == pytest.approx(list(hand.values()), abs=1e-3)
            texts = list(hand)
            taken.append(texts.index(max(texts, key=lambda text: hand[text])))
            normalised.append(texts.index(max(texts, key=lambda text: hand[text] / len(text.strip()))))
        assert found.taken == tuple(taken)
        assert found.taken_normalised == tuple(normalised)
        right = [a == question.answer for a, question in zip(taken, QUESTIONS, strict=True)]
        assert found.accuracy == pytest.approx(sum(right) / 3)
        assert found.standard_error == pytest.approx((found.accuracy * (1 - found.accuracy) / 2) ** 0.5)
        right = [a == question.answer for a, question in zip(normalised, QUESTIONS, strict=True)]
        assert found.accuracy_normalised == pytest.approx(sum(right) / 3)
        assert taken != normalised, "a long choice is likelier a character"


# griffin eval choice


def run(*arguments: object) -> Result:
    return CliRunner().invoke(eval_choice.command, [str(argument) for argument in arguments])


@pytest.mark.parametrize("mode", choice.MODES)
def test_the_command_prints_what_the_library_finds(llama: Path, data: Path, tmp_path: Path, mode: str) -> None:
    out = tmp_path / "scores.jsonl"
    options = ("--dtype", "float32", "--mode", mode, "--sparsity", 0, "--sparsity", 0.75, "--method", "griffin")
    result = run("--data", data, "--model", llama, *options, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    wanted = answer(Engine(llama, dtype="float32"), QUESTIONS, [FULL, Variant(0.75, method="griffin")], mode)
    results = facts.pop("results")
    assert results == [one.to_json() for one in wanted]
    assert results[1]["label"] == "75%"
    assert facts == {
        "model": str(llama),
        "model_path": str(llama),
        "data": str(data),
        "mode": mode,
        "questions": 3,
    }
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for index, (row, question) in enumerate(zip(rows, QUESTIONS, strict=True)):
        assert (row["context"], tuple(row["choices"]), row["answer"]) == (
            question.context,
            question.choices,
            question.answer,
        )
        for scores, one in zip(row["results"], wanted, strict=True):
            assert scores["label"] == one.label
            assert scores["log_likelihoods"] == pytest.approx(one.log_likelihoods[index])
            assert (scores["taken"], scores["taken_normalised"]) == (one.taken[index], one.taken_normalised[index])


def test_the_table_and_the_limit(llama: Path, data: Path) -> None:
    result = run("--data", data, "--model", llama, "--limit", 2)
    assert result.exit_code == 0, result.output
    title, table = result.stdout.split("\n\n")[:2]
    head, _, *rows = table.splitlines()
    assert "2 questions of questions.jsonl, gen mode" in " ".join(title.split())
    assert head.split() == ["pruned", "accuracy", "±", "normalised", "±"]
    assert [row.split()[0] for row in rows] == ["full", "50%,"]


def test_what_cannot_be_answered(llama: Path, data: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(jsonl([ROWS[0], {"context": "x " * 200, "choices": ["a"], "answer": 0}]))
    assert "reads at most 256" in str(run("--data", long, "--model", llama).exception)
    nowhere = run("--data", data, "--model", llama, "--out", tmp_path / "none" / "scores.jsonl")
    assert "does not exist" in str(nowhere.exception)
    assert "no such file" in str(run("--data", tmp_path / "none.jsonl", "--model", llama).exception)


def test_modes_in_the_help_are_the_librarys() -> None:
    assert eval_choice.MODES == choice.MODES
