"""Calibration samples: how they are made of texts and of questions, without a model."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from griffin_offload.errors import GriffinError, OptionError, PromptError
from griffin_offload.pruning.calibration_texts import CalibrationText, Samples, draw_samples, read_source

BOS = 1
PAIRS = [{"question": f"q{i}?", "rationale": f"since {i}", "answer": f"a{i}"} for i in range(40)]
TEXTS = [{"text": f"text {i} " + "word " * i} for i in range(1, 30)]


def encode(text: str) -> list[int]:
    """<s>, then a token for each character."""
    return [BOS, *(ord(c) for c in text)]


def decode(ids: list[int]) -> str:
    assert ids[0] == BOS
    return "".join(map(chr, ids[1:]))


def draw(*sources: CalibrationText, **options: Any) -> Samples:
    return draw_samples(encode, sources, bos=BOS, **{"samples": 4, "tokens": 100, **options})


def texts(*sources: CalibrationText, **options: Any) -> list[str]:
    return [decode(ids) for ids in draw(*sources, **options).ids]


def test_qa_is_one_pair_with_its_reasoning_before_the_answer() -> None:
    found = texts(CalibrationText("p", PAIRS), form="qa")
    assert len(set(found)) == 4
    for text in found:
        assert re.fullmatch(r"Question: q(\d+)\?\nAnswer: since \1 a\1\n\n", text)
    assert re.fullmatch(
        r"Question: q(\d+)\?\nAnswer: a\1\n\n", texts(CalibrationText("p", PAIRS), form="qa", rationale=False)[0]
    )


def test_pairs_are_joined_to_just_the_length_and_none_comes_twice() -> None:
    samples = draw(CalibrationText("p", PAIRS), samples=8)  # concat is the default of questions
    assert [len(ids) for ids in samples.ids] == [100] * 8
    questions = re.findall(r"q\d+\?", " ".join(map(decode, samples.ids)))
    assert len(questions) == len(set(questions)) > 20
    assert all(decode(ids).startswith("Question: ") for ids in samples.ids)
    assert samples.facts["texts"][0]["form"] == "concat"


def test_questions_alone() -> None:
    assert all(
        re.fullmatch(r"Question: q\d+\?\n", text) for text in texts(CalibrationText("p", PAIRS), form="question")
    )


def test_a_short_text_is_whole_and_a_long_one_is_cut_somewhere() -> None:
    rows = {f"text {i}": row["text"] for i, row in enumerate(TEXTS, 1)}
    found = texts(CalibrationText("t", TEXTS), samples=29, tokens=50)
    assert sum(text in rows.values() for text in found) == 8
    inside = [text for text in found if text not in rows.values()]
    assert all(len(text) == 49 and any(text in whole for whole in rows.values()) for text in inside)
    assert not all(text.startswith("text") for text in inside)


def test_a_long_text_gives_pieces_that_do_not_overlap() -> None:
    text = "".join(chr(200 + i) for i in range(1000))
    found = texts(CalibrationText("t", text), samples=10)
    assert len(found) == 10
    assert all(len(piece) == 99 and piece in text for piece in found)
    assert len(set("".join(found))) == 990
    assert found != sorted(found)
    assert texts(CalibrationText("t", text[:30])) == [text[:30]]


def test_shares_and_what_is_told_of_them() -> None:
    text = CalibrationText("a.txt", "".join(chr(200 + i) for i in range(2000)), 3)
    samples = draw(text, CalibrationText("b.jsonl", PAIRS, 1), form="qa", samples=8)
    assert [decode(ids).startswith("Question") for ids in samples.ids] == [False] * 6 + [True] * 2
    assert samples.notes == ()
    told = samples.facts["texts"]
    assert [(of["file"], of["share"], of["form"], of["samples"]) for of in told] == [
        ("a.txt", 3, "text", 6),
        ("b.jsonl", 1, "qa", 2),
    ]
    assert told[0]["sha256"] == hashlib.sha256(text.content.encode()).hexdigest()
    assert told[0]["tokens"] == 600
    assert draw(text, CalibrationText("b", PAIRS, 1e-6), samples=8).facts["texts"][1]["samples"] == 1


def test_a_seed_repeats_the_draw_and_another_changes_it() -> None:
    sources = CalibrationText("t", TEXTS), CalibrationText("p", PAIRS)
    assert draw(*sources, seed=1) == draw(*sources, seed=1)
    assert draw(*sources, seed=1).facts["samples_sha256"] != draw(*sources, seed=2).facts["samples_sha256"]


def test_where_there_is_too_little_nothing_is_repeated() -> None:
    samples = draw(CalibrationText("t", [{"text": "one"}, {"text": "two"}, {"text": "one"}]), samples=5)
    assert sorted(map(decode, samples.ids)) == ["one", "two"]
    assert samples.notes == ("t makes 2 samples of up to 100 tokens, not 5",)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "t.txt").write_text("Some text.")
    pairs, text = read_source(tmp_path / "p.jsonl", 0.5), read_source(tmp_path / "t.txt")
    assert draw(pairs).ids == draw(CalibrationText("x", PAIRS)).ids
    assert (text.name, text.content, pairs.share, pairs.asks) == ("t.txt", "Some text.", 0.5, True)
    assert pairs.sha256 == hashlib.sha256((tmp_path / "p.jsonl").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"prompt": "b"}\n', 'a.jsonl, line 2: neither a "text" nor a "question"'),
        ("a.jsonl", '{"text": "a"}\n{"question": "b"}\n', 'a.jsonl, line 2: the "answer" is missing'),
        ("a.jsonl", '{"text": " "}\n', 'line 1: the "text" is missing, empty'),
        ("a.jsonl", '{"question": "a", "answer": "b", "rationale": 3}\n', 'line 1: the "rationale"'),
        ("a.jsonl", '{"text": "a"}\nb\n', "line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"question": "b", "answer": "c"}\n', "a.jsonl mixes rows"),
        ("a.jsonl", "", "no rows"),
        ("a.txt", " \n", "a.txt is empty"),
        ("a.txt", None, "no such file"),
        ("a.jsonl", None, "no such file"),
    ],
)
def test_a_bad_file_is_named_and_its_line(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(GriffinError, match=re.escape(words)):
        read_source(tmp_path / name)


def test_what_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GriffinError, match=r"a.txt: it is not UTF-8"):
        read_source(tmp_path / "a.txt")


def test_options_that_cannot_be() -> None:
    text, pairs = CalibrationText("t", TEXTS), CalibrationText("p", PAIRS)
    for share in (0, -1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="share"):
            CalibrationText("t", TEXTS, share)
    with pytest.raises(PromptError, match="row 2"):
        CalibrationText("t", [{"text": "a"}, {}])
    with pytest.raises(PromptError, match="at least one text"):
        draw()
    with pytest.raises(OptionError, match="1 samples cannot"):
        draw(text, pairs, samples=1)
    with pytest.raises(OptionError, match="at least 2"):
        draw(text, tokens=1)
    with pytest.raises(OptionError, match="'prose' is not known"):
        draw(text, form="prose")
    with pytest.raises(OptionError, match="'text' needs rows"):
        draw(text, pairs, form="text")
    with pytest.raises(OptionError, match="'qa' needs rows"):
        draw(text, form="qa")
