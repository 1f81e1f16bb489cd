"""Matrix products of a few rows with the weights, a block of a matrix at a time, wherever its bytes are.

A block is unpacked into a buffer that stays in cache and multiplied there; a matrix that stays unpacked is multiplied
in the same blocks. Rows of x are multiplied in the same groups however many there are. So a product has the same bits
whatever stays in memory and however many tokens a pass takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import blocks
from tightfit.runtime.engine.device.device import Device, put_now
from tightfit.runtime.engine.generation.job import PACKED, STREAMED, UNPACKED, GenerationJob, Piece
from tightfit.runtime.engine.generation.names import (
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
from tightfit.runtime.engine.generation.stream import StreamedPieces
from tightfit.runtime.engine.weights.layout import Extent
from tightfit.runtime.engine.weights.store import WeightStore, multiplies, multiply_row, unpack


class PreparedPiece:
    """A piece, with what multiplying needs of it at hand: a token asks for hundreds of them."""

    __slots__ = ("columns", "entry", "extent", "fused", "packed", "piece", "rows")

    def __init__(self, piece: Piece, extent: Extent, device: Device) -> None:
        self.piece, self.extent, self.entry = piece, extent, extent.entry
        self.rows = slice(piece.start, piece.stop)
        self.fused = piece.state != UNPACKED and multiplies(extent.entry)
        """whether one row of activations is multiplied with the packed rows"""
        self.packed: Tensor | None = None
        """the packed rows, where they stay in memory"""
        if piece.state == PACKED:
            self.packed = self.of(device.raw(piece.at, extent.bytes))

    def of(self, staged: Tensor) -> Tensor:
        """The packed rows in the bytes that were read."""
        return staged.narrow(0, self.extent.skip, self.extent.row_bytes)


class Products:
    """The matrices of a job. While `spent` is a dict, it gets the elements of matrices that each sort of work has gone
    through, and the seconds that this took; the keys are those of `unpack_key` and `multiply_key`, and `STALL`.
    """

    def __init__(self, job: GenerationJob, device: Device, store: WeightStore, stream: StreamedPieces) -> None:
        self.device, self.store, self.stream = device, store, stream
        self.elements, self.head = job.block_elements, job.head
        self.parts: dict[str, list[PreparedPiece]] = {}
        """of every matrix"""
        for piece in job.pieces:
            self.parts.setdefault(piece.matrix, []).append(PreparedPiece(piece, store.extent(piece.name), device))
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
        for part in (part for parts in self.parts.values() for part in parts):
            if part.piece.state == PACKED:
                host = self.device.host(part.piece.at, (part.extent.bytes,), "uint8")
                self.store.read_into(part.piece.name, host)
                put_now(self.device, part.piece.at, host)
            elif part.piece.state == UNPACKED:
                self._load_unpacked(part)

    def _load_unpacked(self, part: PreparedPiece) -> None:
        """Unpack some rows at a time: the packed bytes of all would be needed beside the unpacked ones."""
        held, first = self._unpacked(part), part.piece.start
        for rows in blocks(held.shape[0], self.rows_of_block(part.entry.columns)):
            self.store.load(f"{part.piece.matrix}[{first + rows.start}:{first + rows.stop}]", held[rows])

    def find_lengths(self, magnitudes: dict[str, Tensor]) -> None:
        """Make DoRA's factors of rows out of the trained lengths, in place: by those of W + scale * B A."""
        self.stream.begin(with_head=False)
        for matrix, parts in self.parts.items():
            if matrix == self.head:
                continue
            for part in parts:
                packed = self._packed(part)
                if matrix in magnitudes:
                    a, b, scale = self.pairs[matrix]
                    for start, weight in self._blocks(part, packed):
                        rows = slice(start, start + weight.shape[0])
                        changed = torch.addmm(weight, b[rows], a, alpha=scale)
                        magnitudes[matrix][rows].div_(torch.sqrt(torch.square(changed).sum(1)))
                self._done(part)
        self.ratios = magnitudes

    def row(self, matrix: str, number: int, out: Tensor) -> bool:
        """Unpack a row of a matrix into `out`, if it is in memory and packed; whether it is."""
        for part in self.parts.get(matrix, ()):
            if part.packed is not None and part.rows.start <= number < part.rows.stop:
                size = part.entry.row_bytes
                unpack(part.entry, part.packed.narrow(0, (number - part.rows.start) * size, size), out)
                return True
        return False

    def multiply(self, matrix: str, x: Tensor, groups: Sequence[slice], bias: Tensor | None, out: Tensor) -> None:
        """out [t, O] = x [t, I] @ W.T with the adapter's part and the bias; rows are multiplied in `groups`.

        A row by itself is multiplied with the packed rows where there is compiled code for their format. Plans keep no
        such matrix unpacked, since the sums would be made in another order.
        """
        alone = [rows for rows in groups if rows.stop - rows.start == 1]
        several = [rows for rows in groups if rows.stop - rows.start > 1] if alone else groups
        for part in self.parts[matrix]:
            packed = self._packed(part)
            rest = groups
            if part.fused and packed is not None:
                rest = several
                for rows in alone:
                    self._dot(part, packed, x[rows], out[rows, part.rows])
            if rest:
                for start, weight in self._blocks(part, packed):
                    self._times(weight, x, rest, out, start)
            self._done(part)
        if matrix in self.pairs:
            a, b, scale = self.pairs[matrix]
            for rows in groups:
                out[rows].addmm_(torch.mm(x[rows], a.t()), b.t(), alpha=scale)
        if matrix in self.ratios:
            out.mul_(self.ratios[matrix])
        if bias is not None:
            out.add_(bias)

    def _dot(self, part: PreparedPiece, packed: Tensor, x: Tensor, out: Tensor) -> None:
        """Multiply one row of activations with the packed rows of a part."""
        begun = time.perf_counter()
        multiply_row(part.entry, packed, x, out)
        if self.spent is not None:
            entry = part.entry
            self._note(dot_key(entry.format, entry.group, entry.columns), out.numel() * entry.columns, begun)

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

    def _packed(self, part: PreparedPiece) -> Tensor | None:
        """The packed rows of a part, once they are there; None: it stays unpacked."""
        if part.piece.state != STREAMED:
            return part.packed
        begun = time.perf_counter()
        staged = self.stream.take()
        self._note(STALL, 0, begun)
        return part.of(staged)

    def _done(self, part: PreparedPiece) -> None:
        if part.piece.state == STREAMED:
            self.stream.release()

    def _blocks(self, part: PreparedPiece, packed: Tensor | None) -> Iterable[tuple[int, Tensor]]:
        """(row of the matrix, float32 [rows, columns]) of each block of a part, which is valid until the next one is
        asked for.
        """
        entry, first = part.entry, part.rows.start
        for rows in blocks(part.rows.stop - first, self.rows_of_block(entry.columns)):
            if packed is None:
                yield first + rows.start, self._unpacked(part)[rows]
                continue
            begun = time.perf_counter()
            size = rows.stop - rows.start
            weight = self.room[: size * entry.columns].view(size, entry.columns)
            unpack(entry, packed.narrow(0, rows.start * entry.row_bytes, size * entry.row_bytes), weight)
            self._note(unpack_key(entry.format, entry.group, entry.columns), weight.numel(), begun)
            yield first + rows.start, weight

    def _unpacked(self, part: PreparedPiece) -> Tensor:
        return self.device.tensor(part.piece.at, (part.rows.stop - part.rows.start, part.entry.columns), "float32")

    def _note(self, what: str, elements: int, begun: float) -> None:
        if self.spent is not None:
            found = self.spent.setdefault(what, [0, 0.0])
            found[0] += elements
            found[1] += time.perf_counter() - begun
