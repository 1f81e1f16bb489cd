"""The step of a decoder with its adapter, which predicts tokens or learns from pairs of answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tightfit.profiles.models.lora import LoraConfig, given, layer_numbers
from tightfit.profiles.options import BATCH, SEQ, ProfileOptions
from tightfit.profiles.schema import ANSWER_PLANES, PREFERENCE, Preference
from tightfit.profiles.steps.step import ProfiledStep
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress

if TYPE_CHECKING:  # these import PyTorch
    from tightfit.profiles.models.decoder_module import DecoderModule
    from tightfit.profiles.tracing.traced import Trace

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
                f"{spelled('side_blocks')} {options.side_blocks} is of a side network; name its rank too, for example"
                f" {spelled('side_rank', 64)}"
            )
        self.tile = _tile(options, self.batch, self.seq)
        self.matrix_rows = _matrix_rows(options)
        self._decoder: DecoderModule | None = None

    def settings(self, report: Progress) -> list[Any]:
        return [
            asdict(self.lora),
            self.batch,
            self.seq,
            self.dtype,
            self.preference,
            self.tile,
            self.matrix_rows,
        ]

    def trace(self, report: Progress) -> Trace:
        from tightfit.profiles.steps.decoder_trace import trace_decoder

        traced, self._decoder = trace_decoder(
            self.source,
            self.batch,
            self.seq,
            self.lora,
            self.dtype,
            report,
            self.preference,
            tile=self.tile,
            matrix_rows=self.matrix_rows,
        )
        check_length(self.source, self.seq)
        return traced

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
            "experts": options.lora_experts,
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
            f"{spelled('seq')} {seq} is longer than the {longest} positions that {source.name} was trained for; use"
            f" {spelled('seq', longest)} or less"
        )


def _tile(options: ProfileOptions, batch: int, seq: int) -> int | None:
    """Tokens that go through a layer at a time; None: all of them. Raises InputError where they are neither whole
    samples that share out the batch nor equal parts of one.
    """
    tile = options.tile
    if tile is None or tile == batch * seq:
        return None
    if tile == 0:
        raise InputError(
            f"{spelled('tile')} 0: the tile is measured where a model is profiled on the machine that trains it; give"
            " the tokens of a tile here"
        )
    fitting = tile_sizes(batch, seq)
    if tile not in fitting:
        nearest = sorted(sorted(fitting, key=lambda size: (abs(size - tile), size))[:4])
        raise InputError(
            f"{spelled('tile')} {tile}: {batch} samples of {seq} tokens do not go through a layer in equal parts of so"
            f" many tokens, whole samples or equal parts of one; give {' or '.join(map(str, nearest))}, or leave it out"
        )
    if options.loss is not None:
        raise InputError(
            f"{spelled('tile')} {tile}: the two answers of a pair go through the model together; leave it out"
        )
    if options.lora_dropout:
        raise InputError(
            f"{spelled('tile')} {tile}: with {spelled('lora_dropout', options.lora_dropout)} samples would be given"
            " each other's random numbers; leave one of them out"
        )
    return tile


def _matrix_rows(options: ProfileOptions) -> int | None:
    """Rows of a frozen matrix that are multiplied at a time; None: as the model's size asks for. Raises InputError
    where all rows are needed at once.
    """
    rows = options.matrix_rows
    for name in ("dora", "lora_dropout") if rows is not None else ():
        if value := getattr(options, name):
            raise InputError(
                f"{spelled('matrix_rows', rows)}: with {spelled(name, value)} all rows of a matrix are multiplied at"
                " once; leave one of them out"
            )
    return rows


def tile_sizes(batch: int, seq: int) -> set[int]:
    """The sizes of tiles, in tokens, of a step of `batch` samples of `seq` tokens: whole samples or equal parts of one,
    fewer than all.
    """
    return {*_divisors(seq), *(seq * rows for rows in _divisors(batch))} - {batch * seq}


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if not number % divisor]


def _preference(options: ProfileOptions) -> Preference | None:
    """The loss of a step that learns from pairs of answers; None: another loss. Raises InputError for `beta` without
    `loss`.
    """
    if options.loss is None:
        if options.beta is not None:
            raise InputError(
                f"{spelled('beta')} {options.beta:g} is of a loss of pairs; name one too:"
                f" {' or '.join(spelled('loss', name) for name in ANSWER_PLANES)}"
            )
        return None
    return Preference(loss=options.loss, beta=BETA if options.beta is None else options.beta)
