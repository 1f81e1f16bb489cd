"""Makes profiles without a model: decoder-like ones of any depth, and small random chains for exhaustive search."""

from __future__ import annotations

import random

from tightfit.profiles.schema import (
    Channel,
    DeviceFigures,
    Floor,
    Layer,
    Model,
    Operator,
    Profile,
    Program,
    Tensor,
    Value,
)

PAGE = 4096
MIB = 1 << 20
REAL = {"import_peak": 108 * MIB, "resident": 106 * MIB, "per_instruction": 200}
"""What the start of a real process takes, for `device`."""


def device(
    *,
    read=1e9,
    write=1e9,
    latency=1e-4,
    per_byte=5e-11,
    per_transfer=1e-5,
    import_peak=0,
    resident=0,
    per_instruction=0,
) -> DeviceFigures:
    cost = {"compute_seconds_per_byte": per_byte, "compute_seconds_per_transfer": per_transfer}
    return DeviceFigures(
        name="synthetic",
        kind="cpu",
        threads=2,
        measured=False,
        floor=Floor(import_peak_bytes=import_peak, resident_bytes=resident, instruction_bytes=per_instruction),
        read=Channel(bytes_per_second=read, latency_seconds=latency, **cost),
        write=Channel(bytes_per_second=write, latency_seconds=latency, **cost),
    )


class ProgramBuilder:
    """Builds a program: `value` adds a storage, `run` an operator."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[str, Value] = {}
        self.forward: list[Operator] = []
        self.backward: list[Operator] = []

    def value(self, name: str, size: int, kind: str = "activation") -> str:
        self.values.setdefault(name, Value(name=name, shape=[size], stride=[1], dtype="uint8", bytes=size, kind=kind))
        return name

    def run(self, target, inputs, outputs, seconds, *, phase="forward", workspace=0, recomputable=True):
        operators = self.forward if phase == "forward" else self.backward
        operators.append(
            Operator(
                target=target,
                phase=phase,
                args=[],
                inputs=inputs,
                outputs=outputs,
                seconds=seconds,
                workspace_bytes=workspace,
                recomputable=recomputable,
            )
        )

    def program(self) -> Program:
        return Program(name=self.name, values=list(self.values.values()), operators=[*self.forward, *self.backward])


def profile_of(programs, layers, tensors, loss, *, on=None, states=2, token_losses=None) -> Profile:
    return Profile(
        fingerprint="synthetic",
        model=Model(name="synthetic", source="synthetic", kind="module"),
        batch=1,
        compute_dtype="float32",
        optimizer={"name": "adamw", "state_tensors": states},
        device=on or device(),
        tensors=tensors,
        programs=programs,
        layers=layers,
        loss=loss,
        token_losses=token_losses,
    )


def decoder_like(
    layers: int, *, tokens=1024, hidden=576, ffn=1536, rank=8, slices=8, slice_rows=4096, flops=4e11, on=None
) -> Profile:
    """A profile like a LoRA decoder's: seven adapted weights per layer, attention with a second output, a head in row
    slices.
    """
    block = _block(tokens, hidden, ffn, rank, flops)
    head = ProgramBuilder("head")
    wide = tokens * hidden * 2
    head.value("x", wide)
    head.value("gx", wide, "gradient")
    head.value("labels", tokens * 8, "batch")
    state = head.value("state0", 4 * tokens * hidden)
    head.run("begin", ["x"], [state], wide / 1e10)
    for index in range(slices):
        head.value(f"w{index}", slice_rows * hidden * 2, "weight")
        following = head.value(f"state{index + 1}", 4 * tokens * hidden)
        seconds = 4 * tokens * hidden * slice_rows / flops
        head.run("chunk", [state, "x", f"w{index}", "labels"], [following], seconds, workspace=4 * MIB)
        state = following
    head.value("loss", 4)
    head.value("losses", tokens * 4)
    head.value("dx", wide)
    head.run("finish", [state], ["loss", "losses", "dx"], wide / 1e10)
    head.run("spread", ["dx"], ["gx"], wide / 1e10, phase="backward")
    stem = ProgramBuilder("stem")
    stem.value("ids", tokens * 8, "batch")
    stem.value("y", wide)
    stem.value("cos", tokens * 128)
    stem.run("embed", ["ids"], ["y"], 2e-4)
    stem.run("angles", [], ["cos"], 1e-5)
    tensors = [
        Tensor(name="ids", kind="batch", shape=[tokens], dtype="int64", bytes=tokens * 8),
        Tensor(name="labels", kind="batch", shape=[tokens], dtype="int64", bytes=tokens * 8),
    ]
    placed = [Layer(name="stem", program="stem", bindings={"ids": "ids", "y": "h0", "cos": "cos"})]
    for index in range(layers):
        bindings = {"x": f"h{index}", "y": f"h{index + 1}", "gy": f"g{index + 1}", "gx": f"g{index}", "cos": "cos"}
        for value in block.values:
            if value.kind in {"weight", "trainable", "constant"}:
                bindings[value.name] = f"layer{index}.{value.name}"
                tensors.append(_tensor(f"layer{index}.{value.name}", value))
            if value.name.startswith("grad:"):
                bindings[value.name] = f"grad:layer{index}.{value.name[5:]}"
        placed.append(Layer(name=f"layer{index}", program="block", bindings=bindings))
    bindings = {"x": f"h{layers}", "gx": f"g{layers}", "labels": "labels", "loss": "loss", "losses": "losses"}
    for value in head.values.values():
        if value.kind == "weight":
            bindings[value.name] = f"head.{value.name}"
            tensors.append(_tensor(f"head.{value.name}", value))
    placed.append(Layer(name="head", program="head", bindings=bindings))
    return profile_of([stem.program(), block, head.program()], placed, tensors, "loss", token_losses="losses", on=on)


USELESS = device().model_copy(update={"write": Channel(bytes_per_second=1e6, latency_seconds=0.05)})
"""A device whose disk takes longer for any write than a layer takes to run, so that offloading never pays."""


def deep(layers=10, *, on=USELESS, **changes):
    """A decoder-like profile whose layer inputs together are larger than all else that any layer's window holds."""
    return decoder_like(layers, **{"tokens": 256, "hidden": 96, "ffn": 192, "rank": 1, "slices": 2, "on": on} | changes)


def _tensor(name, value) -> Tensor:
    weight, trainable = value.kind == "weight", value.kind == "trainable"
    return Tensor(
        name=name,
        kind=value.kind,
        shape=value.shape,
        dtype=value.dtype,
        bytes=value.bytes,
        packed_bytes=-(-value.bytes * 5 // 16 // PAGE) * PAGE if weight else 0,
        unpack_seconds=value.bytes / 1.2e10 if weight else 0.0,
        update_seconds=value.bytes / 2e9 if trainable else 0.0,
    )


def _block(tokens, hidden, ffn, rank, flops) -> Program:
    made = ProgramBuilder("block")
    rate = 1.2e10

    def wide(columns):
        return tokens * columns * 2

    def linear(name, source, grad_source, columns_in, columns_out):
        """y = x W + (x A) B, and its backward: dx from W, dA and dB."""
        made.value(f"{name}.w", columns_in * columns_out * 2, "weight")
        made.value(f"{name}.a", rank * columns_in * 4, "trainable")
        made.value(f"{name}.b", rank * columns_out * 4, "trainable")
        made.value(f"{name}.p", wide(columns_out))
        made.value(f"{name}.a16", rank * columns_in * 2)
        made.value(f"{name}.b16", rank * columns_out * 2)
        made.value(f"{name}.u", wide(rank))
        made.value(f"{name}.y", wide(columns_out))
        big = 2 * tokens * columns_in * columns_out / flops
        small = 1e-5 + wide(max(columns_in, columns_out)) / rate
        made.run("mm", [source, f"{name}.w"], [f"{name}.p"], big)
        made.run("cast", [f"{name}.a"], [f"{name}.a16"], 1e-5)
        made.run("mm", [source, f"{name}.a16"], [f"{name}.u"], small)
        made.run("cast", [f"{name}.b"], [f"{name}.b16"], 1e-5)
        made.run("addmm", [f"{name}.p", f"{name}.u", f"{name}.b16"], [f"{name}.y"], small)

        def backward(grad):
            made.value(f"{name}.du", wide(rank), "gradient")
            made.value(f"grad:{name}.a", rank * columns_in * 4, "gradient")
            made.value(f"grad:{name}.b", rank * columns_out * 4, "gradient")
            made.value(grad_source, wide(columns_in), "gradient")
            made.run("mm", [grad, f"{name}.b16"], [f"{name}.du"], small, phase="backward")
            made.run("mm", [grad, f"{name}.u"], [f"grad:{name}.b"], small, phase="backward")
            made.run("mm", [f"{name}.du", source], [f"grad:{name}.a"], small, phase="backward")
            inputs = [grad, f"{name}.w", f"{name}.du", f"{name}.a16"]
            made.run("addmm", inputs, [grad_source], big + small, phase="backward")

        return f"{name}.y", backward

    def elementwise(target, inputs, output, columns, *, phase="forward", kind="activation"):
        made.value(output, wide(columns), kind)
        made.run(target, inputs, [output], (len(inputs) + 1) * wide(columns) / rate, phase=phase)
        return output

    made.value("x", wide(hidden))
    made.value("cos", tokens * 128)
    made.value("gy", wide(hidden), "gradient")
    made.value("n1", wide(hidden))
    made.value("r1", tokens * 4)
    made.value("norm1", hidden * 4, "constant")
    made.run("rms_norm", ["x", "norm1"], ["n1", "r1"], 2 * wide(hidden) / rate)
    q, q_back = linear("q", "n1", "gn_q", hidden, hidden)
    k, k_back = linear("k", "n1", "gn_k", hidden, hidden // 3)
    v, v_back = linear("v", "n1", "gn_v", hidden, hidden // 3)
    rq = elementwise("rope", [q, "cos"], "rq", hidden)
    rk = elementwise("rope", [k, "cos"], "rk", hidden // 3)
    made.value("att", wide(hidden))
    made.value("lse", tokens * 36)
    made.run("attention", [rq, rk, v], ["att", "lse"], 3e-4)
    o, o_back = linear("o", "att", "gatt", hidden, hidden)
    mid = elementwise("add", ["x", o], "mid", hidden)
    made.value("n2", wide(hidden))
    made.value("r2", tokens * 4)
    made.value("norm2", hidden * 4, "constant")
    made.run("rms_norm", [mid, "norm2"], ["n2", "r2"], 2 * wide(hidden) / rate)
    gate, gate_back = linear("gate", "n2", "gn_gate", hidden, ffn)
    up, up_back = linear("up", "n2", "gn_up", hidden, ffn)
    act = elementwise("gated", [gate, up], "act", ffn)
    down, down_back = linear("down", act, "gact", ffn, hidden)
    elementwise("add", [mid, down], "y", hidden)
    down_back("gy")
    made.value("ggate", wide(ffn), "gradient")
    made.value("gup", wide(ffn), "gradient")
    made.run("gated_backward", ["gact", gate, up], ["ggate", "gup"], 5 * wide(ffn) / rate, phase="backward")
    up_back("gup")
    gate_back("ggate")
    elementwise("add", ["gn_up", "gn_gate"], "gn2", hidden, phase="backward", kind="gradient")
    made.value("gn_mid", wide(hidden), "gradient")
    made.run("rms_norm_backward", ["gn2", mid, "norm2", "r2"], ["gn_mid"], 3 * wide(hidden) / rate, phase="backward")
    elementwise("add", ["gy", "gn_mid"], "gmid", hidden, phase="backward", kind="gradient")
    o_back("gmid")
    for name, columns in (("grq", hidden), ("grk", hidden // 3), ("gv", hidden // 3)):
        made.value(name, wide(columns), "gradient")
    made.run("attention_backward", ["gatt", rq, rk, v, "att", "lse"], ["grq", "grk", "gv"], 7e-4, phase="backward")
    elementwise("rope", ["grq", "cos"], "gq", hidden, phase="backward", kind="gradient")
    elementwise("rope", ["grk", "cos"], "gk", hidden // 3, phase="backward", kind="gradient")
    v_back("gv")
    k_back("gk")
    q_back("gq")
    elementwise("add", ["gn_v", "gn_k", "gn_q"], "gn1", hidden, phase="backward", kind="gradient")
    made.value("gn_x", wide(hidden), "gradient")
    made.run("rms_norm_backward", ["gn1", "x", "norm1", "r1"], ["gn_x"], 3 * wide(hidden) / rate, phase="backward")
    elementwise("add", ["gmid", "gn_x"], "gx", hidden, phase="backward", kind="gradient")
    return made.program()


def small_chain(seed: int, *, layers=2, weights=True, trainables=True, on=None, equal=False) -> Profile:
    """A profile of a few random layers of two or three operators each.

    Sizes are whole pages; some layers have a weight or a trainable. The same `seed` gives the same profile.
    """
    rng = random.Random(seed)
    programs, placed, tensors = [], [], []
    flow = [rng.randint(1, 3) * PAGE for _ in range(layers + 1)]
    if equal:
        flow = [flow[0]] * (layers + 1)
    shape = rng.getrandbits(32)
    for index in range(layers):
        own = random.Random(shape if equal else rng.getrandbits(32))
        last = index == layers - 1
        made = _small_layer(
            own,
            f"p{index}",
            flow[index],
            flow[index + 1],
            first=index == 0,
            last=last,
            weights=weights,
            trainables=trainables,
        )
        bindings = {"x": f"h{index}", "gx": f"g{index}", "y": f"h{index + 1}", "gy": f"g{index + 1}"}
        if last:
            bindings |= {"y": "loss"}
        if index == 0:
            bindings["x"] = "data"
        for value in made.values:
            if value.kind in {"weight", "trainable"}:
                bindings[value.name] = f"l{index}.{value.name}"
                tensors.append(_tensor(f"l{index}.{value.name}", value))
            if value.name.startswith("grad:"):
                bindings[value.name] = f"grad:l{index}.{value.name[5:]}"
        names = {value.name for value in made.values}
        programs.append(made)
        placed.append(
            Layer(name=f"l{index}", program=f"p{index}", bindings={k: v for k, v in bindings.items() if k in names})
        )
    tensors.append(Tensor(name="data", kind="batch", shape=[flow[0]], dtype="uint8", bytes=flow[0]))
    return profile_of(programs, placed, tensors, "loss", on=on)


def _small_layer(rng, name, wide_in, wide_out, *, first, last, weights, trainables) -> Program:
    """A layer y = f2(f1(x, w), x), where f2 may not read x, with backward operators that read some forward results."""
    made = ProgramBuilder(name)

    def pages(most=4):
        return rng.randint(1, most) * PAGE

    def seconds():
        return rng.randint(1, 9) * 1e-3

    made.value("x", wide_in, "batch" if first else "activation")
    made.value("a", pages())
    inputs = ["x"]
    weighted = weights and rng.random() < 0.8
    if weighted:
        made.value("w", 4 * PAGE, "weight")
        inputs.append("w")
    trained = trainables and rng.random() < 0.7
    if trained:
        made.value("t", pages(2), "trainable")
        inputs.append("t")
    made.run("f1", inputs, ["a"], seconds())
    made.value("b", pages())
    second = rng.random() < 0.5
    outputs = ["b"]
    if second:
        made.value("c", pages(2))
        outputs.append("c")
    made.run("f2", ["a", "x"] if rng.random() < 0.5 else ["a"], outputs, seconds())
    made.value("y", 4 if last else wide_out)
    made.run("f3", ["b"], ["y"], seconds())
    if not last:
        made.value("gy", wide_out, "gradient")
    made.value("gb", pages(), "gradient")
    start = ["y", "b"] if last else ["gy", "b"]
    made.run("b3", [*start, "c"] if second else start, ["gb"], seconds(), phase="backward")
    made.value("ga", pages(), "gradient")
    made.run("b2", ["gb", "a"], ["ga"], seconds(), phase="backward")
    if trained:
        made.value("grad:t", made.values["t"].bytes, "gradient")
        made.run("bt", ["ga", "x"], ["grad:t"], seconds(), phase="backward")
    if not first:
        made.value("gx", wide_in, "gradient")
        made.run(
            "b1", ["ga", *(["w"] if weighted else []), *(["t"] if trained else [])], ["gx"], seconds(), phase="backward"
        )
    return made.program()


SLICE = 2 * MIB
WIDE = MIB // 4
"""bytes of a slice of a table, and of what passes from one to the next"""


def tables(count: int = 5, *, movable: bool = True, in_layer: int = 1) -> Profile:
    """A step of `count` layers that each read and train `in_layer` slices of a table, below a layer with the loss."""
    made = ProgramBuilder("slices")
    made.value("before", WIDE)
    state = made.value("state0", WIDE)
    made.run("begin", ["before"], [state], 1e-4)
    for number in range(in_layer):
        made.value(f"t{number}", SLICE, "trainable")
        after = made.value("after" if number == in_layer - 1 else f"state{number + 1}", WIDE)
        made.run("rows", [state, f"t{number}"], [after], 2e-3, recomputable=False)
        state = after
    made.value("gafter", WIDE, "gradient")
    made.value("gbefore", WIDE, "gradient")
    for number in reversed(range(in_layer)):
        made.value(f"grad:t{number}", SLICE, "gradient")
        made.run("rows_backward", ["gafter", f"t{number}", "state0"], [f"grad:t{number}"], 3e-3, phase="backward")
    made.run("pass", ["gafter"], ["gbefore"], 1e-4, phase="backward")
    first = ProgramBuilder("first")
    first.value("ids", 4096, "batch")
    first.value("x", WIDE)
    first.run("zeros", ["ids"], ["x"], 1e-4)
    last = ProgramBuilder("last")
    last.value("y", WIDE)
    last.value("gy", WIDE, "gradient")
    last.value("loss", 4)
    last.run("loss", ["y"], ["loss"], 5e-3)
    last.run("loss_backward", ["y", "loss"], ["gy"], 5e-3, phase="backward")
    layers = [Layer(name="first", program="first", bindings={"ids": "ids", "x": "h0"})]
    tensors = [Tensor(name="ids", kind="batch", shape=[4096], dtype="uint8", bytes=4096)]
    for index in range(count):
        own = {"before": f"h{index}", "after": f"h{index + 1}", "gbefore": f"g{index}", "gafter": f"g{index + 1}"}
        for number in range(in_layer):
            name = f"table[{index}.{number}]"
            own |= {f"t{number}": name, f"grad:t{number}": f"grad:{name}"}
            tensors.append(
                Tensor(
                    name=name, kind="trainable", shape=[SLICE // 4], dtype="float32", bytes=SLICE, update_seconds=1e-3,
                    movable=movable,
                )
            )  # fmt: skip
        layers.append(Layer(name=f"slices.{index}", program="slices", bindings=own))
    layers.append(Layer(name="last", program="last", bindings={"y": f"h{count}", "gy": f"g{count}", "loss": "loss"}))
    programs = [first.program(), made.program(), last.program()]
    return profile_of(programs, layers, tensors, "loss", on=device(per_instruction=64))
