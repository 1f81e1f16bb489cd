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
    dot_key,
    multiply_key,
    unpack_key,
)
from tightfit.runtime.engine.generation.sizes import block_rows
from tightfit.runtime.engine.generation.stream import Stream
from tightfit.runtime.engine.weights.layout import Extent
from tightfit.runtime.engine.weights.store import Store, multiplies, multiply_row, unpack


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
        held = self._unpacked(piece, extent)
        for rows in blocks(held.shape[0], self.rows_of_block(entry.columns)):
            name = f"{piece.matrix}[{piece.start + rows.start}:{piece.start + rows.stop}]"
            self.store.load(name, held[rows])

    def find_lengths(self, magnitudes: dict[str, Tensor]) -> None:
        """Make DoRA's factors of rows out of the trained lengths, in place: by those of W + scale * B A."""
        self.stream.begin(with_head=False)
        for matrix in self.pieces:
            if matrix in HEAD:
                continue
            for piece, extent in self.pieces[matrix]:
                packed = self._packed(piece, extent)
                if matrix in magnitudes:
                    a, b, scale = self.pairs[matrix]
                    for start, weight in self._blocks(piece, extent, packed):
                        rows = slice(start, start + weight.shape[0])
                        changed = torch.addmm(weight, b[rows], a, alpha=scale)
                        magnitudes[matrix][rows].div_(torch.sqrt(torch.square(changed).sum(1)))
                self._done(piece)
        self.ratios = magnitudes

    def multiply(self, matrix: str, x: Tensor, groups: Sequence[slice], bias: Tensor | None, *, out: Tensor) -> None:
        """out [t, O] = x [t, I] @ W.T with the adapter's part and the bias; rows are multiplied in `groups`.

        A row by itself is multiplied with the packed rows where there is compiled code for their format. Plans keep no such
        matrix unpacked, since the sums would be made in another order.
        """
        alone = [rows for rows in groups if rows.stop - rows.start == 1]
        for piece, extent in self.pieces[matrix]:
            packed = self._packed(piece, extent)
            fused = packed is not None and multiplies(extent.entry)
            if fused and alone:
                begun = time.perf_counter()
                for rows in alone:
                    multiply_row(extent.entry, packed, x[rows], out[rows, piece.start : piece.stop])  # type: ignore[arg-type]
                entry = extent.entry
                count = piece.stop - piece.start
                self._note(dot_key(entry.format, entry.group, entry.columns), count * entry.columns, begun)
            rest = [rows for rows in groups if rows not in alone] if fused else groups
            if rest:
                for start, weight in self._blocks(piece, extent, packed):
                    self._times(weight, x, rest, out, start)
            self._done(piece)
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

    def _packed(self, piece: Piece, extent: Extent) -> Tensor | None:
        """The packed rows of a piece, once they are there; None: it stays unpacked."""
        if piece.state == UNPACKED:
            return None
        begun = time.perf_counter()
        staged = self.stream.take() if piece.state == STREAMED else self.device.raw(piece.at, extent.bytes)
        self._note(STALL, 0, begun)
        return staged.narrow(0, extent.skip, extent.row_bytes)

    def _done(self, piece: Piece) -> None:
        if piece.state == STREAMED:
            self.stream.release()

    def _blocks(self, piece: Piece, extent: Extent, packed: Tensor | None) -> Iterable[tuple[int, Tensor]]:
        """(row of the matrix, float32 [rows, columns]) of each block of a piece, which is valid until the next one is asked for."""
        entry, count = extent.entry, piece.stop - piece.start
        for rows in blocks(count, self.rows_of_block(entry.columns)):
            if packed is None:
                yield piece.start + rows.start, self._unpacked(piece, extent)[rows]
                continue
            begun = time.perf_counter()
            size = rows.stop - rows.start
            weight = self.room[: size * entry.columns].view(size, entry.columns)
            unpack(entry, packed.narrow(0, rows.start * entry.row_bytes, size * entry.row_bytes), weight)
            self._note(unpack_key(entry.format, entry.group, entry.columns), weight.numel(), begun)
            yield piece.start + rows.start, weight

    def _unpacked(self, piece: Piece, extent: Extent) -> Tensor:
        return self.device.tensor(piece.at, (piece.stop - piece.start, extent.entry.columns), "float32")

    def _note(self, what: str, elements: int, begun: float) -> None:
        if self.spent is not None:
            found = self.spent.setdefault(what, [0, 0.0])
            found[0] += elements
            found[1] += time.perf_counter() - begun
