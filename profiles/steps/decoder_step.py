"""The step of a decoder with its adapter, which predicts tokens or learns from pairs of answers."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import FakeTensorMode

from tightfit.profiles.models.decoder import PAIRS_APART, Decoder
from tightfit.profiles.models.decoder_config import decoder_shape, handwritten
from tightfit.profiles.models.lora import LoraConfig, given, layer_numbers
from tightfit.profiles.options import BATCH, SEQ, ProfileOptions, Progress
from tightfit.profiles.schema import ANSWER_INPUTS, POSITIONS, PREFERENCE, Preference, ShorterStep
from tightfit.profiles.steps.step import DTYPES, ProfiledStep
from tightfit.profiles.tracing.shorter_steps import bucket_lengths, shorter_step
from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS, INFERENCE
from tightfit.profiles.tracing.trace import Trace, trace
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.training.adapter import BODY

if TYPE_CHECKING:
    from tightfit.profiles.models.transformers_decoder import AnyDecoder

DECODER_INPUTS = ("input_ids", "labels", POSITIONS)
"""the tensors of a decoder's batch, int64 [batch, seq], in the order of every plan"""
BETA = 0.1
"""of DPO and ORPO unless another is asked for, as with TRL"""


class DecoderStep(ProfiledStep):
    """The gradients are those of the adapter that the options describe, or that lies in the folder `adapter`."""

    kind = "decoder"
    phrase = "{name} is a language model"

    def __init__(self, source: Source, options: ProfileOptions) -> None:
        super().__init__(source, options)
        self.batch: int = BATCH if options.batch is None else options.batch
        self.seq: int = SEQ if options.seq is None else options.seq
        self.lora = adapter_of(options)
        self.preference = _preference(options)
        if options.side_blocks is not None:
            raise InputError(
                f"{spelled('side_blocks')} {options.side_blocks} is of a side network; name its rank too, for example {spelled('side_rank', 64)}"
            )
        self.lengths = bucket_lengths(options.buckets, self.seq)
        self._decoder: Decoder | AnyDecoder | None = None

    def settings(self, report: Progress) -> list[Any]:
        return [asdict(self.lora), self.batch, self.seq, self.dtype, self.preference, self.lengths]

    def trace(self, report: Progress) -> Trace:
        traced, self._decoder = self.traced_at(self.seq, report)
        check_length(self.source, self.seq)
        return traced

    def shorter(self, traced: Trace, report: Progress) -> list[ShorterStep]:
        return [
            shorter_step(traced, self.traced_at(length, report, longest=self.seq)[0], length) for length in self.lengths
        ]

    def traced_at(self, seq: int, report: Progress, longest: int | None = None) -> tuple[Trace, Decoder | AnyDecoder]:
        return trace_decoder(
            self.source, self.batch, seq, self.lora, self.dtype, report, self.preference, longest=longest
        )

    def model_fields(self) -> dict[str, Any]:
        assert self._decoder
        preference = {PREFERENCE: self.preference.model_dump()} if self.preference else {}
        return {
            "config": self.source.config | preference,
            "lora": self._decoder.lora,
            "tables": self._decoder.tables,
            "rows_apart": self._decoder.rows_apart,
        }


def adapter_of(options: ProfileOptions) -> LoraConfig:
    """The settings of the adapter that is trained. Raises InputError for options that do not fit together."""
    layers = options.lora_layers
    return given(
        options.adapter,
        {
            "rank": options.lora_rank,
            "alpha": options.lora_alpha,
            "targets": options.lora_targets,
            "layers": None if layers is None else layer_numbers(layers),
            "rank_pattern": options.rank_pattern,
            "alpha_pattern": options.alpha_pattern,
            "dropout": options.lora_dropout,
            "rslora": options.rslora,
            "dora": options.dora,
            "modules_to_save": tuple(options.modules_to_save or ()),
        },
    )


def check_length(source: Source, seq: int) -> None:
    """Raise InputError for a sequence that is longer than the model was trained for."""
    longest = source.config.get("max_position_embeddings")
    if isinstance(longest, int) and seq > longest:
        raise InputError(
            f"{spelled('seq')} {seq} is longer than the {longest} positions that {source.name} was trained for; use {spelled('seq', longest)} or less"
        )


def _preference(options: ProfileOptions) -> Preference | None:
    """The loss of a step that learns from pairs of answers; None: another loss. Raises InputError for `beta` without `loss`."""
    if options.loss is None:
        if options.beta is not None:
            raise InputError(
                f"{spelled('beta')} {options.beta:g} is of a loss of pairs; name one too: {' or '.join(spelled('loss', name) for name in ANSWER_INPUTS)}"
            )
        return None
    return Preference(loss=options.loss, beta=BETA if options.beta is None else options.beta)


def trace_decoder(
    source: Source,
    batch: int,
    seq: int,
    lora: LoraConfig,
    dtype: str,
    report: Progress,
    preference: Preference | None = None,
    longest: int | None = None,
) -> tuple[Trace, Decoder | AnyDecoder]:
    """The step of a decoder, and the decoder, which says what is trained. `longest`: the length of the step of which this is a shorter
    one.
    """
    if not handwritten(source.config):
        return trace_any_decoder(source, batch, seq, lora, dtype, report, preference, longest)
    shape = decoder_shape(source.config)
    _check_rank(lora, shape.hidden)
    with FakeTensorMode():
        body = source.config.get("adapter_body", BODY)
        module = Decoder(shape, dtype=DTYPES[dtype], lora=lora, body=body, preference=preference, longest=longest)
        sample = _sample(batch, seq, rows_apart=None, preference=preference)
    return _traced(module, sample, report), module


def _sample(
    batch: int, seq: int, rows_apart: str | None, preference: Preference | None = None
) -> dict[str, torch.Tensor]:
    """The batch that a decoder is traced on; without positions where samples cannot share rows."""
    if preference:
        name, kind = ANSWER_INPUTS[preference.loss]
        return _sample(2 * batch, seq, PAIRS_APART) | {name: torch.zeros(2 * batch, dtype=getattr(torch, kind))}
    names = DECODER_INPUTS[:2] if rows_apart else DECODER_INPUTS
    return {name: torch.zeros(batch, seq, dtype=torch.int64) for name in names}


def _traced(module: torch.nn.Module, sample: dict[str, torch.Tensor], report: Progress) -> Trace:
    """The step of a decoder; the tensors of its batch are listed in the order of `sample`, and not in that of their use."""
    traced = trace(module, sample, decompositions=DECOMPOSITIONS, inference=INFERENCE, progress=report)
    batch = {tensor.name: tensor for tensor in traced.tensors if tensor.kind == "batch"}
    inputs = (batch[name] for name in sample if name in batch)
    return replace(traced, tensors=[next(inputs) if tensor.kind == "batch" else tensor for tensor in traced.tensors])


def _check_rank(lora: LoraConfig, hidden: int) -> None:
    for rank in (lora.rank, *lora.rank_pattern.values()):
        if rank > hidden:
            raise InputError(
                f"{spelled('lora_rank')} {rank}: the model is {hidden} wide, and a rank above that gains nothing"
            )


def trace_any_decoder(
    source: Source,
    batch: int,
    seq: int,
    lora: LoraConfig,
    dtype: str,
    report: Progress,
    preference: Preference | None = None,
    longest: int | None = None,
) -> tuple[Trace, AnyDecoder]:
    from tightfit.profiles.models.transformers_decoder import AnyDecoder, without_values

    _check_rank(lora, source.config["hidden_size"])
    module = AnyDecoder(source.config, dtype=DTYPES[dtype], seq=seq, lora=lora, preference=preference, longest=longest)
    with FakeTensorMode():
        without_values(module)
        if preference is None:
            module.learn_rows(_sample(batch, seq, rows_apart=None))
        sample = _sample(batch, seq, module.rows_apart, preference)
    traced = _traced(module, sample, report)
    for tensor in traced.tensors:
        if tensor.kind in ("weight", "constant") and tensor.name.split("[")[0] not in source.entries:
            raise InputError(
                f"{source.name}: its {source.config['model_type']} decoder reads a constant of shape {tensor.shape}"
                f" ({tensor.name}) that no checkpoint holds; it is not supported"
            )
    return traced, module
