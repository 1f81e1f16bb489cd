"""The processor's name and instruction sets as the kernel reports them, and whether it multiplies bfloat16.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import functools
import platform


@functools.cache
def features() -> frozenset[str]:
    """Instruction sets by the kernel's names (avx2, avx512_bf16, asimd, ...); empty where it names none."""
    return frozenset(_field("flags") or _field("Features"))


def cpu_name() -> str:
    """The processor as the kernel names it."""
    return " ".join(_field("model name")) or platform.processor() or platform.machine()


def _field(key: str) -> list[str]:
    """The words after `key` in /proc/cpuinfo, for the first processor listed there."""
    try:
        with open("/proc/cpuinfo", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.split()
    except OSError:
        pass
    return []


NARROW = not {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}.isdisjoint(features())
"""whether this processor has instructions that multiply bfloat16 (two names are x86's, two ARM's)"""
BFLOAT16_PRODUCTS = "bfloat16" if NARROW else "float32"
"""the type in which bfloat16 tensors are multiplied here (`tightfit.runtime.engine.cpu.products`); results depend on
it"""
UNUSED_BY_MKL = "avx512f" in features() and "GenuineIntel" not in _field("vendor_id") and "amx_bf16" not in features()
"""whether MKL, which multiplies float32 tensors for PyTorch, leaves this processor's AVX-512 unused, as it does on
other makers' processors than Intel's
"""
