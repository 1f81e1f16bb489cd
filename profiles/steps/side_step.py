"""The step of a side network beside a decoder, which a server trains where a device runs the model (the policy
`mobillm`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.models.side_network import SideNetwork
from tightfit.profiles.models.side_shape import CONFIG_KEY, INPUT, SideShape, chosen_blocks
from tightfit.profiles.options import BATCH, SEQ, ProfileOptions
from tightfit.profiles.steps.decoder_step import check_length
from tightfit.profiles.steps.step import LORA, ProfiledStep
from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS, INFERENCE
from tightfit.profiles.tracing.trace import trace
from tightfit.profiles.tracing.traced import Trace
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress


class SideStep(ProfiledStep):
    """It has adapters of its own, which read the outputs of some of the decoder's blocks."""

    kind = "decoder"
    phrase = "a side network"
    refused = {
        ("modules_to_save", *LORA): " has no adapter; leave the option out",
        ("tile",): " takes whole batches; leave the option out",
        ("matrix_rows",): " has no frozen matrices; leave the option out",
        ("loss", "beta"): " predicts tokens and nothing else; leave the option out",
    }

    def __init__(self, source: Source, options: ProfileOptions) -> None:
        super().__init__(source, options)
        self.batch = BATCH if options.batch is None else options.batch
        self.seq = SEQ if options.seq is None else options.seq
        rank, blocks = options.side_rank, options.side_blocks
        assert rank is not None
        shape = decoder_shape(source.config)
        if rank > shape.hidden:
            raise InputError(f"{spelled('side_rank')} {rank}: give a width from 1 to {shape.hidden}, the model's own")
        chosen = chosen_blocks(shape.layers) if blocks is None else chosen_blocks(shape.layers, blocks)
        self.shape = SideShape(blocks=chosen, rank=rank)

    def settings(self, report: Progress) -> list[Any]:
        return [self.shape.as_json(), self.batch, self.seq, self.dtype]

    def trace(self, report: Progress) -> Trace:
        shape, dtype = decoder_shape(self.source.config), getattr(torch, self.dtype)
        with FakeTensorMode():
            module = SideNetwork(shape, self.shape, dtype=dtype)
            sample = {"labels": torch.zeros(self.batch, self.seq, dtype=torch.int64)}
            for number in range(len(self.shape.blocks)):
                sample[f"{INPUT}.{number}"] = torch.zeros(self.batch * self.seq, shape.hidden, dtype=dtype)
        traced = trace(module, sample, decompositions=DECOMPOSITIONS, inference=INFERENCE, progress=report)
        check_length(self.source, self.seq)
        return traced

    def model_fields(self) -> dict[str, Any]:
        return {"config": self.source.config | {CONFIG_KEY: self.shape.as_json()}}
