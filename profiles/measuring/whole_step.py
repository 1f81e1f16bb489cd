"""Runs a module's whole step through the operators that a run calls, without a plan, for comparison with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.cpu import KERNELS
from tightfit.runtime.engine.device.draws import Draws
from tightfit.runtime.engine.kernels.compiled import compile_operator
from tightfit.runtime.engine.training.job import DROPOUT


def run_step(
    layers: Sequence[Mapping[str, Any]],
    programs: Mapping[str, Mapping[str, Any]],
    tensors: dict[str, Tensor],
    returned: Sequence[str],
    *,
    seed: int = 0,
    evaluate: bool = False,
) -> dict[str, Tensor]:
    """Run forward and backward once, or with `evaluate` what a layer does where no backward follows; returns the
    tensors among `returned` (global names) that the step makes or keeps.

    `layers` and `programs` are a profile's, as dicts; `tensors` holds parameters, buffers and the batch by name. Each
    tensor that the step makes is freed after its last reader; what an operator reads and makes it writes in place.
    Nothing is left out by dropout, and PyTorch's generator is seeded with `seed`.
    """
    torch.default_generator.manual_seed(seed)
    no_draws = Draws()
    no_draws.step = None
    present = {name: {operator["phase"] for operator in program["operators"]} for name, program in programs.items()}
    phases = [("forward", layers), ("backward", layers[::-1])]
    steps = [
        (layer, operator)
        for phase, order in (phases[:1] if evaluate else phases)
        for layer in order
        for operator in programs[layer["program"]]["operators"]
        if operator["phase"] == ("inference" if evaluate and "inference" in present[layer["program"]] else phase)
    ]

    def global_name(layer: Mapping[str, Any], name: str) -> str:
        return str(layer["bindings"].get(name) or f"{layer['name']}/{name}")

    last_use: dict[str, int] = {}
    for index, (layer, operator) in enumerate(steps):
        for name in [*operator["inputs"], *filter(None, operator["outputs"])]:
            last_use[global_name(layer, name)] = index
    freed_after: dict[int, list[str]] = {}
    for name, index in last_use.items():
        if name not in returned:
            freed_after.setdefault(index, []).append(name)
    values = {name: {value["name"]: value for value in program["values"]} for name, program in programs.items()}
    for index, (layer, operator) in enumerate(steps):
        program_values = values[layer["program"]]
        inputs = {name: tensors[global_name(layer, name)] for name in operator["inputs"]}
        rewritten = {global_name(layer, name) for name in operator["inputs"]}
        outputs: list[Tensor | None] = []
        for name in operator["outputs"]:
            output = None
            if name is not None and global_name(layer, name) in rewritten:
                output = tensors[global_name(layer, name)]
            elif name is not None:
                output = torch.empty_strided(
                    program_values[name]["shape"],
                    program_values[name]["stride"],
                    dtype=getattr(torch, program_values[name]["dtype"]),
                )
                tensors[global_name(layer, name)] = output
            outputs.append(output)
        compiled = compile_operator(operator, program_values, KERNELS)
        if compiled.name.startswith(DROPOUT):
            compiled.kwargs["draws"] = no_draws
        compiled.run(inputs, outputs)
        inputs.clear()
        for name in freed_after.get(index, ()):
            del tensors[name]
    return {name: tensors[name] for name in returned if name in tensors}
