"""The compiled library (src/kernels.cpp), and which of the processor's instructions it takes.

GRIFFIN_CPU names other instructions than the best that the processor has, or `none`."""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from ..errors import OptionError

VARIABLE = "GRIFFIN_CPU"
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int


@cache
def instructions() -> Sequence[str]:
    """The sets of instructions that there are kernels for, the best first, '' for one that this processor lacks; none
    without the library."""
    loaded = library()
    if loaded is None:
        return ()
    names, number = [], 0
    while (name := loaded.griffin_instructions(number)) is not None:
        names.append(name.decode())
        number += 1
    return names


def chosen() -> str:
    """The instructions that kernels take; '' if there is no library, or none that is quicker than torch.

    Torch takes no AVX512 where ATEN_CPU_CAPABILITY says so; nor do we."""
    names = [name for name in instructions() if name]
    asked = os.environ.get(VARIABLE, "")
    if not asked and torch.backends.cpu.get_cpu_capability() == "AVX2":
        names = [name for name in names if not name.startswith("avx512")]
    if asked:
        return asked if asked in names else ""
    return names[0] if names and names[0] != "plain" else ""


def check_asked() -> None:
    """Raises OptionError where GRIFFIN_CPU names what there is no kernel for."""
    asked, there = os.environ.get(VARIABLE, ""), [name for name in instructions() if name]
    if asked not in ("", "none", *there):
        raise OptionError(f"{VARIABLE}: there are no kernels {asked!r} here; there are: {', '.join([*there, 'none'])}")


def number_of(name: str) -> int:
    """What the library calls a set of instructions."""
    return list(instructions()).index(name)


@cache
def library() -> ctypes.CDLL | None:
    """The library; None if it was not compiled."""
    for path in sorted(Path(__file__).parent.glob("_kernels*")):
        try:
            loaded = ctypes.CDLL(str(path))
            loaded.griffin_instructions.restype = ctypes.c_char_p
            loaded.griffin_product.argtypes = [POINTER, NUMBER, NUMBER, POINTER, ctypes.c_uint]
            loaded.griffin_unpack.argtypes = [POINTER, ctypes.c_int64, NUMBER, NUMBER, POINTER, NUMBER]
            sizes = ctypes.c_int64, ctypes.c_int64, ctypes.c_float
            loaded.griffin_rms_norm.argtypes = [POINTER, POINTER, *sizes, NUMBER, NUMBER, POINTER]
            loaded.griffin_to_int4.argtypes = [POINTER, NUMBER, POINTER, ctypes.c_uint]
        except (OSError, AttributeError):  # of another platform, or of another version
            continue
        return loaded
    return None


@cache
def parallel() -> int | None:
    """The address of the function that runs torch's own threads: a second pool would fight with them for the cores.
    None: kernels take one thread."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            return ctypes.cast(loaded.GOMP_parallel, POINTER).value
        except (OSError, AttributeError):
            continue
    return None
