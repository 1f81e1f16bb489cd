"""What a lean process runs once before anything is measured or trained."""

from __future__ import annotations

import pytest
import torch

from tightfit.profiles.devices.estimate import PRODUCTS
from tightfit.runtime.engine.cpu import products
from tightfit.runtime.engine.cpu.operators import OPERATORS
from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.start.kernel_warmup import warm_up
from tightfit.runtime.engine.training.job import PASSING

GATHERING = {"tightfit.embed_rows", "tightfit.head_rows"}
"""they read rows and copy them"""
MODULES = {
    "batch_norm", "cached_attention", "cross_entropy", "dora", "dropout", "experts", "lstm", "preference", "rotary", "router_loss", "tables",
    "tile_attention",
}  # fmt: skip
CHOSEN = {name for name, call in OPERATORS.items() if call.__module__.rpartition(".")[2] in MODULES} | {
    "tightfit.head_weighted"
}
"""of settings of LoRA that few choose, of pairs of answers, of tiles of a text, of mixtures, and of modules: a run that
has them warms them itself, with its own shapes; and of answers, which no training process computes
"""


@pytest.mark.parametrize("narrow", [True, False])
def test_every_fused_operator_is_warmed_but_products_only_where_they_leave_nothing_behind(monkeypatch, narrow):
    """oneDNN, which multiplies bfloat16 where the processor does, keeps 0.6 MB for each product of shapes that no model
    has.
    """
    ran = []

    def recording(name, call):
        def recorded(*args, out):
            ran.append((name, args))
            call(*args, out=out)

        return recorded

    for name, call in OPERATORS.items():
        monkeypatch.setitem(OPERATORS, name, recording(name, call))
    monkeypatch.setattr(products, "NARROW", narrow)
    channel = TransferChannel()
    warm_up(channel, 64, (torch.bfloat16,))
    channel.close()
    left_out = {name for name in OPERATORS if name.startswith(PRODUCTS)} if narrow else set()
    assert {name for name, _ in ran} == OPERATORS.keys() - GATHERING - CHOSEN - {"tightfit.copy", *PASSING} - left_out
    biases = [args[2] for name, args in ran if name == "tightfit.projection"]
    assert {bias is None for bias in biases} == (set() if narrow else {True, False})
