"""The step of a device whose side network is trained elsewhere (MobiLLM, arXiv 2502.20421): the forward of the frozen
model up to its last block, of which the labels and the outputs of chosen blocks are sent to a server.

It is described by a profile of its own: no tensor is trained, no adapter is part of the model, no operator belongs to a
backward, and the final norm and the head, which the server has, are left out. The message of a micro-batch begins with
its labels. After each chosen block stands a layer with one operator `tightfit.send`, which rounds the output into the
message, so that the output itself need not stay; the last of them sends the message off.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

from tightfit.planner.problem.gradients import refuse_preference, refuse_tables, resting
from tightfit.planner.problem.messages import message_operator
from tightfit.planner.schema import Plan
from tightfit.profiles.models.side_shape import check_blocks, chosen_blocks
from tightfit.profiles.schema import MOBILLM, Layer, Operator, Profile, Program, Tensor, Value
from tightfit.profiles.tracing.inference import inference_only
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.fleet.message import ALIGNMENT, BITS, SENDING, Passing, offsets, paged
from tightfit.runtime.engine.training.job import SEND

SENT = "sent"
"""the layers that send are called ``sent.3``, after the block whose output it is, and ``sent.labels``"""
LABELS = "labels"
LOSS = "sent/loss"
"""scalar that stands for the loss, which the server computes; its value means nothing"""
DEFAULT_BITS = 8
"""bits of a number in a message"""
BLOCK = re.compile(r"model\.layers\.(\d+)")
PAIRS_ALONE = ("tightfit.lora_down", "tightfit.dora_norm", "tightfit.dora_scale")
"""operators that a projection without a pair does not need"""
CALL_SECONDS, BYTES_PER_SECOND = 20e-6, 1e9
"""how long a call of an operator that sends takes, and how fast it rounds (two cores: 2 to 5 GB/s at 8 bits, 1 GB/s at
4)
"""


def device_forward(
    profile: Profile, blocks: Sequence[int] | None = None, bits: int = DEFAULT_BITS, *, micro_batches: int = 1
) -> Profile:
    """The profile of the device's step. `blocks`: indices of the blocks whose outputs are sent, by default those of
    `chosen_blocks`; `bits`: 8 or 4 to round each row of a message, 0 to send it as it is; `micro_batches`: how many a
    step has.

    Its floor is that of a process without a backward, and has room for the connections and for two messages. Raises
    InputError for a model that is no decoder, for blocks that the model lacks, and for other bits.
    """
    check_side(profile)
    if bits not in BITS:
        raise InputError(
            f"{bits} bits: a message has numbers of {', '.join(map(str, BITS[1:]))} bits, or 0 for all of them"
        )
    layer_of_block = {
        int(block[1]): index for index, layer in enumerate(profile.layers) if (block := BLOCK.fullmatch(layer.name))
    }
    sent = chosen_blocks(len(layer_of_block)) if blocks is None else tuple(blocks)
    check_blocks(sent, len(layer_of_block))
    last = layer_of_block[len(layer_of_block) - 1]
    programs = {program.name: program for program in profile.programs}
    labels = next(tensor for tensor in profile.tensors if tensor.name == LABELS)
    program, sender = _sender(_value_of(labels), LABELS, 0, bits, name=f"{SENT}.{LABELS}")
    sent_programs: dict[str, Program] = {program.name: program}
    layers: list[Layer] = [sender]
    for index, layer in enumerate(profile.layers[: last + 1]):
        forward = _without_adapters(inference_only(programs[layer.program]), layer, profile)
        sent_programs[forward.name] = forward
        values = {value.name for value in forward.values}
        kept = {value: name for value, name in layer.bindings.items() if value in values}
        layers.append(layer.model_copy(update={"program": forward.name, "bindings": kept}))
        block = BLOCK.fullmatch(layer.name)
        if block and int(block[1]) in sent:
            position = sent.index(int(block[1]))
            value, name = _output(profile, index)
            is_last = position == len(sent) - 1
            program, sender = _sender(value, name, position + 1, bits, name=f"{SENT}.{block[1]}", last=is_last)
            sent_programs[program.name] = program
            layers.append(sender)
    bound_names = {name for layer in layers for name in layer.bindings.values()}
    at_rest = resting(profile, {layer.name for layer in profile.layers})
    tensors = [
        tensor
        for tensor in profile.tensors
        if tensor.name not in at_rest and (tensor.kind == "batch" or tensor.name in bound_names)
    ]
    tensors.append(Tensor(name=LOSS, kind="activation", shape=[], dtype="float32", bytes=4))
    content = f"{profile.fingerprint} device {list(sent)} {bits} {micro_batches}"
    result = profile.model_copy(
        update={
            "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
            "model": profile.model.model_copy(update={"lora": None}),
            "optimizer": device_optimizer(micro_batches),
            "tensors": tensors,
            "programs": list(sent_programs.values()),
            "layers": layers,
            "loss": LOSS,
            "token_losses": None,
        }
    )
    floor = profile.device.floor.inference
    extra = floor.transport_bytes + SENDING * paged(message_bytes(result))
    floor = floor.model_copy(
        update={
            "resident_bytes": floor.resident_bytes + extra,
            "inference_resident_bytes": floor.resident_bytes + extra,
        }
    )
    return result.model_copy(update={"device": profile.device.model_copy(update={"floor": floor})})


def device_optimizer(micro_batches: int) -> dict[str, Any]:
    """The `optimizer` field of the device's profile and plan."""
    optimizer: dict[str, Any] = {"name": MOBILLM, "state_tensors": 0}
    return optimizer if micro_batches == 1 else {**optimizer, "accumulate": micro_batches}


def check_side(profile: Profile) -> None:
    """Raise InputError for a profile whose model no side network can be trained beside, or with dropout."""
    if profile.model.kind != "decoder":
        raise InputError(
            f"{MOBILLM} trains a side network beside a language model, from the outputs of its blocks, and"
            f" {profile.model.name} is a {profile.model.kind}; choose another policy"
        )
    refuse_tables(profile, MOBILLM)
    refuse_preference(profile, MOBILLM)
    dropout = (profile.model.lora or {}).get("lora_dropout")
    if dropout:
        raise InputError(
            f"{MOBILLM} trains a side network and no LoRA pairs, so that {spelled('lora_dropout')} {dropout:g} would do"
            " nothing; profile without it, or choose another policy"
        )


def sent_tensors(source: Profile | Plan, target: str = SEND) -> tuple[tuple[Passing, ...], int]:
    """What a device sends for one micro-batch by its profile or plan, in the order of the message, and the bits of its
    numbers; with `RECEIVE` as `target`, what a server receives by its own.
    """
    programs = {program.name: program for program in source.programs}
    tensors: list[Passing] = []
    bits = 0
    for layer in source.layers:
        program = programs[layer.program]
        for operator in program.operators:
            if operator.target == target:
                name = (operator.inputs if target == SEND else operator.outputs)[0]
                value = next(value for value in program.values if value.name == name)
                tensors.append(Passing(shape=tuple(value.shape), dtype=value.dtype))
                bits = operator.kwargs["bits"]
    return tuple(tensors), bits


def message_bytes(source: Profile | Plan) -> int:
    """Bytes of the message of one micro-batch."""
    passing, bits = sent_tensors(source)
    return offsets(passing, bits)[1] if passing else ALIGNMENT


def _output(profile: Profile, index: int) -> tuple[Value, str]:
    """The output of a block: what its forward makes and a later layer's reads."""
    programs = {program.name: program for program in profile.programs}
    layer = profile.layers[index]
    program = programs[layer.program]
    outputs = {name for position in program.inference for name in program.operators[position].outputs}
    read = {
        later.bindings[name]
        for later in profile.layers[index + 1 :]
        for position in programs[later.program].inference
        for name in programs[later.program].operators[position].inputs
        if name in later.bindings
    }
    handed_on = [
        (value, layer.bindings[value.name])
        for value in program.values
        if value.name in outputs and value.name in layer.bindings and layer.bindings[value.name] in read
    ]
    if len(handed_on) != 1:
        raise InputError(f"layer {layer.name} hands {len(handed_on)} tensors on where a block of a decoder hands on 1")
    return handed_on[0]


def _value_of(tensor: Tensor) -> Value:
    """A contiguous tensor of the batch as a value of a program."""
    stride = [math.prod(tensor.shape[dimension + 1 :]) for dimension in range(len(tensor.shape))]
    return Value(
        name=tensor.name, shape=tensor.shape, stride=stride, dtype=tensor.dtype, bytes=tensor.bytes, kind=tensor.kind
    )


def _sender(
    value: Value, tensor: str, number: int, bits: int, *, name: str, last: bool = False
) -> tuple[Program, Layer]:
    """The layer `name`, which puts a tensor into the message as number `number`; the last one sends it off."""
    sent = value.model_copy(update={"name": "output"})
    values, outputs, bindings = [sent], [], {"output": tensor}
    if last:
        values.append(Value(name="loss", shape=[], stride=[], dtype="float32", bytes=4, kind="activation"))
        outputs, bindings = ["loss"], {**bindings, "loss": LOSS}
    seconds = CALL_SECONDS + sent.bytes / BYTES_PER_SECOND
    operator = message_operator(SEND, sent, number, bits, seconds, outputs=outputs)
    program = Program(name=f"{SENT} {number}", values=values, operators=[operator])
    return program, Layer(name=name, program=program.name, bindings=bindings)


def _without_adapters(program: Program, layer: Layer, profile: Profile) -> Program:
    """The program with its projections alone, without the LoRA pairs beside them. What DoRA makes of a projection's
    product is the product, with the projection's bias.

    Seconds and FLOPs of a projection are reduced in proportion. Raises InputError where another operator reads what is
    trained.
    """
    trained = {tensor.name for tensor in profile.tensors if tensor.kind == "trainable"}
    pairs = {value for value, name in layer.bindings.items() if name in trained}
    lora_outputs = {
        output
        for operator in program.operators
        if operator.target == "tightfit.lora_down"
        for output in operator.outputs
        if output is not None and pairs & set(operator.inputs)
    }
    if not pairs:
        return program
    scaled = {
        operator.args[0]["operand"]["value"]: operator
        for operator in program.operators
        if operator.target == "tightfit.dora_scale"
    }
    operators: list[Operator] = []
    for operator in program.operators:
        reads = set(operator.inputs) & (pairs | lora_outputs)
        if operator.target in PAIRS_ALONE:
            continue
        if operator.target != "tightfit.projection":
            if reads:
                raise InputError(
                    f"layer {layer.name}: {operator.target} reads {', '.join(sorted(reads))}, which is trained, so that"
                    " the forward cannot do without; choose another policy"
                )
            operators.append(operator)
            continue
        x, weight, bias, narrow, *_ = operator.args
        if narrow is None:  # a layer without a pair
            operators.append(operator)
            continue
        inputs, outputs = [name for name in operator.inputs if name not in reads], operator.outputs
        if outputs[0] in scaled:
            bias, outputs = scaled[outputs[0]].args[3], scaled[outputs[0]].outputs[:1]
            inputs += [] if bias is None else [bias["operand"]["value"]]
        rank = narrow["operand"]["size"][1]
        share = weight["operand"]["size"][1] / (weight["operand"]["size"][1] + rank)
        operators.append(
            operator.model_copy(
                update={
                    "args": [x, weight, bias, None, None, 0.0],
                    "inputs": inputs,
                    "outputs": outputs,
                    "seconds": operator.seconds * share,
                    "flops": operator.flops * share,
                }
            )
        )
    used_names = {name for operator in operators for name in [*operator.inputs, *filter(None, operator.outputs)]}
    return Program(
        name=f"{program.name} alone",
        values=[value for value in program.values if value.name in used_names],
        operators=operators,
    )
