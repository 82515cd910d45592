"""Penalties on logits, held against their definition."""

import torch

from griffin_offload.serving.processors import Penalise, Penalties


def test_penalties_are_taken_from_the_answers_tokens_alone_and_biases_added() -> None:
    penalties = Penalties(presence=0.5, frequency=0.25, bias={3: 2.0, 9: -100.0})
    penalise, scores = Penalise(penalties, prompt=2), torch.randn(1, 10)
    for answer in ([], [4], [4, 4, 0, 12]):  # 12: the table of embeddings may have rows that the lm_head lacks
        expected = scores[0].tolist()
        for token in range(10):
            count = answer.count(token)
            expected[token] += penalties.bias.get(token, 0.0) - 0.25 * count - (0.5 if count else 0.0)
        found = penalise(torch.tensor([[7, 7, *answer]]), scores)
        torch.testing.assert_close(found, torch.tensor([expected]))
