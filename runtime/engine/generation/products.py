"""Matrix products of a few rows with the weights, a block of a matrix at a time, wherever its bytes are.

A block is unpacked into a buffer that stays in cache and multiplied there; a matrix that stays unpacked is multiplied in
the same blocks. Rows of x are multiplied in the same groups however many there are. So a product has the same bits
whatever stays in memory and however many tokens a pass takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import blocks
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.generation.job import PACKED, STREAMED, UNPACKED, GenerationJob, Piece
from tightfit.runtime.engine.generation.names import (
    HEAD,
    LORA_A,
    LORA_B,
    PRODUCT,
    ROOM,
    STALL,
    multiply_key,
    unpack_key,
)
from tightfit.runtime.engine.generation.sizes import block_rows
from tightfit.runtime.engine.generation.stream import Stream
from tightfit.runtime.engine.weights.layout import Extent
from tightfit.runtime.engine.weights.store import Store, unpack


class Products:
    """The matrices of a job. While `spent` is a dict, it gets the elements of matrices that each sort of work has gone
    through, and the seconds that this took; the keys are those of `unpack_key` and `multiply_key`, and `STALL`.
    """

    def __init__(self, job: GenerationJob, device: Device, store: Store, stream: Stream) -> None:
        self.device, self.store, self.stream = device, store, stream
        self.elements = job.block_elements
        self.pieces: dict[str, list[tuple[Piece, Extent]]] = {}
        for piece in job.pieces:
            self.pieces.setdefault(piece.matrix, []).append((piece, store.extent(piece.name)))
        self.room = device.tensor(*job.places[ROOM])
        self.product = device.tensor(*job.places[PRODUCT])
        self.pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
        self.ratios: dict[str, Tensor] = {}
        """of DoRA: the trained length of each row by that of W + scale * B A"""
        for matrix, scale in job.scales.items():
            a, b = (device.tensor(*job.places[matrix.removesuffix(".weight") + end]) for end in (LORA_A, LORA_B))
            self.pairs[matrix] = a, b, scale
        self.spent: dict[str, list[float]] | None = None

    def rows_of_block(self, columns: int) -> int:
        return block_rows(columns, self.elements)

    def load(self) -> None:
        """Read what stays in memory, and unpack what stays unpacked."""
        for matrix in self.pieces.values():
            for piece, extent in matrix:
                if piece.state == PACKED:
                    self.store.read_into(piece.name, self.device.host(piece.at, (extent.bytes,), "uint8"))
                elif piece.state == UNPACKED:
                    self._load_unpacked(piece, extent)

    def _load_unpacked(self, piece: Piece, extent: Extent) -> None:
        """Unpack some rows at a time: the packed bytes of all would be needed beside the unpacked ones."""
        entry = extent.entry
        held = self.device.tensor(piece.at, (piece.stop - piece.start, entry.columns), "float32")
        for rows in blocks(held.shape[0], self.rows_of_block(entry.columns)):
            name = f"{piece.matrix}[{piece.start + rows.start}:{piece.start + rows.stop}]"
            self.store.load(name, held[rows])

    def find_lengths(self, magnitudes: dict[str, Tensor]) -> None:
        """Make DoRA's factors of rows out of the trained lengths, in place: by those of W + scale * B A."""
        self.stream.begin(with_head=False)
        for matrix in self.pieces:
            if matrix in HEAD:
                continue
            a, b, scale = self.pairs.get(matrix, (None, None, 0.0))
            for start, weight in self._blocks(matrix):
                if matrix not in magnitudes or a is None or b is None:
                    continue
                rows = slice(start, start + weight.shape[0])
                changed = torch.addmm(weight, b[rows], a, alpha=scale)
                magnitudes[matrix][rows].div_(torch.sqrt(torch.square(changed).sum(1)))
        self.ratios = magnitudes

    def multiply(self, matrix: str, x: Tensor, groups: Sequence[slice], bias: Tensor | None, *, out: Tensor) -> None:
        """out [t, O] = x [t, I] @ W.T with the adapter's part and the bias; rows are multiplied in `groups`."""
        for start, weight in self._blocks(matrix):
            self._times(weight, x, groups, out, start)
        if matrix in self.pairs:
            a, b, scale = self.pairs[matrix]
            for rows in groups:
                out[rows].addmm_(torch.mm(x[rows], a.t()), b.t(), alpha=scale)
        if matrix in self.ratios:
            out.mul_(self.ratios[matrix])
        if bias is not None:
            out.add_(bias)

    def _times(self, weight: Tensor, x: Tensor, groups: Sequence[slice], out: Tensor, start: int) -> None:
        """Multiply a block, which begins with row `start` of its matrix."""
        begun = time.perf_counter()
        count = weight.shape[0]
        for rows in groups:
            size = rows.stop - rows.start
            if size == 1:  # the columns of one row are contiguous
                torch.mm(x[rows], weight.t(), out=out[rows, start : start + count])
                continue
            made = self.product[: size * count].view(size, count)
            torch.mm(x[rows], weight.t(), out=made)
            out[rows, start : start + count].copy_(made)
        if self.spent is not None:
            self._note(multiply_key(x.shape[0], weight.shape[1]), weight.numel(), begun)

    def _blocks(self, matrix: str) -> Iterable[tuple[int, Tensor]]:
        """(first row, float32 [rows, columns]) of each block of a matrix, which is valid until the next one is asked for."""
        for piece, extent in self.pieces[matrix]:
            entry = extent.entry
            step = self.rows_of_block(entry.columns)
            if piece.state == UNPACKED:
                whole = self.device.tensor(piece.at, (piece.stop - piece.start, entry.columns), "float32")
                for rows in blocks(piece.stop - piece.start, step):
                    yield piece.start + rows.start, whole[rows]
                continue
            begun = time.perf_counter()
            staged = self.stream.take() if piece.state == STREAMED else self.device.raw(piece.at, extent.bytes)
            self._note(STALL, 0, begun)
            packed = staged.narrow(0, extent.skip, extent.row_bytes)
            for rows in blocks(piece.stop - piece.start, step):
                begun = time.perf_counter()
                count = rows.stop - rows.start
                weight = self.room[: count * entry.columns].view(count, entry.columns)
                unpack(entry, packed.narrow(0, rows.start * entry.row_bytes, count * entry.row_bytes), weight)
                self._note(unpack_key(entry.format, entry.group, entry.columns), weight.numel(), begun)
                yield piece.start + rows.start, weight
            if piece.state == STREAMED:
                self.stream.release()

    def _note(self, what: str, elements: int, begun: float) -> None:
        if self.spent is not None:
            found = self.spent.setdefault(what, [0, 0.0])
            found[0] += elements
            found[1] += time.perf_counter() - begun
