"""The obvious, slow truth: GRIFFIN (Dong, Chen, Chi 2024, arXiv:2404.01365) on a whole model in memory.

Plain torch and transformers, nothing of griffin_offload: no weight is moved or cut, neurons are only zeroed.
T tokens of the prompt, C of the continuation, N generated, F feed-forward neurons, V vocabulary."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

Experts = Sequence[Tensor] | None  # per layer, the neurons kept, ascending; None keeps all
_DOWN = ("mlp.down_proj", "mlp.fc2", "mlp.c_proj", "fc2")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model by plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def down_projections(model: PreTrainedModel) -> list[nn.Linear]:
    """The down projection of each decoder layer, first layer first. Their input is the paper's Z."""
    return [next(m for name, m in layer.named_modules() if name in _DOWN) for layer in decoder_layers(model)]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return getattr(model.model, "decoder", model.model).layers


@torch.no_grad()
def activations(model: PreTrainedModel, prompt_ids: Sequence[int]) -> list[Tensor]:
    """Z of each layer, (T, F), of one forward over the prompt."""
    captured: list[Tensor] = []
    downs = down_projections(model)
    handles = [down.register_forward_pre_hook(lambda _, args: captured.append(args[0])) for down in downs]
    try:
        model(_batch(prompt_ids), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [z.reshape(len(prompt_ids), -1) for z in captured]


def statistic(model: PreTrainedModel, prompt_ids: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The paper's s of each layer, (F,): column norms of Z after each of its rows is brought to unit length."""
    return [_column_norms(z.to(dtype)) for z in activations(model, prompt_ids)]


def _column_norms(z: Tensor) -> Tensor:
    lengths = z.norm(dim=1, keepdim=True)
    rows = torch.where(lengths > 0, z / lengths, 0)  # a row of zeros (ReLU) has no direction, and counts for nothing
    return rows.norm(dim=0)


def experts(model: PreTrainedModel, prompt_ids: Sequence[int], sparsity: float) -> list[LongTensor]:
    """Per layer the k = int(F (1 - sparsity)) neurons of the largest s, ascending; of equals the first ones."""
    return [_largest(s, sparsity) for s in statistic(model, prompt_ids)]


def _largest(s: Tensor, sparsity: float) -> LongTensor:
    order = s.argsort(descending=True, stable=True)
    return order[: int(len(s) * (1 - sparsity))].sort().values


def margin(model: PreTrainedModel, prompt_ids: Sequence[int], sparsity: float) -> float:
    """By how much, relatively, the last neuron kept exceeds the first one left out, in the tightest layer.

    Below 1e-5 rounding may swap the two, and one neuron of a small model can move its logits by 0.5."""
    gaps = []
    for s in statistic(model, prompt_ids, torch.float64):
        k = int(len(s) * (1 - sparsity))
        if 0 < k < len(s):
            last, first = s.sort(descending=True).values[k - 1 : k + 1]
            gaps.append(((last - first) / last).item())
    return min(gaps, default=float("inf"))


def masked_generate(
    model: PreTrainedModel, prompt_ids: Sequence[int], experts: Experts, max_new_tokens: int
) -> tuple[list[int], Tensor]:
    """Greedy tokens and the logits (N, V) each was chosen from: the prompt by the full model, then token by token
    with every neuron outside the experts zeroed. Ends after an end-of-sequence token, which is included."""
    logits, cache = _forward(model, prompt_ids, None)
    steps, tokens = [logits[-1]], [int(logits[-1].argmax())]
    with _masked(model, experts):
        while len(tokens) < max_new_tokens and tokens[-1] not in end_tokens(model):
            logits, cache = _forward(model, tokens[-1:], cache)
            steps.append(logits[-1])
            tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(steps)


def full_generate(model: PreTrainedModel, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[list[int], Tensor]:
    """As masked_generate with every neuron kept."""
    return masked_generate(model, prompt_ids, None, max_new_tokens)


def continuation_logits(
    model: PreTrainedModel, prompt_ids: Sequence[int], continuation_ids: Sequence[int], experts: Experts
) -> Tensor:
    """Logits (C, V) from which each continuation token is predicted, given the true tokens before it.

    The first row is the full model's, from the prompt; the others come of one masked forward on its cache."""
    first, cache = _forward(model, prompt_ids, None)
    if len(continuation_ids) == 1:
        return first
    with _masked(model, experts):
        rest, _ = _forward(model, continuation_ids[:-1], cache, keep=0)
    return torch.cat([first, rest])


def end_tokens(model: PreTrainedModel) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Sequence[int], cache: Any, keep: int = 1) -> tuple[Tensor, Any]:
    """Logits of the last `keep` tokens (0: of all), and the cache with these tokens added."""
    output = model(_batch(ids), past_key_values=cache, use_cache=True, logits_to_keep=keep)
    return output.logits[0].float(), output.past_key_values


@contextmanager
def _masked(model: PreTrainedModel, experts: Experts) -> Iterator[None]:
    handles = []
    for down, kept in [] if experts is None else zip(down_projections(model), experts, strict=True):

        def zero_the_rest(_: nn.Module, args: tuple[Tensor], kept: Tensor = kept) -> tuple[Tensor]:
            z = torch.zeros_like(args[0])
            z[..., kept] = args[0][..., kept]
            return (z,)

        handles.append(down.register_forward_pre_hook(zero_the_rest))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batch(ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)])
