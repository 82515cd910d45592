"""The text of the automatic prior as samples of token ids."""

import json

from tiny import START_ID, tiny_tokenizer

from griffin_offload.pruning.shipped_text import LONGEST, PATH, shipped_samples

ROWS = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def test_rows_are_exchanges_that_end_in_an_answer_and_passages() -> None:
    chats = [row["messages"] for row in ROWS if "messages" in row]
    assert len(chats) >= 9
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in chats)
    assert sum("```" in chat[1]["content"] for chat in chats) >= 3
    assert sum("text" in row for row in ROWS) >= 2


def test_exchanges_pass_through_the_chat_template_with_their_answers() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    samples = shipped_samples(tokenizer, has_chat_template=True)
    assert len(samples) == len(ROWS)
    assert all(0 < len(sample) <= LONGEST for sample in samples)
    for row, sample in zip(ROWS, samples, strict=True):
        assert (START_ID in sample) == ("messages" in row)
    whole = tokenizer.apply_chat_template(ROWS[0]["messages"], return_dict=False)
    assert samples[0] == list(whole)[:LONGEST]


def test_a_model_without_a_template_reads_plain_text() -> None:
    tokenizer = tiny_tokenizer()
    samples = shipped_samples(tokenizer, has_chat_template=False)
    question, answer = (message["content"] for message in ROWS[0]["messages"])
    assert samples[0] == tokenizer(f"{question}\n\n{answer}")["input_ids"][:LONGEST]


def test_a_template_that_refuses_leaves_plain_text() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    plain = shipped_samples(tiny_tokenizer(), has_chat_template=False)
    assert shipped_samples(tokenizer, has_chat_template=True) == plain
