"""What the turns of a chat cost: each computes what is new, whatever becomes of the conversation."""

from pathlib import Path

import pytest
from tiny import CHAT_TEMPLATE, tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.chat import Chat
from griffin_offload.engine import Answer
from griffin_offload.offload.earlier_turns import REWRITTEN
from griffin_offload.options import Decoding, Pruning

SHORT = Pruning(0.5), Decoding(max_new_tokens=8, greedy=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("chat")
    return {kind: tiny_checkpoint(made / kind, kind, chat=True) for kind in ("llama", "falcon_h1")}


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Engine:
    return Engine(folders["llama"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama"))


def cost(answer: Answer) -> tuple[int, int]:
    """Tokens of the prompt that were kept, and computed."""
    assert answer.report.turn
    return answer.report.turn.kept_tokens, answer.report.turn.computed_tokens


def test_each_turn_computes_what_is_new(engine: Engine) -> None:
    engine.unload()
    chat = Chat(engine, *SHORT)
    first, second = chat.ask("one"), chat.ask("two")
    begin, end = len(first.prompt_token_ids), len(second.prompt_token_ids)
    assert cost(first) == (0, begin)
    assert cost(second) == (begin, end - begin)
    assert second.report.bytes_read < first.report.bytes_read
    again = chat.regenerate()
    assert cost(again) == (end, 0)
    assert again.token_ids == second.token_ids
    chat.conversation.undo()
    other = chat.ask("three")
    assert cost(other)[0] >= begin
    assert (
        other.token_ids == Chat(Engine(engine.path), *SHORT).engine.generate(other.prompt_token_ids, *SHORT).token_ids
    )
    chat.conversation.system = "Be brief."
    assert cost(chat.ask("four"))[0] == 0


def test_a_template_that_drops_thoughts_keeps_all_before_them(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer begins with <think>, which the template leaves out of earlier turns."""
    thinks = CHAT_TEMPLATE.replace("<|start|>assistant\n' }}{% endif", "<|start|>assistant\n<think>' }}{% endif")
    assert thinks != CHAT_TEMPLATE
    monkeypatch.setattr(engine.tokenizer, "chat_template", thinks)
    engine.unload()
    for chosen in (Pruning(0.0), Pruning(0.5)):
        chat = Chat(engine, chosen, SHORT[1])
        begin = len(chat.ask("a question that is longer than an answer's beginning").prompt_token_ids)
        kept, _ = cost(chat.ask("two"))
        assert begin - REWRITTEN <= kept < begin


def test_a_setting_changes_the_neurons_and_the_conversation_goes_on(engine: Engine) -> None:
    chat = Chat(engine, *SHORT)
    begin = len(chat.ask("one").prompt_token_ids)
    chat.set("sparsity", "0.75")
    assert cost(chat.ask("two"))[0] == begin
    chat.set("ffn_skip", "0.3")
    answer = chat.ask("three")
    assert answer.report.turn
    assert answer.report.turn.why_not == "blocks are skipped by what the whole prompt shows"
    assert "blocks are skipped" in dict(answer.report.rows())["prompt pass"]


def test_a_transcript_of_a_base_model_goes_on(base: Engine) -> None:
    chat = Chat(base, *SHORT)
    begin = len(chat.ask("one").prompt_token_ids)
    assert begin - REWRITTEN <= cost(chat.ask("two"))[0] <= begin


@pytest.mark.parametrize("kind", ["llama", "falcon_h1"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_conversation_that_is_changed_goes_on_from_what_is_the_same(
    folders: dict[str, Path], kind: str, sparsity: float
) -> None:
    """As a user changes it, each time one exchange more: the answers are those of an engine that keeps nothing."""
    chat = Chat(Engine(folders[kind]), Pruning(sparsity), SHORT[1], "Be kind.")
    fresh = Engine(folders[kind])

    def ask(text: str) -> tuple[int, int]:
        answer = chat.ask(text)
        assert answer.token_ids == fresh.generate(answer.prompt_token_ids, Pruning(sparsity), SHORT[1]).token_ids
        return cost(answer)

    one = sum(ask("one"))
    two = sum(ask("two"))
    chat.conversation.undo()
    kept, computed = ask("another two")  # what an edited question is
    assert one <= kept < two
    assert computed < kept + computed
    chat.conversation.undo()
    chat.conversation.undo()
    kept, _ = ask("another one")
    assert kept < one
    assert kept or kind == "falcon_h1"  # which keeps copies of its states in two turns
    chat.conversation.system = "Be brief."
    assert ask("two")[0] < REWRITTEN  # how the system message begins
    assert ask("three")[0] > one
