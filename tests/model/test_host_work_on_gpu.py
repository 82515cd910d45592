"""What the host does for a token beside the replay of its step: two waits, and few operators, on an emulated card."""

from collections.abc import Callable
from typing import Any

import pytest
from cases import Case
from emulator import CARDS
from tiny import tiny_prompt

from griffin_offload import Engine
from griffin_offload.serving.processors import Logprobs, Penalise, Penalties

if CARDS:
    from host_work import TokenWork, tokens_watched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CARDS, reason="counted on an emulated card alone")]
NEW = 24
STOP_CHECK = ["_to_copy between host and device in StopCheck.__call__", "_local_scalar_dense in StopCheck.__call__"]


def watched(engine: Engine, prompts: int, **options: Any) -> "TokenWork":
    """The work of a token in the middle of an answer."""
    with tokens_watched() as tokens:
        engine.generate_batch(
            [tiny_prompt(20, number) for number in range(prompts)],
            **{"sparsity": 0.5, "rest": "drop", "max_new_tokens": NEW, "on_text": lambda text: None, **options},
        )
    assert len(tokens) > NEW // 2
    return tokens[len(tokens) // 2]


@pytest.mark.parametrize(
    ("options", "prompts", "meanwhile"),
    [
        ({"greedy": True}, 1, 17),
        ({"greedy": True}, 3, 17),
        ({"greedy": True, "stop": ("\nUser:",)}, 1, 19),
        ({"greedy": True, "rest": "int4"}, 1, 17),
        ({"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 1}, 1, 29),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])  # an embedding in its file, and one that is the lm_head
def test_a_token_waits_for_the_device_twice(
    case: Callable[[str], Case], kind: str, options: dict[str, Any], prompts: int, meanwhile: int
) -> None:
    """Both waits are transformers': for the token itself, and for whether the answer has ended. So are all operators
    `meanwhile`, of which another version may have one or two more."""
    token = watched(Engine(case(kind).folder, device="cuda", dtype="float32"), prompts, **options)
    assert token.waits == STOP_CHECK
    assert len(token.between) <= 6, token.between
    assert len(token.meanwhile) <= meanwhile, token.meanwhile


def test_penalties_and_logprobs_wait_for_nothing_more(case: Callable[[str], Case]) -> None:
    """The logprobs of a token are asked for when it is handed on: its distribution is on the host by then."""

    def likelihoods(device: str) -> list[float]:
        logprobs, penalise = Logprobs(3, 20), Penalise(Penalties(0.5, 0.5, {5: 1.0, 7: -1.0}), 20)
        stream = Engine(case("llama").folder, device=device, dtype="float32").stream(
            tiny_prompt(20),
            **{"sparsity": 0.5, "rest": "drop", "greedy": True, "max_new_tokens": NEW},
            logits_processor=[logprobs, penalise],
        )
        return [logprobs.of(token.id).value for token in stream if token.id is not None]

    with tokens_watched() as tokens:
        found = likelihoods("cuda")
    assert found == pytest.approx(likelihoods("cpu"), abs=1e-4)
    token = tokens[len(tokens) // 2]
    assert token.waits == STOP_CHECK
    assert len(token.between) <= 6
