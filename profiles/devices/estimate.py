"""Estimates operators' seconds and workspace on devices where nothing can be measured, by a roofline of FLOPs and
bytes.

Source of the model: Williams, Waterman and Patterson 2009, "Roofline". A profile made this way says so
(`DeviceFigures.measured` is False). An operator takes the longer of its arithmetic and its memory traffic, plus the
fixed cost of a call. On a CPU, tightfit's fused operators pass over their tensors more than once; how often was
measured once (`PASSES`, `EFFICIENCY`) and is assumed to be the same on every CPU.
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
    "tightfit.tile_attention": 15.0,
    "tightfit.tile_attention_backward": 15.0,
    "tightfit.rotary": 2.5,
    "tightfit.rotary_backward": 2.5,
    "tightfit.head_chunk": 2.6,
    "tightfit.table_head": 2.0,
    "tightfit.table_head_backward": 2.8,
    "tightfit.table_rows": 2.0,
    "tightfit.table_rows_backward": 0.6,
    "tightfit.lora_backward": 7.0,
    "tightfit.lora_down": 5.0,
    "tightfit.dora_norm": 9.0,
    "tightfit.dora_scale": 2.5,
    "tightfit.dora_scale_backward": 3.5,
    "tightfit.dropout": 1.5,
    "tightfit.dropout_lora_down": 7.5,
    "tightfit.dropout_lora_backward": 8.0,
}
"""Passes over memory per fused operator: its time, without its matrix products unless they are narrow, divided by the
time of an addition that touches as many bytes. Measured on Zen 4 with the shapes of Qwen2.5-0.5B and SmolLM2-135M;
norms, gates, attention and head were later scaled by how their times changed on Zen 5. Dropout, with a C compiler, on
one Zen 5 core with 256 x 896; DoRA's with the shapes of the same two models, 256 tokens and rank 8, on one core like
it; slices of trained tables on one core of Zen 4, 2048 x 576 and 1024 x 896 with 256 tokens, of which an embedding's
slice has one in 24.
"""
EFFICIENCY = {
    "tightfit.attention": 1.5,
    "tightfit.attention_backward": 1.45,
    "tightfit.tile_attention": 1.5,
    "tightfit.tile_attention_backward": 1.45,
    "tightfit.head_chunk": 1.0,
    "tightfit.dropout_projection_backward": 1.0,
    "tightfit.table_head": 1.0,
    "tightfit.table_head_backward": 1.0,
    "tightfit.experts": 0.5,
    "tightfit.experts_backward": 0.5,
    "tightfit.adapted_experts": 0.5,
    "tightfit.adapted_experts_backward": 0.5,
}
"""For operators whose matrix products and passes over memory do not overlap: the FLOP rate of their products divided by
that of one large product of the same dtype (measured like `PASSES`)."""
UNPACK_PASSES = {
    "q4": 3.5,
    "q4_zero": 3.5,
    "nf4": 3.5,
    "q8": 4.5,
    "int8": 3.8,
    "q5_0": 18.0,
    "q5_1": 18.0,
    "q2_k": 20.0,
    "q3_k": 20.0,
    "q4_k": 6.5,
    "q5_k": 7.0,
    "q6_k": 13.0,
    "mxfp4": 8.0,
    "float16": 2.0,
}
"""Time to unpack weights divided by that of an addition that touches as many bytes, by store format. That of q4 was
measured like `PASSES`; the others' follow from their time beside that of q4 for 1024 x 4096 elements to bfloat16 on one
core of an AMD EPYC. Formats that are not named are copied in one pass; a profile that states none is taken to be in
q4.
"""
UPDATE_PASSES = 7
"""Tensor-sized reads and writes of one AdamW update: reads parameter, gradient and two states; writes the parameter and
both states."""
SUM_PASSES = 3
"""Tensor-sized reads and writes to add a gradient to the sum over steps: reads gradient and sum, writes the sum."""
PRODUCTS = ("tightfit.projection", "tightfit.lora_")
"""Prefixes of operators that are matrix products and little else."""
FLOAT32_INSIDE = {
    "tightfit.attention": 2,
    "tightfit.attention_backward": 3,
    "tightfit.tile_attention": -1,
    "tightfit.tile_attention_backward": -1,
}
"""Operators that compute in float32 on a CPU whatever their inputs' dtype, with the index of the output that is their
float32 scratch. Traffic to the scratch is left out of the bytes they touch, because `PASSES` already includes it."""
TILES = {"tightfit.tile_attention": (1, 4), "tightfit.tile_attention_backward": (2, 9)}
"""Attention of a tile to the tiles before it -> the places of the arguments that are the keys of all tiles, and the
number of heads.
"""
TABLES = {"tightfit.table_head": (9, 3), "tightfit.table_head_backward": (11, 6)}
"""Operators of a trained head -> the place of the argument that says whether logits are rounded, and that of the output
that is their scratch.
"""
SLICES = {"tightfit.table_rows": 1, "tightfit.table_rows_backward": 1}
"""Operators of a trained embedding -> the place of the input that is a slice, of which few rows are read, or none."""
BLOCKS = {"tightfit.dora_norm": 1, "tightfit.dora_scale": 1, "tightfit.dora_scale_backward": 2}
"""Operators that go through their rows in blocks, with the index of the output that is the scratch for a block, which
stays in cache: traffic to it is left out of the bytes they touch.
"""
MIB = 1 << 20
NARROW = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")


def retarget(profile: Profile, on: DeviceDescription) -> Profile:
    """A copy of `profile`, itself measured or estimated on any device, re-estimated for the device `on`.

    Raises InputError if no operator of the profile states FLOPs: bytes alone do not determine the times.
    """
    if not any(operator.flops for program in profile.programs for operator in program.operators):
        what, way = (
            ("bare graph", f"leave the device out, or write a graph with its operators' seconds on {on.name}")
            if profile.model.is_bare_graph
            else ("profile of", "fill in `flops` of its operators, or profile the model with tightfit")
        )
        raise InputError(
            f"the {what} {profile.model.name} states no FLOPs, so its times on {on.name} cannot be estimated; {way}"
        )
    return estimate_profile(profile, on)


def estimate_profile(profile: Profile, on: DeviceDescription) -> Profile:
    """A copy of `profile` with the times, workspace, floor and channels of the device `on`.

    Workspace that was measured on a CPU is kept for another CPU; on a card workspace is 0, being part of the floor.
    """
    workspace_known = profile.device.kind == "cpu" and any(
        o.workspace_bytes for p in profile.programs for o in p.operators
    )
    digest = json.dumps([profile.fingerprint, on.model_dump(mode="json")], sort_keys=True)

    return profile.model_copy(
        update={
            "fingerprint": hashlib.sha256(digest.encode()).hexdigest(),
            "device": on.device(),
            "tensors": [estimate_tensor(tensor, on, profile.accumulate) for tensor in profile.tensors],
            "programs": [estimate_program(program, on, keep_workspace=workspace_known) for program in profile.programs],
        }
    )


def estimate_program(program: Program, on: DeviceDescription, *, keep_workspace: bool = False) -> Program:
    """A copy of `program` with estimated seconds, and unless `keep_workspace` estimated workspace bytes."""
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
    """A copy of `program` in which the scratch tensors of loss head and attention have the sizes that they have on the
    device.

    A trace made on that device would give the same sizes (`tightfit.runtime.engine.cpu.operators`,
    `tightfit.runtime.engine.cpu.attention`). On a card attention computes in the tensors' own dtype and needs no
    scratch, so that output shrinks to a single element.
    """
    from tightfit.runtime.engine.cpu.tables import HEAD_ROWS

    values = {value.name: value for value in program.values}
    operators = []
    for operator in program.operators:
        scratch = [values[name] for name in operator.outputs[1:] if name is not None]
        if operator.target == "tightfit.head_chunk" and len(scratch) == 2:
            narrow, wide = scratch
            rounded = on.narrow and narrow.dtype != "float32"
            shape = [wide.shape[0] if rounded else 1, wide.shape[1]]
            element_bytes = narrow.bytes // math.prod(narrow.shape)
            values[narrow.name] = narrow.model_copy(update={"shape": shape, "bytes": element_bytes * math.prod(shape)})
            operators.append(operator.model_copy(update={"args": [*operator.args[:5], rounded]}))
            continue
        if operator.target in TABLES:
            flag_index, scratch_index = TABLES[operator.target]
            logits = values[str(operator.outputs[scratch_index])]
            rounded = on.narrow and logits.dtype != "float32"
            shape = [values[operator.inputs[0]].shape[0] if rounded else 1, logits.shape[1]]
            shape[0] = min(shape[0], HEAD_ROWS)
            element_bytes = logits.bytes // math.prod(logits.shape)
            values[logits.name] = logits.model_copy(update={"shape": shape, "bytes": element_bytes * math.prod(shape)})
            args = [*operator.args[:flag_index], rounded, *operator.args[flag_index + 1 :]]
            operators.append(operator.model_copy(update={"args": args}))
            continue
        scratch_index = FLOAT32_INSIDE.get(operator.target, len(operator.outputs))
        if scratch_index < len(operator.outputs):
            name = operator.outputs[scratch_index]
            if name is not None:
                shape = _attention_scratch(operator, values)
                if on.kind == "cuda":
                    shape = [1] * len(shape)
                stride = [shape[-1], 1][-len(shape) :]
                update = {"shape": shape, "stride": stride, "bytes": 4 * math.prod(shape)}
                values[name] = values[name].model_copy(update=update)
        operators.append(operator)
    return program.model_copy(update={"values": list(values.values()), "operators": operators})


def estimate_tensor(tensor: Tensor, on: DeviceDescription, accumulate: int = 1) -> Tensor:
    """A copy of `tensor` with its time estimated: a weight's to unpack (packed bytes read, unpacked written), a
    trainable's to update.

    `accumulate` is the number of steps per update; the update time is the mean over them. Other kinds are returned as
    is.
    """
    if tensor.kind == "weight" and tensor.packed_bytes:
        passes = UNPACK_PASSES.get(tensor.packed_format or "q4", 1.0) if on.kind == "cpu" else 1.0
        seconds = passes * (tensor.packed_bytes + tensor.bytes) / on.bytes_per_second + on.call_seconds
        return tensor.model_copy(update={"unpack_seconds": seconds})
    if tensor.kind == "trainable":
        passes, calls = float(UPDATE_PASSES), 1.0
        if accumulate > 1:
            # Each step adds to the sum of gradients; an update also divides the sum by the steps before and zeroes it
            # afterwards.
            passes, calls = SUM_PASSES + (UPDATE_PASSES + 3) / accumulate, 1 + 3 / accumulate
        seconds = passes * tensor.bytes / on.bytes_per_second + calls * on.call_seconds
        # What clipping takes follows from it, by the bytes that are touched.
        unknown = dict.fromkeys(("perturb_seconds", "accumulate_seconds", "clipped_seconds", "adafactor_seconds"), 0.0)
        return tensor.model_copy(update={"update_seconds": seconds, **unknown})
    return tensor


def operator_seconds(operator: Operator, values: Mapping[str, Value], on: DeviceDescription) -> float:
    """Estimated seconds of one operator on the device `on`; `values` are its program's, by name.

    An operator that gathers rows from the store also pays for reading as many bytes as it outputs.
    """
    touched = _touched(operator, values)
    rate = on.flops_per_second.get(_type(operator, values, on.kind), on.flops_per_second["float32"])
    gather_seconds = _output_bytes(operator, values) / on.read.bytes_per_second if operator.gathers else 0.0
    fixed_seconds = gather_seconds + on.call_seconds
    if on.kind != "cpu":
        return max(operator.flops / rate, touched / on.bytes_per_second) + fixed_seconds
    memory_seconds = PASSES.get(operator.target, 1.0) * touched / on.bytes_per_second
    if operator.target in EFFICIENCY:
        return operator.flops / rate / EFFICIENCY[operator.target] + memory_seconds + fixed_seconds
    return max(operator.flops / rate, memory_seconds) + fixed_seconds


def operator_workspace(operator: Operator, values: Mapping[str, Value]) -> int:
    """Transient heap bytes of an operator on a CPU, from its shapes.

    tightfit's operators work in blocks of fixed size (`tightfit.runtime.engine.cpu.operators`), convolutions copy their
    windows into a matrix (im2col), and matrix products pack a panel. For the largest operators the estimate is 0 to
    70 % above what was measured for Qwen2.5-0.5B (1 × 256 and 1 × 1024 tokens), Qwen2.5-3B and SmolLM2-135M (16 × 64),
    and 2 to 50 % for those of a residual CNN. Attention's backward took 0.35 to 2.0 MiB there.
    """
    from tightfit.runtime.engine.cpu.attention import attention_scratch
    from tightfit.runtime.engine.cpu.dropout import ROOM_BYTES
    from tightfit.runtime.engine.cpu.gates import BLOCK_ELEMENTS
    from tightfit.runtime.engine.cpu.operators import STATE_COLUMNS
    from tightfit.runtime.engine.cpu.rotary import TURNED_ELEMENTS
    from tightfit.runtime.engine.cpu.tables import HEAD_ROWS

    target, touched = operator.target, _touched(operator, values)
    if target in TILES:
        return 3 * MIB // 2 if target.endswith("backward") else MIB // 4
    if target.startswith("tightfit.rotary"):
        return min(7 * MIB // 8, 4 * touched)
    if target in FLOAT32_INSIDE:
        if target.endswith("backward"):
            return 9 * MIB // 4
        tokens, seq, heads, queries, keys = _attended(operator, values)
        samples, _ = attention_scratch(tokens, seq, heads, queries, keys)
        rotary_elements = samples * seq * keys
        return 3 * MIB // 8 + 3 * min(rotary_elements, TURNED_ELEMENTS)
    if target == "tightfit.head_chunk":
        if values[operator.inputs[0]].shape[1] == STATE_COLUMNS:
            return min(touched, 2 * MIB // 5)
        element_bytes = 4 if values[operator.inputs[2]].dtype == "float32" else 2
        return element_bytes * HEAD_ROWS * values[operator.inputs[1]].shape[1] + 3 * MIB // 2
    if target in TABLES:
        backward = target.endswith("backward")
        tokens, width = values[operator.inputs[4 if backward else 2]].shape
        blocks = 0 if _type(operator, values, "cpu") == "float32" else 1 + backward
        extra_bytes = MIB if backward and blocks and tokens > HEAD_ROWS else 0
        return 2 * blocks * min(tokens, HEAD_ROWS) * width + (5 if backward else 3) * MIB // 8 + extra_bytes
    if target in SLICES:
        return 8 * min(BLOCK_ELEMENTS, math.prod(values[operator.inputs[0]].shape))
    if target.startswith("tightfit.dropout_"):
        return min(ROOM_BYTES + 3 * MIB // 4, 2 * touched)
    if target in BLOCKS:
        return min(touched, MIB // 16)
    if target.startswith("tightfit.") and not target.startswith(PRODUCTS):
        return min(5 * 4 * BLOCK_ELEMENTS, 4 * touched)
    if "convolution" in target:
        return 7 * touched // 4
    return min(touched, 3 * MIB // 4)


def _attention_scratch(operator: Operator, values: Mapping[str, Value]) -> list[int]:
    """Shape of the scratch of an attention operator or its backward on a CPU."""
    from tightfit.runtime.engine.cpu.attention import attention_scratch
    from tightfit.runtime.engine.cpu.tile_attention import tile_attention_scratch

    backward = operator.target.endswith("backward")
    if operator.target not in TILES:
        return list(attention_scratch(*_attended(operator, values), backward=backward))
    keys_at, heads_at = TILES[operator.target]
    tokens, columns = values[str(operator.outputs[0])].shape
    sizes = [key["operand"]["size"] for key in operator.args[keys_at]]
    longest = max(size[0] for size in sizes)
    heads = operator.args[heads_at]
    return [tile_attention_scratch(tokens, longest, heads, columns, sizes[0][1], backward=backward)]


def _attended(operator: Operator, values: Mapping[str, Value]) -> tuple[int, int, int, int, int]:
    """Sizes of an attention operator or its backward: (tokens, tokens per sample, heads, columns of queries, columns of
    keys).
    """
    backward = operator.target.endswith("backward")
    output = operator.outputs[0]
    if output is None or len(values[output].shape) != 2:
        raise InputError(
            f"operator {operator.target} of the profile makes no matrix like its queries; make the profile again"
        )
    # The output tells the queries' shape: the storage of the queries themselves may be laid out head by head.
    tokens, queries = values[output].shape
    keys = math.prod(values[operator.inputs[2 if backward else 1]].shape) // tokens
    seq = values[operator.inputs[6 if backward else 3]].shape[0]
    return tokens, seq, operator.args[10 if backward else 7], queries, keys


def _touched(operator: Operator, values: Mapping[str, Value]) -> int:
    """Bytes that the operator reads and writes, each storage once, without tables that it only gathers rows from."""
    slice_index = SLICES.get(operator.target, len(operator.inputs))
    inputs = [*operator.inputs[:slice_index], *operator.inputs[slice_index + 1 :]]
    scratch = FLOAT32_INSIDE.get(operator.target, BLOCKS.get(operator.target))
    names = [*inputs, *filter(None, operator.outputs[:scratch])]
    return sum(values[name].bytes for name in names if name not in operator.gathers)


def _output_bytes(operator: Operator, values: Mapping[str, Value]) -> int:
    return sum(values[name].bytes for name in operator.outputs if name is not None)


def _type(operator: Operator, values: Mapping[str, Value], kind: str) -> str:
    """The dtype that the operator computes in: the narrowest floating-point dtype among its inputs and outputs."""
    if kind == "cpu" and operator.target in FLOAT32_INSIDE:
        return "float32"
    types = {values[name].dtype for name in [*operator.inputs, *filter(None, operator.outputs)]}
    return next((name for name in NARROW if name in types), "float32")
