"""The options of profiling in one record, for the command line, the service's requests and callers from Python
alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tightfit.profiles.option_fields import Options, option
from tightfit.runtime.common.progress import Progress

Bits = Literal["4bit", "8bit", "16bit"]
MOST_ACCUMULATED = 1 << 16
"""most steps whose gradients make one update"""
SEQ, BATCH = 256, 1
"""tokens and samples of a language model's step, unless others are asked for"""
LARGEST_RANK = 1 << 14
LARGEST_ALPHA = 1e9
LONGEST_PATH = 4096
"""letters"""
PathText = Annotated[str, Field(min_length=1, max_length=LONGEST_PATH)]


class ProfileOptions(Options):
    """Which step of a model is profiled, and for what device (`tightfit.profiles.api.profile` says more of each).

    `tightfit profile`, the service's `/v1/profiles` and the form on its page have the fields that are made by `option`,
    and take from there what they say of each (`tightfit.profiles.option_fields`).
    """

    seq: int | None = option(
        None,
        f"Tokens per sample; default: {SEQ}.",
        label="Sequence",
        metavar="TOKENS",
        ge=1,
        le=1 << 20,
        primary=True,
    )
    batch: int | None = option(
        None, f"Samples per step; default: {BATCH}.", metavar="SAMPLES", ge=1, le=1 << 16, primary=True
    )
    tile: int | None = option(
        None,
        "Tokens that go through a layer at a time, whole samples or a slice of one: long texts and large batches in"
        " less memory; 0: the fewest at which this machine's matrix products keep their speed; default: all tokens of a"
        " step.",
        metavar="TOKENS",
        ge=0,
        le=1 << 30,
    )
    matrix_rows: int | None = option(
        None,
        "Rows of a frozen matrix, or of the first matrices of experts, that are read, unpacked and multiplied at a"
        " time: large models in less memory; default: as many as 64 MiB hold unpacked.",
        label="Rows of a matrix",
        metavar="ROWS",
        ge=16,
        le=1 << 20,
    )
    lora_rank: int | None = option(
        None, "Rank of the LoRA pairs; default: 8.", label="LoRA rank", ge=1, le=LARGEST_RANK, primary=True
    )
    lora_alpha: float | None = option(
        None,
        "LoRA scale is alpha / rank; default: twice the rank.",
        label="LoRA alpha",
        gt=0,
        le=LARGEST_ALPHA,
        primary=True,
    )
    lora_targets: str | None = option(
        None,
        "Linear layers that get pairs: all-linear (the default), attention, names such as q_proj,v_proj, or a regular"
        " expression for whole names.",
        label="LoRA on",
        metavar="WHICH",
        min_length=1,
        max_length=4096,
        primary=True,
    )
    lora_layers: str | None = option(
        None,
        "Only in these layers of the model, such as 8-15,20.",
        label="LoRA in layers",
        metavar="NUMBERS",
        max_length=2560,
        pattern=r"^[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*$",
    )
    lora_experts: bool = option(
        False,
        "Pairs for each expert of a mixture too, as PEFT has them with target_parameters.",
        label="LoRA on experts",
    )
    rank_pattern: Mapping[str, Annotated[int, Field(ge=1, le=LARGEST_RANK)]] | None = option(
        None,
        "Another rank where a layer's name ends so, such as q_proj=16.",
        metavar="PATTERN=RANK",
        max_length=256,
    )
    alpha_pattern: Mapping[str, Annotated[float, Field(gt=0, le=LARGEST_ALPHA)]] | None = option(
        None,
        "Another alpha there, such as q_proj=32.",
        metavar="PATTERN=ALPHA",
        max_length=256,
    )
    lora_dropout: float | None = option(
        None,
        "Share of a pair's input that is left out in training, anew in each step.",
        label="LoRA dropout",
        metavar="P",
        ge=0,
        lt=1,
    )
    rslora: bool = option(False, "LoRA scale is alpha / sqrt(rank).", label="rsLoRA")
    dora: bool = option(False, "Train a magnitude beside each pair (DoRA).", label="DoRA")
    modules_to_save: Sequence[Annotated[str, Field(min_length=1, max_length=64)]] | None = option(
        None,
        "Modules that are trained in full: embed_tokens, lm_head, or both.",
        metavar="NAMES",
        max_length=2,
    )
    adapter: PathText | Path | None = option(
        None,
        "Take all LoRA settings from this adapter of PEFT, so that a run can start from it.",
        over_http=(
            "Take all LoRA settings from this adapter of PEFT, a folder under an allowed root, so that a run can start"
            " from it."
        ),
        label="Settings of an adapter",
        metavar="DIR",
    )
    loss: Literal["dpo", "orpo"] | None = option(
        None,
        "Learn from pairs of a chosen and a rejected answer, --batch of them per step, instead of predicting tokens.",
        over_http=(
            "Learn from pairs of a chosen and a rejected answer, `batch` of them per step, instead of predicting"
            " tokens."
        ),
        label="Loss of pairs",
        metavar="dpo|orpo",
        primary=True,
    )
    beta: float | None = option(None, "How much the comparison weighs in the loss of pairs; default: 0.1.", gt=0)
    ignore_state: Sequence[Annotated[str, Field(min_length=1, max_length=256)]] | None = option(
        None,
        "Attributes and variables of a module that its forward may change in Python, since they only count or are kept"
        " for a log.",
        metavar="NAMES",
        max_length=64,
    )
    accumulate: int = option(
        1,
        "Steps whose gradients make one update: a larger batch in the memory of a small one.",
        label="Steps per update",
        metavar="STEPS",
        ge=1,
        le=MOST_ACCUMULATED,
        primary=True,
    )
    dtype: Literal["bfloat16", "float32"] | None = option(
        None,
        "Number type of the arithmetic, bfloat16 or float32; default: bfloat16, float32 for a module.",
        label="Number type",
    )
    device: str = option(
        "cpu",
        "cpu: this machine, measured. The name of a device (see `tightfit devices`) or a JSON file that describes one:"
        " its times are estimated.",
        over_http=(
            "cpu: this machine, measured. A name listed at /v1/devices: estimated for that one, to be planned and not"
            " run."
        ),
        metavar="NAME",
        max_length=LONGEST_PATH,
    )
    threads: int | None = option(
        None, "Compute threads; default: every core that this process may use.", ge=1, le=1 << 12
    )
    side_rank: int | None = option(
        None,
        "Measure the step of a side network beside MODEL instead, with adapters of this rank: the server's part of"
        " `mobillm`.",
        over_http=(
            "Measure the step of a side network beside the model instead, with adapters of this rank: the server's part"
            " of `mobillm`."
        ),
        metavar="RANK",
        ge=1,
        le=LARGEST_RANK,
    )
    side_blocks: int | None = option(
        None,
        "Blocks of MODEL whose outputs a side network reads; default: 8, or all.",
        over_http="Blocks of the model whose outputs a side network reads; default: 8, or all.",
        ge=1,
        le=1 << 12,
    )
    base: Bits | None = option(
        None,
        "4bit, 8bit or 16bit: precision of the frozen weights, where MODEL leaves a choice; default: what the file"
        " holds, 4bit for files in 16 or 32 bits.",
        over_http=(
            "Precision of the frozen weights, where the model leaves a choice; default: what the file holds, 4bit for"
            " files in 16 or 32 bits."
        ),
        label="Frozen weights",
        metavar="BITS",
        primary=True,
    )
    embeddings: Bits | None = option(
        None,
        "The same for the embedding and the head; default: as the other weights.",
        label="Embedding and head",
        metavar="BITS",
    )
    bundle: PathText | Path | None = option(
        None,
        "Take the traced step from this bundle, which `tightfit prepare` made on a machine with more memory.",
        over_http=(
            "Take the traced step from this bundle, a folder under an allowed root, which `tightfit prepare` made."
        ),
        label="Bundle",
        metavar="DIR",
    )
    force: bool = option(False, "Measure again even where a fitting result lies in the cache.", label="Measure anew")
    memory: int | None = Field(None, ge=1)
    """Bytes that the processes which measure may hold; None: what they are best with. It says how large buffers are,
    and not what is measured.
    """
    progress: Progress | None = None
