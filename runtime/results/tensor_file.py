"""A safetensors file whose rows are read into memory of our own: of a file that is mapped, every page that was touched
would count as this process's.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tightfit.profiles.weights.precision import PUBLISHED
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.safetensors_file import SafetensorsReader

PIECE = 4 << 20
"""bytes of a file, or of a tensor in float32, that are in memory at a time"""
_MADV_DONTNEED = 4


class TensorFile:
    """An open file. Raises InputError, which ends with `advice`, where it is damaged."""

    def __init__(self, path: Path, advice: str = "download it again") -> None:
        self.path = path
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        """name -> (type under the format's own name, shape)"""
        self._reader = SafetensorsReader(str(path), advice)
        weakref.finalize(self, self._reader.close)
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  no dict
                    part = opened.get_slice(name)
                    self.tensors[name] = part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error}); {advice}") from error

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, a few MiB at a time."""
        return self._reader.chunks(name, PIECE)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor of at least two dimensions, or elements of one with less, in the type of the file."""
        kind, shape = self.tensors[name]
        dtype: torch.dtype = getattr(torch, PUBLISHED[kind])
        size = dtype.itemsize
        for length in shape[1:]:
            size *= length
        content = bytearray().join(self._reader.chunks(name, PIECE, begin=start * size, count=(stop - start) * size))
        return torch.frombuffer(content, dtype=dtype).view(stop - start, *shape[1:])


def forget_mapped(paths: Iterable[str]) -> None:
    """Give back the pages of these files that are mapped into this process; they are read again when they are next
    touched.
    """
    files = {os.path.realpath(path).encode() for path in paths}
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            parts = line.split(None, 5)
            if len(parts) == 6 and parts[5].rstrip(b"\n") in files:
                start, end = (int(edge, 16) for edge in parts[0].split(b"-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def contents(values: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return values.contiguous().view(-1).view(torch.uint8).numpy().data
