"""In the place of torch.cuda.cudart(): page-locks memory of the host that is there already."""

from . import tensor

DONE, INVALID, ALREADY, NOT_LOCKED = 0, 1, 712, 713


def cudaHostRegister(begin: int, size: int, flags: int) -> int:  # noqa: N802
    if size <= 0 or flags & ~0xF:
        return INVALID
    if any(begin < end and first < begin + size for first, end in list(tensor.pinned.items())):
        return ALREADY
    tensor.pinned[begin] = begin + size
    return DONE


def cudaHostUnregister(begin: int) -> int:  # noqa: N802
    return NOT_LOCKED if tensor.pinned.pop(begin, None) is None else DONE
