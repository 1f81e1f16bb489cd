"""Traces the step of a decoder with its adapter, whoever wrote its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from tightfit.profiles.models.decoder import Decoder
from tightfit.profiles.models.decoder_config import decoder_shape, handwritten
from tightfit.profiles.models.decoder_module import DecoderModule, without_values
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.schema import ANSWER_PLANES, ANSWERS, POSITIONS, Preference
from tightfit.profiles.tracing.repeated_layers import traced_by_kinds
from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS, INFERENCE
from tightfit.profiles.tracing.trace import trace
from tightfit.profiles.tracing.traced import Trace
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.engine.training.adapter import BODY

DECODER_INPUTS = ("input_ids", "labels", POSITIONS)
"""the tensors of a decoder's batch, int64 [batch, seq], in the order of every plan"""


def trace_decoder(
    source: Source,
    batch: int,
    seq: int,
    lora: LoraConfig,
    dtype: str,
    report: Progress,
    preference: Preference | None = None,
    tile: int | None = None,
    matrix_rows: int | None = None,
) -> tuple[Trace, DecoderModule]:
    """The step of a decoder, and the decoder, which says what is trained. `tile`: tokens that go through a layer at a
    time; `matrix_rows`: rows of a frozen matrix that are read, unpacked and multiplied at a time.
    """
    module = opened_decoder(source.config, seq, lora, dtype, preference, tile, matrix_rows)
    with FakeTensorMode():
        without_values(module)
        module.learn_rows(_sample(batch, seq, rows_apart=None, preference=preference))
        sample = _sample(batch, seq, module.rows_apart, preference)
    traced = traced_by_kinds(
        module,
        lambda: trace(
            module,
            sample,
            decompositions=DECOMPOSITIONS,
            inference=INFERENCE,
            progress=report,
            tiles=1 if tile is None else batch * seq // tile,
        ),
    )
    for tensor in traced.tensors:
        if tensor.kind in ("weight", "constant") and tensor.name.split("[")[0] not in source.entries:
            raise InputError(
                f"{source.name}: its {source.config['model_type']} decoder reads a constant of shape {tensor.shape}"
                f" ({tensor.name}) that no checkpoint holds; it is not supported"
            )
    return _in_order(traced, sample), module


def opened_decoder(
    config: dict[str, Any],
    seq: int,
    lora: LoraConfig,
    dtype: str,
    preference: Preference | None = None,
    tile: int | None = None,
    matrix_rows: int | None = None,
) -> DecoderModule:
    """The decoder of a config, written by hand or as transformers has it; its parameters have no values."""
    if handwritten(config):
        shape = decoder_shape(config)
        _check_rank(lora, shape.hidden)
        with torch.device("meta"):
            return Decoder(
                shape,
                dtype=getattr(torch, dtype),
                lora=lora,
                body=config.get("adapter_body", BODY),
                preference=preference,
                tile=tile,
                matrix_rows=matrix_rows,
            )
    from tightfit.profiles.models.transformers_decoder import AnyDecoder

    if tile is not None:
        raise InputError(
            f"{spelled('tile')}: {config['model_type']} runs as transformers has it, whose layers take all tokens at"
            " once; leave it out"
        )
    _check_rank(lora, config["hidden_size"])
    return AnyDecoder(
        config, dtype=getattr(torch, dtype), seq=seq, lora=lora, preference=preference, matrix_rows=matrix_rows
    )


def _sample(
    batch: int, seq: int, rows_apart: str | None, preference: Preference | None = None
) -> dict[str, torch.Tensor]:
    """The batch that a decoder is traced on; without positions where samples cannot share rows."""
    if preference:
        answers = torch.zeros(ANSWER_PLANES[preference.loss], 2 * batch, seq, dtype=torch.float64)
        return _sample(2 * batch, seq, rows_apart) | {ANSWERS: answers}
    names = DECODER_INPUTS[:2] if rows_apart else DECODER_INPUTS
    return {name: torch.zeros(batch, seq, dtype=torch.int64) for name in names}


def _in_order(traced: Trace, sample: dict[str, torch.Tensor]) -> Trace:
    """The trace with the tensors of its batch in the order of `sample`, and not in that of their use."""
    batch = {tensor.name: tensor for tensor in traced.tensors if tensor.kind == "batch"}
    inputs = (batch[name] for name in sample if name in batch)
    return replace(traced, tensors=[next(inputs) if tensor.kind == "batch" else tensor for tensor in traced.tensors])


def _check_rank(lora: LoraConfig, hidden: int) -> None:
    for rank in (lora.rank, *lora.rank_pattern.values()):
        if rank > hidden:
            raise InputError(
                f"{spelled('lora_rank')} {rank}: the model is {hidden} wide, and a rank above that gains nothing"
            )
