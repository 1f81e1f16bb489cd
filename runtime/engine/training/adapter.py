"""LoRA adapters in PEFT's format: names of their tensors, ``adapter_config.json``, and initial values; also the names
and initial values of a side network's tensors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
BODY = "model."
"""prefix of the names of a decoder's layers; a decoder inside a multimodal wrapper has another"""
MAGNITUDE = ".lora_magnitude_vector.weight"
"""suffix of the names of DoRA's trained lengths of a weight's rows"""
_SLICE = re.compile(r"([^:]+)\.modules_to_save\.\d+\.(\w+)\[(\d+):(\d+)\]")
SIDE = "side."
"""prefix of the names of a side network's tensors"""
SIDE_CONFIG = "side_config.json"
"""what a side network is, beside its tensors"""


class TableSlice(NamedTuple):
    """What a slice of a module that is trained in full belongs to, as its name says."""

    module: str
    """such as model.embed_tokens"""
    parameter: str
    start: int
    stop: int
    """rows"""


def table_slice(name: str) -> TableSlice | None:
    """What the trainable `name` is a slice of; None: it is none."""
    found = _SLICE.fullmatch(name)
    return TableSlice(found[1], found[2], int(found[3]), int(found[4])) if found else None


def peft_name(name: str, body: str) -> str:
    """What PEFT calls the module or parameter `name`, in a base model whose decoder's names begin with `body`."""
    return body + name.removeprefix(BODY) if name.startswith(BODY) else name


def adapter_key(name: str, body: str = BODY) -> str:
    """The key in a PEFT adapter of the trainable `name`; `body` is the prefix of the decoder's names in the
    base model. All slices of a module have that of the whole. PEFT leaves out the last part of a magnitude's name.
    """
    if own := table_slice(name):
        return PREFIX + peft_name(f"{own.module}.{own.parameter}", body)
    return PREFIX + peft_name(name.removesuffix(".weight") if name.endswith(MAGNITUDE) else name, body)


def trained_name(key: str, body: str = BODY) -> str:
    """The trainable whose key in a PEFT adapter is `key`."""
    name = BODY + key.removeprefix(PREFIX + body)
    return f"{name}.weight" if f"{name}.weight".endswith(MAGNITUDE) else name


def scaled_weight(name: str) -> str | None:
    """The weight whose rows have the lengths that the trainable `name` holds; None: it is no magnitude."""
    return name.removesuffix(MAGNITUDE) + ".weight" if name.endswith(MAGNITUDE) else None


def adapter_config(lora: Mapping[str, Any], names: Iterable[str], base: str, body: str = BODY) -> dict[str, Any]:
    """``adapter_config.json``; `lora` has `rank`, `alpha` and fields of this file that are not at their defaults,
    `names` are the trainables, `base` the base model's name.
    """
    targets: list[str] | str = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names})
    if body != BODY:  # a regular expression: given bare names, PEFT would adapt the wrapper's vision tower as well
        targets = f"{re.escape(body)}.*\\.({'|'.join(targets)})"
    others = {name: value for name, value in lora.items() if name not in ("rank", "alpha")}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    } | others


def initialise(name: str, seed: int, out: Tensor) -> None:
    """PEFT's initial values, seeded per tensor: lora_A uniform in +-1/sqrt(columns) (Kaiming with a = sqrt(5)), lora_B
    zero. Of a side network the down projections as lora_A, up projections and gates zero. Magnitudes follow from the
    weights: `tightfit.runtime.engine.training.trainer.Training.initialise`.
    """
    import torch

    if ".lora_B." in name or (name.startswith(SIDE) and ".down." not in name):
        out.zero_()
        return
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1)
    bound = out.shape[1] ** -0.5
    out.uniform_(-bound, bound, generator=generator)
