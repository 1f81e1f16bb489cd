"""Experts of transformers' mixtures: which of its classes compute what ours do, and where checkpoints have their
matrices.

Since its version 5 transformers keeps the matrices of all experts in two tensors of three dimensions, whatever the
family, and a module of their own takes hidden states, the numbers of the experts of each row and their weights. Most
checkpoints hold a tensor for each expert.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.profiles.models.experts import Experts
from tightfit.profiles.models.router_loss import RouterLoss, RouterSums
from tightfit.profiles.models.transformers_kernels import ACTIVATIONS, bare_copy, same, tried
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.gates import CLAMPED, gated

GATE_UP, DOWN = "gate_up_proj", "down_proj"
BIASES = ("gate_up_proj_bias", "down_proj_bias")
PROBE = (3, 16, 8)
"""Experts, hidden size and width of the small copy that is compared."""
SIZES = (
    ("num_experts",),
    ("hidden_dim", "hidden_size"),
    ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_size"),
)
"""What modules call these three."""
ROUTER_LOSS = "load_balancing_loss_func"
"""What transformers calls the loss of routers in the code of each family that has one."""
OLD_NAMES = {"mixtral": {"gate", "w1", "w2", "w3"}, "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"}}
"""Family whose checkpoints a mixture's are like, in transformers' words -> names of linear layers of experts in its
older versions, as PEFT knows them (`peft.utils.transformers_weight_conversion`).
"""


def replace_experts(module: nn.Module) -> Experts | None:
    """Our experts in place of a module of transformers that computes the same; None if it does not."""
    own = dict(module.named_parameters())
    biased = own.keys() == {GATE_UP, DOWN, *BIASES}
    if not (biased or own.keys() == {GATE_UP, DOWN}) or own[GATE_UP].dim() != 3 or own[DOWN].dim() != 3:
        return None
    turned = turned_by(module)
    count, hidden, width = own[DOWN].mT.shape if turned else own[DOWN].shape
    if (own[GATE_UP].mT if turned else own[GATE_UP]).shape != (count, 2 * width, hidden):
        return None
    experts, inputs, inner = PROBE
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down, up_bias, down_bias, weights = (
        torch.randn(size, generator=generator)
        for size in (
            *((5, inputs), (experts, 2 * inner, inputs), (experts, inputs, inner), (experts, 2 * inner)),
            *((experts, inputs), (5, 2)),
        )
    )
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(5)])
    probe: Any = bare_copy(module)
    given = {GATE_UP: gate_up, DOWN: down} | (dict(zip(BIASES, (up_bias, down_bias))) if biased else {})
    if turned:  # which has its gates and ups in turn
        given = {name: _in_turn(value) if name.startswith(GATE_UP) else value for name, value in given.items()}
        given = {name: value.mT.contiguous() if value.dim() == 3 else value for name, value in given.items()}
    probe._parameters.update({name: nn.Parameter(value) for name, value in given.items()})
    for names, size in zip(SIZES, PROBE):
        for name in names:
            if hasattr(probe, name):
                setattr(probe, name, size)
    made = tried(probe, x, index, weights)
    given_to_ours = x, index, weights, gate_up, down, up_bias if biased else None, down_bias if biased else None
    for name in (*ACTIVATIONS, *_clamped(module)):
        if made is not None and same(_plainly(*given_to_ours, name), made):
            ours = Experts(count, hidden, width, name, own[DOWN].dtype, biased=biased)
            ours.adaptable = not turned  # PEFT's pairs are for matrices with gates and ups in turn
            return ours
    return None


def turned_by(module: nn.Module) -> bool:
    """Whether a module has rows and columns of its matrices the other way round, and the gate of each number beside its
    up (gpt-oss).
    """
    return bool(getattr(module, "is_transposed", False)) and not getattr(module, "is_concatenated", True)


def _in_turn(value: Tensor) -> Tensor:
    """Gates and ups [E, 2 * F, ...], one after the other, in turn."""
    return torch.stack(value.chunk(2, dim=1), dim=2).flatten(1, 2)


def _clamped(module: nn.Module) -> list[str]:
    """What `tightfit.runtime.engine.cpu.gates.gated` calls the activation of a module with a limit."""
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    return [f"{CLAMPED}{alpha} {limit}"] if isinstance(alpha, float) and isinstance(limit, float | int) else []


def _plainly(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    total = torch.zeros_like(x)
    for number, (own_gate_up, own_down) in enumerate(zip(gate_up, down)):
        both = x @ own_gate_up.t() + (0.0 if up_bias is None else up_bias[number])
        gate, up = both.chunk(2, dim=1)
        inner = torch.empty_like(gate)
        gated(gate, up, activation, out=(inner,))
        made = inner @ own_down.t() + (0.0 if down_bias is None else down_bias[number])
        total += made * (weights * (index == number)).sum(1, keepdim=True)
    return total


def parts_of(key: str, conversions: Sequence[Any]) -> tuple[str, ...]:
    """The names, with * for the number of an expert, of the tensors in a checkpoint whose rows, expert by expert, are
    those of the tensor `key` of transformers; `conversions` are its own. () if a checkpoint holds it as it is.
    """
    for conversion in conversions:
        steps = [type(step).__name__ for step in getattr(conversion, "operations", None) or []]
        targets = list(conversion.target_patterns)
        if (
            len(targets) != 1
            or not key.endswith(targets[0])
            or steps not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
        ):
            continue
        stem = key.removesuffix(targets[0])
        return tuple(f"{stem}{pattern}" for pattern in conversion.source_patterns)
    return ()


def names_of_experts(model_type: str) -> set[str]:
    """What linear layers are called that get no pairs in this family: PEFT takes such a pair for one of the experts,
    which had layers of these names in transformers before version 5, wherever in the model it stands.
    """
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    return OLD_NAMES.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), set())


def router_loss_of(made: Any) -> RouterLoss | None:
    """The loss of a model's routers, if its config asks for it and its code has one. Raises InputError where that is
    another than ours, found by comparing both on random scores.
    """
    theirs = getattr(sys.modules[type(made).__module__], ROUTER_LOSS, None)
    if not getattr(made.config, "output_router_logits", False) or theirs is None:
        return None
    if getattr(made, "router_aux_loss_coef", None) == 0:
        return None
    sizes: list[Any] = [
        getattr(made, name, None) for name in ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
    ]
    routers = sum(1 for _ in routers_of(made))
    if all(isinstance(size, int | float) and size > 0 for size in sizes) and routers:
        experts, chosen, coefficient = sizes
        generator = torch.Generator().manual_seed(0)
        scores = tuple(torch.randn(5, experts, generator=generator) for _ in range(2))
        sums = RouterSums(RouterLoss(chosen, 1.0, len(scores)), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]))
        for each in scores:
            sums.add(each)
        if same(sums.loss(), theirs(scores, experts, chosen, sums.counted[None])):
            return RouterLoss(chosen, float(coefficient), routers)
    raise InputError(
        f"config field 'output_router_logits' is true: the loss of routers of {type(made).__name__} is another than"
        " that of Switch Transformers, which is not supported; set it to false in config.json to train without it"
    )


def routers_of(made: Any) -> Iterator[tuple[nn.Module, int]]:
    """The routers whose scores that loss takes, and which of their outputs these are."""
    told = (getattr(getattr(made, made.base_model_prefix), "_can_record_outputs", None) or {}).get("router_logits")
    for recorder in told if isinstance(told, list | tuple) else [] if told is None else [told]:
        kind: Any = getattr(recorder, "target_class", recorder)
        place = getattr(recorder, "layer_name", None) or ""
        for name, child in made.named_modules():
            if isinstance(child, kind) and place in name:
                yield child, getattr(recorder, "index", 0)
