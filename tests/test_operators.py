"""Rows gathered by the fused operators: what an id below 0 means, and where the time goes in a report."""

from __future__ import annotations

import pytest
import torch

from profiles.errors import InputError
from profiles.operators import embed_rows, head_rows
from runtime.report import profiled_step

TABLE = torch.arange(12.0).view(4, 3)
IDS = torch.tensor([[2, -100], [-1, 3]])


class Rows:
    """A weight store of one table."""

    def gather_rows(self, name, rows, out):
        assert name == "table"
        out.copy_(TABLE[rows])


@pytest.mark.parametrize("store", [None, Rows()])
def test_an_input_id_below_zero_is_an_error(store):
    out = torch.full((4, 3), -1.0)
    with pytest.raises(InputError, match="the input ids hold -100, and no token is below 0"):
        embed_rows(TABLE if store is None else "table", IDS, 1.0, out=(out,), store=store)
    assert torch.equal(out, torch.full((4, 3), -1.0))


@pytest.mark.parametrize("store", [None, Rows()])
def test_a_label_below_zero_asks_for_nothing(store):
    out = torch.empty(4, 3)
    head_rows(TABLE if store is None else "table", IDS, out=(out,), store=store)
    assert torch.equal(out, TABLE[[2, 0, 0, 3]])


def test_the_rows_of_the_labels_belong_to_the_loss_head():
    calls = {"tightfit.embed_rows": [1, 0.25], "tightfit.head_rows": [1, 0.5], "tightfit.head_finish": [1, 1.0]}
    told = profiled_step({"step": 3, "seconds": 2.0, "stall": 0.0, "calls": calls})
    assert told["parts"]["loss head"] == 1.5
    assert told["parts"]["embedding"] == 0.25
