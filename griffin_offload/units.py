"""Parses and prints bytes, for the whole package: GiB = 2**30, GB = 1e9."""

import re
from decimal import Decimal

from .errors import OptionError

KIB, MIB, GIB = 2**10, 2**20, 2**30
MOST = 2**63  # bytes: what a program can count
_UNITS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": 2**40}
_UNITS |= {"KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str | int) -> int:
    """'4GiB', '4900MB', '500 MiB', '1.5g' or a plain number of bytes -> bytes. Raises OptionError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS:
        shown = str(text)[:60]
        raise OptionError(f"{shown!r} is not an amount of memory: write 4GiB, 4900MB, 500MiB or a number of bytes")
    if "." in match[1] and match[2].upper() in ("", "B"):
        raise OptionError(f"{str(text)[:40]!r} is a part of a byte: write a unit, as in {match[1]}GiB")
    count = Decimal(match[1]) * _UNITS[match[2].upper()]
    if count >= MOST:
        raise OptionError(f"{str(text)[:40]!r} is more memory than a machine can have: the most is below 8 EiB")
    return int(count)


def parse_budget(text: str | int) -> int:
    """As `parse_bytes`, of memory that a model runs in. Raises OptionError for none."""
    if (size := parse_bytes(text)) < 1:
        raise OptionError(f"device_memory {text} is outside its range: a model needs some, such as 4GiB")
    return size


def format_bytes(count: float) -> str:
    """Bytes -> '1.75 GiB', '306 MiB', '12 KiB' or '7 B'."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= unit:
            value = count / unit
            return f"{value:.2f} {name}" if unit == GIB or value < 10 else f"{value:.0f} {name}"
    return f"{count:.0f} B"


def format_rate(bytes_per_second: float) -> str:
    """Bytes per second -> '2.15 GB/s' (decimal, as disks and memory are sold)."""
    return f"{bytes_per_second / 1e9:.2f} GB/s"
