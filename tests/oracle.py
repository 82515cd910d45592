"""The obvious, slow truth: GRIFFIN (Dong, Chen, Chi 2024, arXiv:2404.01365) on a whole model in memory.

Plain torch and transformers, nothing of griffin_offload: no weight is moved or cut, neurons are only zeroed.
T tokens of the prompt, C of the continuation, N generated, F feed-forward neurons, E routed experts, V vocabulary.

A decoder layer holds one feed-forward block or more: a dense one, the experts of a mixture, experts shared by all
tokens. Every list here has one item for each block, in the order of `blocks`; in a dense model, one for each layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import LongTensor, Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

# Per block, the neurons kept, ascending: (k,), of routed experts (E, k). None keeps all.
Experts = Sequence[Tensor] | None
# Per block Z, (T, F); of routed experts one for each, with a row for each token routed to it.
Activations = Tensor | list[Tensor]
_DOWN = (
    *("mlp.down_proj", "mlp.fc2", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.Wo", "fc2"),
    *("ffn.down_proj", "ffn.2", "feed_forward.down_proj", "feed_forward.w2"),
    *("mixer.down_proj", "mixer.shared_experts.down_proj"),
    *("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj", "mlp.shared_mlp.down_proj"),
    *("feed_forward.shared_expert.down_proj", "shared_mlp.output_linear"),
)
_ROUTED = ("mlp.experts", "feed_forward.experts", "block_sparse_moe.experts", "mixer.experts", "experts")


class Block(NamedTuple):
    """A feed-forward block: its layer, and the module whose input is the paper's Z, or that holds routed experts.

    `name` is the module's path in the layer."""

    layer: int
    name: str
    module: nn.Module

    @property
    def routed(self) -> bool:
        return self.name in _ROUTED


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model by plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Those of the text model, where a model has others too: of the lists of that length the one with most weights."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))


def blocks(model: PreTrainedModel) -> list[Block]:
    """The feed-forward blocks of each decoder layer, first layer first."""
    return [
        Block(i, name, module)
        for i, layer in enumerate(decoder_layers(model))
        for name, module in layer.named_modules()
        if name in (*_DOWN, *_ROUTED)
    ]


def down_projections(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of `blocks`: a down projection, whose input is the paper's Z, or the routed experts of a mixture."""
    return [block.module for block in blocks(model)]


@torch.no_grad()
def activations(model: PreTrainedModel, prompt_ids: Sequence[int]) -> list[Activations]:
    """Z of each block, (T, F), of one forward over the prompt; of routed experts a list: the tokens that each got."""
    seen: dict[tuple[int, int], Tensor] = {}  # by block and expert

    def see(block: int, expert: int, z: Tensor) -> Tensor:
        seen[block, expert] = z.reshape(-1, z.shape[-1])
        return z

    with _watched(model, see):
        model(_batch(prompt_ids), use_cache=False, logits_to_keep=1)
    return [
        [seen[i, e] for e in range(_number(block.module))] if block.routed else seen[i, 0]
        for i, block in enumerate(blocks(model))
    ]


def statistic(model: PreTrainedModel, prompt_ids: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The paper's s of each block, (F,): column norms of Z after each of its rows is brought to unit length.

    Of routed experts (E, F): each token counts 1 in every expert it is routed to, whatever the router's weight."""
    return [
        torch.stack([_column_norms(rows.to(dtype)) for rows in z])
        if isinstance(z, list)
        else _column_norms(z.to(dtype))
        for z in activations(model, prompt_ids)
    ]


def _column_norms(z: Tensor) -> Tensor:
    lengths = z.norm(dim=1, keepdim=True)
    rows = torch.where(lengths > 0, z / lengths, 0)  # a row of zeros (ReLU) has no direction, and counts for nothing
    return rows.norm(dim=0)


def experts(model: PreTrainedModel, prompt_ids: Sequence[int], sparsity: float) -> list[LongTensor]:
    """Per block the k = int(F (1 - sparsity)) neurons of the largest s, ascending; of equals the first ones."""
    return [_largest(s, sparsity) for s in statistic(model, prompt_ids)]


def _largest(s: Tensor, sparsity: float) -> LongTensor:
    order = s.argsort(dim=-1, descending=True, stable=True)
    return order[..., : int(s.shape[-1] * (1 - sparsity))].sort().values


def margin(model: PreTrainedModel, prompt_ids: Sequence[int], sparsity: float) -> float:
    """By how much, relatively, the last neuron kept exceeds the first one left out, in the tightest block.

    Below 1e-5 rounding may swap the two, and one neuron of a small model can move its logits by 0.5."""
    gaps = []
    for s in statistic(model, prompt_ids, torch.float64):
        k = int(s.shape[-1] * (1 - sparsity))
        if 0 < k < s.shape[-1]:
            last, first = s.sort(dim=-1, descending=True).values[..., k - 1 : k + 1].reshape(-1, 2).unbind(1)
            some = last > 0  # where all the rest is zero (no token, ReLU), the first are kept, without rounding
            gaps += ((last - first) / last)[some].tolist()
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
    if cache is None:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    output = model(_batch(ids), past_key_values=cache, use_cache=True, logits_to_keep=keep)
    return output.logits[0].float(), output.past_key_values


@contextmanager
def _masked(model: PreTrainedModel, experts: Experts) -> Iterator[None]:
    if experts is None:
        yield
        return

    def zero_the_rest(block: int, expert: int, z: Tensor) -> Tensor:
        kept = experts[block]
        kept = kept[expert] if kept.ndim > 1 else kept
        masked = torch.zeros_like(z)
        masked[..., kept] = z[..., kept]
        return masked

    assert len(experts) == len(blocks(model))
    with _watched(model, zero_the_rest):
        yield


# see(block, expert, z) gets every Z, (..., F), on its way to the down projection, and gives back what goes on.
# A dense block has the one expert 0.
_See = Callable[[int, int, Tensor], Tensor]


@contextmanager
def _watched(model: PreTrainedModel, see: _See) -> Iterator[None]:
    handles, routed = [], []
    for i, block in enumerate(blocks(model)):
        if block.routed:
            block.module.forward = _by_hand(block.module, lambda e, z, i=i: see(i, e, z))
            routed.append(block.module)
        else:
            handles.append(block.module.register_forward_pre_hook(lambda _, args, i=i: (see(i, 0, args[0]),)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in routed:
            del module.forward  # and the class's own is found again


def _by_hand(module: Any, see: Callable[[int, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The forward of a module of routed experts, one expert after the other, as it stands in the papers."""

    def mixture(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """hidden (T, D); index (T, K), the experts of a token; weights (T, K), by which their outputs are summed."""
        output = torch.zeros_like(hidden)
        for e in range(_number(module)):
            token, choice = (index == e).nonzero(as_tuple=True)
            z = see(e, _z(module, e, hidden[token]))
            output[token] += _down(module, e, z) * weights[token, choice, None]
        return output

    def llama4(hidden: Tensor) -> Tensor:
        """hidden (E T, D): all tokens for each expert, times the router's weight, which is 0 where it is not routed."""
        parts = [_down(module, e, see(e, _z(module, e, x))) for e, x in enumerate(hidden.chunk(_number(module)))]
        return torch.cat(parts)

    return llama4 if type(module).__name__ == "Llama4TextExperts" else mixture


def _number(module: Any) -> int:
    return len(module.down_proj)


def _z(module: Any, expert: int, x: Tensor) -> Tensor:
    """Z of one expert, (T, F), for x (T, D): the activation of gate, times up, in the module's own way."""
    if not hasattr(module, "gate_up_proj"):
        return module.act_fn(_matmul(x, module.up_proj[expert], module))
    gate_up = _matmul(x, module.gate_up_proj[expert], module)
    if hasattr(module, "gate_up_proj_bias"):
        gate_up = gate_up + module.gate_up_proj_bias[expert]
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _down(module: Any, expert: int, z: Tensor) -> Tensor:
    output = _matmul(z, module.down_proj[expert], module)
    return output + module.down_proj_bias[expert] if hasattr(module, "down_proj_bias") else output


def _matmul(x: Tensor, weight: Tensor, module: Any) -> Tensor:
    """Some types hold an expert's matrices as (in, out)."""
    transposed = getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")
    return x @ weight if transposed else x @ weight.T


def _batch(ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)])
