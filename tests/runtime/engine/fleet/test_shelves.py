"""Pieces of trained tensors, and the shelves on which they lie."""

from __future__ import annotations

import pytest
import torch

from tightfit.runtime.engine.fleet.exchange import pieces_of
from tightfit.runtime.engine.fleet.pieces import Pieces
from tightfit.runtime.engine.fleet.shelf import Buffers, DiskShelf, MemoryShelf


def test_pieces_are_whole_tensors_in_order_below_the_limit():
    pieces = Pieces([100, 100, 60, 300, 10, 10], limit=4 * 250)
    assert list(pieces.sizes) == [200, 60, 300, 20]
    assert [list(pieces.tensors(piece)) for piece in range(4)] == [[0, 1], [2], [3], [4, 5]]
    assert [pieces.slot(tensor) for tensor in range(6)] == [
        (0, 0, 100), (0, 100, 200), (1, 0, 60), (2, 0, 300), (3, 0, 10), (3, 10, 20),
    ]  # fmt: skip
    assert (pieces.largest, pieces.total) == (300, 580)
    assert list(pieces_of([[10, 10], [100], [60], [3, 100], [10], [2, 5]], 4 * 250).sizes) == list(pieces.sizes)


def test_one_tensor_above_the_limit_is_a_piece_of_its_own():
    assert list(Pieces([5, 1000, 5], limit=40).sizes) == [5, 1000, 5]
    assert list(Pieces([], limit=40).sizes) == []


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_shelf_gives_back_what_it_holds(tmp_path, kind):
    pieces = Pieces([1000, 3000, 17, 5000], limit=4 * 4000)
    shelf = MemoryShelf(pieces, 3) if kind == "memory" else DiskShelf(pieces, 3, str(tmp_path))
    buffers = Buffers(pieces.largest, 2)
    room = buffers.take()
    shelf.zero()
    values = {}
    for row in range(3):
        for piece, size in enumerate(pieces.sizes):
            assert shelf.read(row, piece, room).eq(0).all()
            values[row, piece] = torch.randn(size)
            shelf.write(row, piece, values[row, piece])
    for (row, piece), wanted in values.items():
        assert torch.equal(shelf.read(row, piece, room), wanted)
    shelf.zero()
    assert shelf.read(1, 1, room).eq(0).all()
    shelf.close()


def test_buffers_lie_on_pages_and_are_limited():
    buffers = Buffers(1000, 2)
    first, second = buffers.take(), buffers.take()
    assert first.data_ptr() % 4096 == second.data_ptr() % 4096 == 0
    assert first.numel() == second.numel() == 1000
    assert buffers.take_at_once() is None
    buffers.give_back(first)
    assert buffers.take_at_once() is first
