"""Parses sizes, rates and times as people write them (``600MB``, ``100Mbit/s``, ``2ms``), and formats sizes, times and
names for printing.

MB are 10^6 bytes, MiB 2^20. Sizes are printed in MiB, small ones in KiB or bytes.
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from typing import NamedTuple

from tightfit.runtime.common.errors import InputError

KIB = 1 << 10
MIB = 1 << 20
LARGEST = (1 << 63) - 1
FEWEST_UNSAID = 50_000
"""bytes of a size from which on its unit may be left out: a smaller number is one of MiB whose unit was forgotten"""
FORMS = "write plain bytes (367001600), 350MB, 1.5GB (powers of 1000) or 350MiB, 1.5GiB (powers of 1024)"
RATES = "write 100Mbit/s, 1Gbit/s, 12.5MB/s (powers of 1000) or 12MiB/s (powers of 1024)"
TIMES = "write 2ms, 150us or 0.5s"

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
"""micro is written with either of its two characters, or with a u"""
_NUMBER = r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*"
_SIZE = re.compile(rf"{_NUMBER}([A-Za-z]*)\s*", re.ASCII)
_RATE = re.compile(rf"{_NUMBER}([A-Za-z]+)\s*/\s*s\s*", re.ASCII)
_TIME = re.compile(rf"{_NUMBER}([a-zµμ]+)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``600MB``, ``1.5 GiB`` or ``367001600``; fractions of a byte are dropped.

    Raises InputError, naming the value and the accepted forms, where `text` is anything else, zero or above 2^63 - 1,
    or a number below `FEWEST_UNSAID` without a unit.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or (unit == 1 and "." in match[1]):
        raise InputError(f"{text!r} is not a size; {FORMS}")
    size = int(Decimal(match[1]) * unit)
    if size <= 0:
        raise InputError(f"{text!r} is no memory at all; {FORMS}")
    if size > LARGEST:
        raise InputError(f"{text!r} is more than any machine can address; {FORMS}")
    if match[2] == "" and size < FEWEST_UNSAID:
        raise InputError(f"{text!r} has no unit: {size}MiB? write {size}MiB, or {size}B for so few bytes")
    return size


def parse_rate(text: str) -> float:
    """Bytes per second of a rate such as ``100Mbit/s``, ``12.5 MB/s`` or ``12MiB/s``: eight bits are a byte.

    Bytes have a capital B, since ``100Mb/s`` may mean either. Raises InputError, naming the value and the accepted
    forms, where `text` is anything else, zero or above 2^63 - 1.
    """
    match = _RATE.fullmatch(text)
    word = match[2] if match else ""
    bits = 8 * _UNITS.get(word.lower(), 0) if word.endswith("B") else _BITS.get(word.lower(), 0)
    if match is None or not bits:
        raise InputError(f"{text!r} is not a rate; {RATES}")
    rate = float(Decimal(match[1]) * bits / 8)
    if rate <= 0:
        raise InputError(f"{text!r}: nothing passes over such a link; {RATES}")
    if rate > LARGEST:
        raise InputError(f"{text!r} is more than any link carries; {RATES}")
    return rate


def parse_seconds(text: str) -> float:
    """Seconds of a time such as ``2ms``, ``150 us`` or ``0.5s``; none at all is ``0s``.

    Raises InputError, naming the value and the accepted forms, where `text` is anything else.
    """
    match = _TIME.fullmatch(text)
    unit = _SECONDS.get(match[2]) if match else None
    if match is None or unit is None:
        raise InputError(f"{text!r} is not a time; {TIMES}")
    return float(match[1]) * unit


def format_seconds(seconds: float) -> str:
    """Format seconds: three decimals, below 10 ms five (``0.00412 s``), below 1 ms microseconds with four digits
    (``12.5 µs``).
    """
    if 0 < seconds < 1e-3:
        return f"{seconds * 1e6:.4g} µs"
    return f"{seconds:.5f} s" if 0 < seconds < 0.01 else f"{seconds:.3f} s"


def printable(text: str) -> str:
    r"""`text` with characters that a terminal would obey, such as escape codes in a name, written as escapes:
    ``\x1b[31m``.
    """
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class Unit(NamedTuple):
    """The unit of sizes in one table or axis."""

    size: int
    """bytes"""
    name: str

    def places(self, decimals: int) -> int:
        """The number of decimals for figures in this unit: `decimals`, but none for bytes."""
        return decimals if self.size > 1 else 0

    def amount(self, size: int, decimals: int = 1, sign: str = "") -> str:
        """Format `size` bytes in this unit, without its name; `sign` is that of a format specification."""
        return f"{size / self.size:{sign}.{self.places(decimals)}f}"


def unit_of(size: int) -> Unit:
    """The unit for figures up to `size` bytes: MiB from 1 MiB on, KiB from 1 KiB on, else bytes."""
    if abs(size) < KIB:
        return Unit(1, "B")
    return Unit(MIB, "MiB") if abs(size) >= MIB else Unit(KIB, "KiB")


def format_size(size: int, *, round_up: bool = False) -> str:
    """`size` bytes in MiB with one decimal, ``350.0 MiB``; below one MiB in KiB, ``12.5 KiB``, below one KiB in bytes,
    ``12 B``.

    With `round_up` the printed figure is never below `size`, so that a smallest budget can be typed back as it is
    printed.
    """
    unit, name = unit_of(size)
    if unit == 1:
        return f"{size} B"
    rounding = ROUND_CEILING if round_up else ROUND_HALF_EVEN
    return f"{(Decimal(size) / unit).quantize(Decimal('0.1'), rounding=rounding)} {name}"


def padding_text(share: float) -> str:
    """How much of the rows of a batch is padding, in words; a share that is negative by rounding is none."""
    return f"rows {max(share, 0.0):.0%} padding"
