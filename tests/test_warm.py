"""What a lean process runs once before anything is measured or trained."""

from __future__ import annotations

import torch

from profiles.operators import OPERATORS
from runtime.channels import Channel
from runtime.warm import warm

GATHERING = {"tightfit.embed_rows", "tightfit.head_rows"}
"""they read rows and copy them"""


def test_every_fused_operator_is_warmed_and_projections_with_and_without_a_bias(monkeypatch):
    ran = []

    def recording(name, call):
        def recorded(*args, out):
            ran.append((name, args))
            call(*args, out=out)

        return recorded

    for name, call in OPERATORS.items():
        monkeypatch.setitem(OPERATORS, name, recording(name, call))
    channel = Channel()
    warm(channel, 64, (torch.bfloat16,))
    channel.close()
    assert {name for name, _ in ran} == OPERATORS.keys() - GATHERING - {"tightfit.copy"}
    biases = [args[2] for name, args in ran if name == "tightfit.projection"]
    assert {bias is None for bias in biases} == {True, False}
