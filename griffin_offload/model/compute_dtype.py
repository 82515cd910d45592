"""The dtype that a model computes in: the one that was asked for, or the checkpoint's.

GPTQ and AWQ name float16, the dtype of their GPU kernels. A CPU multiplies several times as quickly in bfloat16, and
what that rounds off of a quantized weight is small beside what the weight has lost already. A GPU before Ampere has
no products in bfloat16."""

import torch

from ..checkpoint.headers import WEIGHT_DTYPES, Checkpoint, Packed, TensorInfo
from ..errors import CheckpointError
from ..memory.cuda import multiplies_bfloat16

TOLD = "dtype float16 of config.json: bfloat16 is much quicker on a CPU (--dtype float16 takes it)"
TOLD_ON_GPU = "dtype bfloat16 of config.json: this GPU has products in float16 (--dtype bfloat16 takes it, slowly)"


def compute_dtype(checkpoint: Checkpoint, device: str, asked: str | None = None) -> tuple[torch.dtype, list[str]]:
    """The dtype for a device, and in words what of config.json does not act.

    Raises CheckpointError where no weight has a dtype to compute in."""
    if asked:
        return getattr(torch, asked), []
    infos = checkpoint.tensors.values()
    if device == "cpu" and any(_is_quantized(info) and info.dtype == torch.float16 for info in infos):
        return torch.bfloat16, [TOLD]
    decoded = any(info.encoding and info.dtype == torch.bfloat16 for info in infos)
    dtype = torch.bfloat16 if decoded else _most_common(checkpoint)
    if dtype == torch.bfloat16 and not multiplies_bfloat16(device):
        return torch.float16, [TOLD_ON_GPU]
    return dtype, []


def _is_quantized(info: TensorInfo) -> bool:
    """By another tool: with scales beside it."""
    return isinstance(info.encoding, Packed) and bool(info.encoding.sides)


def _most_common(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most bytes have."""
    bytes_by_dtype: dict[torch.dtype, int] = {}
    for info in (info for info in checkpoint.tensors.values() if info.dtype in WEIGHT_DTYPES):
        bytes_by_dtype[info.dtype] = bytes_by_dtype.get(info.dtype, 0) + info.bytes
    if not bytes_by_dtype:
        raise CheckpointError(
            f"{checkpoint.folder} holds no weights in bfloat16, float16 or float32: a quantized checkpoint, which "
            "cannot be read"
        )
    dtype = max(bytes_by_dtype, key=lambda d: bytes_by_dtype[d])
    return torch.float32 if dtype == torch.float64 else dtype
