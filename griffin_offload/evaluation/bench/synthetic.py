"""A checkpoint with a known model's shape and random weights: speed and memory do not depend on their values.

It holds what transformers' save_pretrained writes: config, generation config, tokenizer and safetensors."""

import math
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from ...checkpoint.safetensors_writer import CheckpointWriter
from ...errors import BudgetError
from ...files import FULL
from ...model.skeleton import Skeleton
from ...paths import cache_folder, require_disk
from ...sources.hub import Progress, is_complete
from ...sources.resolve import CatalogueModel
from ...units import MIB
from ...workspace import workspace

BLOCK, PIECE = 2**24, 2**22  # random numbers drawn; elements written at a time, from a random place in the block
STD = 0.02
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIALS = [PAD, BOS, EOS]  # ids 0, 1, 2
NORM_OF_ONE = {"gemma": 0.0, "gemma2": 0.0, "gemma3_text": 0.0}  # their norms multiply by 1 + weight


def synthetic_folder(alias: str) -> Path:
    return cache_folder() / "synthetic" / alias


def synthesise(model: CatalogueModel, folder: Path, on_progress: Progress | None = None) -> Path:
    """Writes the checkpoint into `folder`, whole or not at all, unless it is there already. Returns the folder.

    on_progress(what, done, total), in bytes. Raises BudgetError where the disk has no room, OSError."""
    if is_complete(folder):
        return folder
    config = AutoConfig.for_model(**model.config)
    skeleton = Skeleton(config, torch.bfloat16)
    config.architectures = [type(skeleton.model).__name__]
    config.pad_token_id, config.bos_token_id, config.eos_token_id = (SPECIALS.index(t) for t in (PAD, BOS, EOS))
    shapes = {name: shape for name, shape in skeleton.layout.shapes.items() if name not in skeleton.layout.aliases}
    buffers = {name: skeleton.model.state_dict()[name] for name in skeleton.layout.buffers}  # scales, a router's bias
    need = 2 * sum(map(math.prod, shapes.values())) + 64 * MIB
    require_disk(folder, need, f"a synthetic {model.alias}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with workspace(folder.parent) as work:
            (made := work / folder.name).mkdir()
            _write_weights(made, shapes, buffers, NORM_OF_ONE.get(config.model_type, 1.0), model.alias, on_progress)
            _write_rest(made, config)
            made.rename(folder)
    except OSError as error:
        if error.errno in FULL:
            raise BudgetError(f"the disk became full while {folder} was made; nothing of it is left") from error
        if not is_complete(folder):  # else another process was quicker
            raise
    return folder


def _write_weights(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    buffers: dict[str, Tensor],
    norm: float,
    alias: str,
    on_progress: Progress | None,
) -> None:
    """Matrices of random numbers with STD, norms' weights `norm`, biases 0, the same ones every time; buffers as they
    are."""
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(BLOCK).normal_(std=STD, generator=generator).bfloat16()
    total = 2 * sum(map(math.prod, shapes.values()))
    with CheckpointWriter(folder, shapes | {n: tuple(b.shape) for n, b in buffers.items()}, torch.bfloat16) as writer:
        for name, buffer in buffers.items():
            writer.write(name, buffer.bfloat16())
        sizes = (
            size
            for name, shape in shapes.items()
            for size in writer.write_pieces(name, _pieces(name, shape, block, norm, generator))
        )
        for done in accumulate(sizes):
            if on_progress:
                on_progress(f"synthetic {alias}", done, total)


def _pieces(
    name: str, shape: tuple[int, ...], block: Tensor, norm: float, generator: torch.Generator
) -> Iterator[Tensor]:
    """The elements of a tensor in pieces: bfloat16 (PIECE,), the last one shorter."""
    count = math.prod(shape)
    for begin in range(0, count, PIECE):
        size = min(PIECE, count - begin)
        if len(shape) == 1:
            yield torch.full((size,), norm if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
        else:
            offset = int(torch.randint(BLOCK - size + 1, (), generator=generator))
            yield block[offset : offset + size]


def _write_rest(folder: Path, config: Any) -> None:
    config.save_pretrained(folder)
    # No end: random weights would end some answers early.
    GenerationConfig(bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id).save_pretrained(folder)
    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in SPECIALS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=PAD
    ).save_pretrained(folder)
