"""Operator times where nothing can be measured: a roofline of floating-point operations and bytes moved.

Source of the model: Williams, Waterman and Patterson 2009, "Roofline". Used for devices that are not at hand; a profile
made this way says so (`Device.measured` is False). An operator takes the longer of its arithmetic and its memory
traffic, plus the fixed cost of a call. Our fused operators do more than one pass over their tensors on a CPU; how many
was measured once (`PASSES`, `EFFICIENCY`) and is taken to be the same on every CPU.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

from tightfit.profiles.devices.data_sheets import DeviceDescription
from tightfit.profiles.schema import Operator, Profile, Program, Tensor, Value
from tightfit.runtime.common.errors import InputError

PASSES = {
    "tightfit.rms_norm": 3.9,
    "tightfit.rms_norm_backward": 4.1,
    "tightfit.gated": 3.7,
    "tightfit.gated_backward": 5.0,
    "tightfit.attention": 15.0,
    "tightfit.attention_backward": 15.0,
    "tightfit.head_chunk": 2.6,
    "tightfit.lora_backward": 7.0,
    "tightfit.lora_down": 5.0,
}
"""time of an operator, its matrix products left out unless they are narrow, over the time of an addition that touches as many
bytes (measured: Zen 4, shapes of Qwen2.5-0.5B and SmolLM2-135M; norms, gates, attention and head by what their time became on Zen 5
since)"""
EFFICIENCY = {"tightfit.attention": 1.5, "tightfit.attention_backward": 1.45, "tightfit.head_chunk": 1.0}
"""operators that do their matrix products and their passes one after the other: rate of the products over that of one large
product of the same number type (measured as `PASSES`)"""
UNPACK_PASSES = 3.5
"""unpacking 4-bit weights over an addition that touches as many bytes (measured as `PASSES`)"""
UPDATE_PASSES = 7
"""AdamW: reads parameter, gradient and two states, writes three"""
SUM_PASSES = 3
"""gradients summed over steps: reads gradient and sum, writes the sum"""
PRODUCTS = ("tightfit.projection", "tightfit.lora_")
"""operators that are matrix products and little else"""
FLOAT32_INSIDE = {"tightfit.attention": 2, "tightfit.attention_backward": 3}
"""compute in float32 on a CPU whatever their inputs' type; their output of this number is scratch for that, which `PASSES`
knows of"""
MIB = 1 << 20
NARROW = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")


def retarget(profile: Profile, on: DeviceDescription) -> Profile:
    """`profile`, measured or estimated anywhere, as it would be on another device.

    Raises InputError for a profile whose operators state no FLOPs at all: their bytes alone say too little.
    """
    if not any(operator.flops for program in profile.programs for operator in program.operators):
        what, way = (
            ("bare graph", f"leave the device out, or write a graph with its operators' seconds on {on.name}")
            if profile.model.kind == "graph"
            else ("profile of", "fill in `flops` of its operators, or profile the model with tightfit")
        )
        raise InputError(
            f"the {what} {profile.model.name} states no FLOPs, so its times on {on.name} cannot be estimated; {way}"
        )
    return estimate_profile(profile, on)


def estimate_profile(profile: Profile, on: DeviceDescription) -> Profile:
    """`profile` with the times, workspace, floor and channels of another device.

    Workspace that was measured on a CPU stays what it was for another CPU; a card's is part of its floor.
    """
    known = profile.device.kind == "cpu" and any(o.workspace_bytes for p in profile.programs for o in p.operators)
    digest = json.dumps([profile.fingerprint, on.model_dump(mode="json")], sort_keys=True)
    return profile.model_copy(
        update={
            "fingerprint": hashlib.sha256(digest.encode()).hexdigest(),
            "device": on.device(),
            "tensors": [estimate_tensor(tensor, on, profile.accumulate) for tensor in profile.tensors],
            "programs": [estimate_program(program, on, keep_workspace=known) for program in profile.programs],
        }
    )


def estimate_program(program: Program, on: DeviceDescription, *, keep_workspace: bool = False) -> Program:
    """`program` with the seconds, and unless told otherwise the workspace bytes, of its operators filled."""
    program = _with_scratch(program, on)
    values = {value.name: value for value in program.values}
    operators = []
    for operator in program.operators:
        figures: dict[str, float] = {"seconds": operator_seconds(operator, values, on)}
        if on.kind == "cuda":
            figures["workspace_bytes"] = 0
        elif not keep_workspace:
            figures["workspace_bytes"] = operator_workspace(operator, values)
        operators.append(operator.model_copy(update=figures))
    return program.model_copy(update={"operators": operators})


def _with_scratch(program: Program, on: DeviceDescription) -> Program:
    """`program` with the scratch of the loss head and of attention as a trace on the device plans it (`tightfit.runtime.engine.cpu.operators`,
    `tightfit.runtime.engine.cpu.attention`).

    A card attends in the tensors' own type: its scratch is one number.
    """
    from tightfit.runtime.engine.cpu.attention import attention_scratch

    values = {value.name: value for value in program.values}
    operators = []
    for operator in program.operators:
        scratch = [values[name] for name in operator.outputs[1:] if name is not None]
        if operator.target == "tightfit.head_chunk" and len(scratch) == 2:
            narrow, wide = scratch
            rounded = on.narrow and narrow.dtype != "float32"
            shape = [wide.shape[0] if rounded else 1, wide.shape[1]]
            item = narrow.bytes // math.prod(narrow.shape)
            values[narrow.name] = narrow.model_copy(update={"shape": shape, "bytes": item * math.prod(shape)})
            operators.append(operator.model_copy(update={"args": [*operator.args[:5], rounded]}))
            continue
        number = FLOAT32_INSIDE.get(operator.target, len(operator.outputs))
        if number < len(operator.outputs):
            name = operator.outputs[number]
            if name is not None:
                size = attention_scratch(*_attended(operator, values), backward=operator.target.endswith("backward"))
                shape = [1, 1] if on.kind == "cuda" else list(size)
                update = {"shape": shape, "stride": [shape[1], 1], "bytes": 4 * math.prod(shape)}
                values[name] = values[name].model_copy(update=update)
        operators.append(operator)
    return program.model_copy(update={"values": list(values.values()), "operators": operators})


def estimate_tensor(tensor: Tensor, on: DeviceDescription, accumulate: int = 1) -> Tensor:
    """`tensor` with its unpack time (weights: packed read, unpacked written) or update time (trainables) filled."""
    if tensor.kind == "weight" and tensor.packed_bytes:
        passes = UNPACK_PASSES if on.kind == "cpu" else 1.0
        seconds = passes * (tensor.packed_bytes + tensor.bytes) / on.bytes_per_second + on.call_seconds
        return tensor.model_copy(update={"unpack_seconds": seconds})
    if tensor.kind == "trainable":
        passes, calls = float(UPDATE_PASSES), 1.0
        if accumulate > 1:
            # Summed in every step; for the update the sum becomes a mean first and zero afterwards.
            passes, calls = SUM_PASSES + (UPDATE_PASSES + 3) / accumulate, 1 + 3 / accumulate
        seconds = passes * tensor.bytes / on.bytes_per_second + calls * on.call_seconds
        return tensor.model_copy(update={"update_seconds": seconds, "perturb_seconds": 0.0})
    return tensor


def operator_seconds(operator: Operator, values: Mapping[str, Value], on: DeviceDescription) -> float:
    """Roofline of one operator. Rows gathered from the store count as a read of what they make."""
    touched = _touched(operator, values)
    rate = on.flops_per_second.get(_type(operator, values, on.kind), on.flops_per_second["float32"])
    gathered = _made(operator, values) / on.read.bytes_per_second if operator.gathers else 0.0
    fixed = gathered + on.call_seconds
    if on.kind != "cpu":
        return max(operator.flops / rate, touched / on.bytes_per_second) + fixed
    passed = PASSES.get(operator.target, 1.0) * touched / on.bytes_per_second
    if operator.target in EFFICIENCY:
        return operator.flops / rate / EFFICIENCY[operator.target] + passed + fixed
    return max(operator.flops / rate, passed) + fixed


def operator_workspace(operator: Operator, values: Mapping[str, Value]) -> int:
    """Transient heap bytes of an operator on a CPU, from its shapes.

    Our operators walk blocks of fixed size (`tightfit.runtime.engine.cpu.operators`), convolutions lay their windows out, matrix products
    pack a panel. The largest operators are 0 to 70 % above what was measured for Qwen2.5-0.5B (1 × 256 and 1 × 1024 tokens),
    Qwen2.5-3B and SmolLM2-135M (16 × 64); a residual CNN's largest 2 to 50 %. Attention's backward took 0.35 to 2.0 MiB there.
    """
    from tightfit.runtime.engine.cpu.attention import TURNED_ELEMENTS, attention_scratch
    from tightfit.runtime.engine.cpu.operators import BLOCK_ELEMENTS, HEAD_ROWS, STATE_COLUMNS

    target, touched = operator.target, _touched(operator, values)
    if target in FLOAT32_INSIDE:
        if target.endswith("backward"):
            return 9 * MIB // 4
        tokens, seq, heads, queries, keys = _attended(operator, values)
        samples, _ = attention_scratch(tokens, seq, heads, queries, keys)
        turned = samples * seq * keys
        return 3 * MIB // 8 + 3 * min(turned, TURNED_ELEMENTS)
    if target == "tightfit.head_chunk":
        if values[operator.inputs[0]].shape[1] == STATE_COLUMNS:
            return min(touched, 2 * MIB // 5)
        item = 4 if values[operator.inputs[2]].dtype == "float32" else 2
        return item * HEAD_ROWS * values[operator.inputs[1]].shape[1] + 3 * MIB // 2
    if target.startswith("tightfit.") and not target.startswith(PRODUCTS):
        return min(5 * 4 * BLOCK_ELEMENTS, 4 * touched)
    if "convolution" in target:
        return 7 * touched // 4
    return min(touched, 3 * MIB // 4)


def _attended(operator: Operator, values: Mapping[str, Value]) -> tuple[int, int, int, int, int]:
    """Of attention or its backward: tokens, tokens of a sample, heads, columns of the queries and of the keys."""
    backward = operator.target.endswith("backward")
    made = operator.outputs[0]
    if made is None or len(values[made].shape) != 2:
        raise InputError(
            f"operator {operator.target} of the profile makes no matrix like its queries; make the profile again"
        )
    # The queries themselves may lie head by head in their storage.
    tokens, queries = values[made].shape
    keys = math.prod(values[operator.inputs[2 if backward else 1]].shape) // tokens
    seq = values[operator.inputs[6 if backward else 3]].shape[0]
    return tokens, seq, operator.args[9 if backward else 6], queries, keys


def _touched(operator: Operator, values: Mapping[str, Value]) -> int:
    """Bytes read and written, each storage once; a table that rows are gathered from is not read as a whole."""
    names = [*operator.inputs, *filter(None, operator.outputs[: FLOAT32_INSIDE.get(operator.target)])]
    return sum(values[name].bytes for name in names if name not in operator.gathers)


def _made(operator: Operator, values: Mapping[str, Value]) -> int:
    return sum(values[name].bytes for name in operator.outputs if name is not None)


def _type(operator: Operator, values: Mapping[str, Value], kind: str) -> str:
    """The number type of the arithmetic: the narrowest floating-point type that goes in or comes out."""
    if kind == "cpu" and operator.target in FLOAT32_INSIDE:
        return "float32"
    types = {values[name].dtype for name in [*operator.inputs, *filter(None, operator.outputs)]}
    return next((name for name in NARROW if name in types), "float32")
