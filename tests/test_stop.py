"""Stop strings: the text ends before one of them, however its pieces fall, and the answer ends with it."""

import pytest
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import OptionError
from griffin_offload.options import Decoding, Pruning, with_text
from griffin_offload.text_stream import UntilStop


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Paris.\nUser: and", " Paris."),
        (" Paris.\nUsers are", " Paris.\nUsers are"),
        ("Paris\nUse", "Paris\nUse"),
        ("one ### two\nUser:", "one "),
        ("one ## two\nUser:", "one ## two"),
        ("\nUs#\nUser:", "\nUs#"),
        ("###", ""),
        ("", ""),
    ],
)
def test_the_text_ends_before_the_first_stop_string(text: str, shown: str, size: int) -> None:
    until, heard = UntilStop(("\nUser:", "###")), ""
    for begin in range(0, len(text), size):
        heard += until(text[begin : begin + size])
        assert shown.startswith(heard), "nothing is passed on that has to be taken back"
    assert heard + until.close() == until.text == shown
    assert until.done == (shown != text)
    if until.done:
        assert until("late") + until.close() == ""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny_checkpoint(tmp_path_factory.mktemp("stop") / "llama", "llama"))


HALF = Pruning(0.5, rest="drop")


def test_an_answer_ends_at_a_stop_string_alone_in_a_batch_and_as_a_stream(engine: Engine) -> None:
    prompts = [tiny_prompt(30), tiny_prompt(12, seed=3)]
    options = {"max_new_tokens": 30, "greedy": True}
    wholes = engine.generate_batch(prompts, HALF, per_prompt=True, **options)
    text = wholes[0].text
    pairs = (text[at : at + 2] for at in range(5, len(text)))
    stop = next(pair for pair in pairs if pair.isascii() and pair not in wholes[1].text)
    expected = text[: text.index(stop)]
    heard: list[str] = []
    alone = engine.generate(prompts[0], HALF, stop=[stop, "nowhere"], on_text=heard.append, **options)
    assert alone.text == alone.reply == "".join(heard) == expected
    assert alone.finish_reason == "stop"
    assert wholes[0].token_ids[: len(alone.token_ids)] == alone.token_ids
    assert stop in engine.tokenizer.decode(alone.token_ids)
    assert stop not in engine.tokenizer.decode(alone.token_ids[:-1])
    for per_prompt in (True, False):
        plain = engine.generate_batch(prompts, HALF, per_prompt=per_prompt, **options)
        both = engine.generate_batch(prompts, HALF, per_prompt=per_prompt, stop=stop, **options)
        for answer, whole in zip(both, plain, strict=True):
            assert answer.text == whole.text.partition(stop)[0]
            assert answer.finish_reason == ("stop" if stop in whole.text else "length")
    with engine.stream(prompts[0], HALF, stop=stop, **options) as tokens:
        assert "".join(token.text for token in tokens) == expected
        assert tokens.answer.token_ids == alone.token_ids


def test_stop_strings_as_options() -> None:
    assert Decoding(stop="###").stop == ("###",)
    assert with_text(Decoding(), "stop", r"\nUser:").stop == ("\nUser:",)
    assert with_text(Decoding(), "stop", '["a", "b"]').stop == ("a", "b")
    assert with_text(Decoding(stop="a"), "stop", "none").stop == ()
    for wrong in ("[1]", "[a"):
        with pytest.raises(OptionError, match="stop cannot be"):
            with_text(Decoding(), "stop", wrong)
    with pytest.raises(OptionError, match="an empty text"):
        Decoding(stop=["a", ""])


def test_temperature_0_is_greedy(engine: Engine) -> None:
    greedy = engine.generate(tiny_prompt(9), HALF, max_new_tokens=8, greedy=True).token_ids
    for more in ({}, {"top_p": 0.5, "seed": 4}, {"greedy": True}):
        answer = engine.generate(tiny_prompt(9), HALF, max_new_tokens=8, temperature=0, **more)
        assert answer.token_ids == greedy


def test_a_stop_string_within_drafted_tokens(engine: Engine) -> None:
    prompt, options = tiny_prompt(30), {"max_new_tokens": 30, "greedy": True, "lossless": True}
    text = engine.generate(prompt, HALF, **options).text
    stop = text[13:15]
    answer = engine.generate(prompt, HALF, stop=stop, **options)
    assert answer.text == text.partition(stop)[0]
    assert answer.finish_reason == "stop"
