"""The file of an adapter as a device handles it, with the standard library alone: read, and cut to a smaller rank.

Values are not looked at; the server does that, and the run that starts from the adapter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import from_json

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""ends of the keys of a pair of factors: [rank, columns] and [rows, rank]"""


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """The tensors of a safetensors file: where each lies in `content`."""

    content: bytes
    start: int
    """where the tensors' bytes begin"""
    entries: dict[str, dict[str, Any]]
    """by key: dtype, shape, data_offsets"""

    @classmethod
    def read(cls, content: bytes, place: str) -> AdapterFile:
        """Raises InputError, naming `place`, for what is no such file."""
        start = 8 + int.from_bytes(content[:8], "little")
        try:
            header = from_json(content[8:start])
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = [entry["data_offsets"][1] for entry in entries.values()]
            whole = start + max(ends, default=0) == len(content)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise InputError(f"{place}: no adapter, or a damaged one ({error})") from error
        if not whole:
            raise InputError(f"{place}: an adapter that is cut off, {len(content)} bytes of it have arrived")
        return cls(content=content, start=start, entries=entries)

    def data(self, name: str) -> memoryview:
        begin, end = self.entries[name]["data_offsets"]
        return memoryview(self.content)[self.start + begin : self.start + end]

    def _rank(self, name: str) -> int:
        rows, columns = self.entries[name]["shape"]
        return int(rows if name.endswith(LORA_A) else columns)

    def cut(self, rank: int) -> bytes:
        """The file with the first `rank` components of every pair of factors; itself where it has no more."""
        if all(min(rank, size) == size for size in map(self._rank, self.entries)):
            return self.content
        parts: list[bytes] = []
        entries: dict[str, Any] = {}
        at = 0
        for name, entry in self.entries.items():
            (rows, columns), data = entry["shape"], self.data(name)
            if name.endswith(LORA_A):
                rows = min(rows, rank)
                part = bytes(data[: 4 * rows * columns])
            else:
                kept = min(columns, rank)
                width = 4 * columns
                part = b"".join(data[row * width : row * width + 4 * kept] for row in range(rows))
                columns = kept
            parts.append(part)
            entries[name] = {"dtype": entry["dtype"], "shape": [rows, columns], "data_offsets": [at, at + len(part)]}
            at += len(part)
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + b"".join(parts)
