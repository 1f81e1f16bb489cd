"""What is measured before answers are planned: pieces that stand in for others, from which nothing is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from answering import greedy, opened, packed, plan_of, problem_of
from reference import CONFIGS, checkpoint

from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.generation.job import STREAMED
from tightfit.runtime.engine.generation.measuring import StandIns, _stand_ins

PROMPT, COUNT = [5, 6, 7, 8, 9], 4


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_pieces_that_stand_in_for_themselves_give_the_same_answer_and_nothing_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(CONFIGS[name], tmp_path)
    store = packed(tmp_path)
    problem = problem_of(CONFIGS[name], store, len(PROMPT), COUNT)
    channel = TransferChannel()
    with opened(problem, plan_of(problem, [STREAMED], 4), store, channel=channel) as decoder:
        due = greedy(decoder, PROMPT, COUNT)
        decoder.return_to(0)
        channel.drain()  # what is read ahead of the next pass
        room = torch.empty(1 << 20, dtype=torch.uint8)
        read_ahead = decoder.stream
        decoder.take_from(StandIns(decoder, room))
        reads: list[str] = []
        monkeypatch.setattr(type(decoder.store), "read_into", lambda _, piece, host: reads.append(piece))
        found = greedy(decoder, PROMPT, COUNT)
        assert found[0] == due[0]
        assert torch.equal(found[1], due[1])
        monkeypatch.undo()
        assert reads == []
        # Afterwards pieces are read again, in their order.
        decoder.take_from(read_ahead)
        decoder.return_to(0)
        assert torch.equal(greedy(decoder, PROMPT, COUNT)[1], due[1])


def test_where_little_fits_each_shape_is_there_once(tmp_path: Path) -> None:
    checkpoint(CONFIGS["llama"], tmp_path)
    store = packed(tmp_path)
    problem = problem_of(CONFIGS["llama"], store, len(PROMPT), COUNT)
    with opened(problem, plan_of(problem, [STREAMED], 4), store) as decoder:
        made = _stand_ins(decoder, torch.empty(0, dtype=torch.uint8))
        extents = {piece.name: decoder.store.extent(piece.name) for piece in decoder.job.pieces}
        assert made.keys() == extents.keys()
        for name, stand_in in made.items():
            alike = [
                other
                for other, extent in extents.items()
                if (extent.bytes, extent.row_bytes) == (extents[name].bytes, extents[name].row_bytes)
                and extent.entry.shape[1] == extents[name].entry.shape[1]
            ]
            read = torch.empty(extents[name].bytes, dtype=torch.uint8)
            decoder.store.read_into(alike[0], read)
            assert torch.equal(stand_in, read), name
        assert len({stand_in.data_ptr() for stand_in in made.values()}) < len(made)
