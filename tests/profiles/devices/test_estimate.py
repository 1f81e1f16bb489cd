"""Rooflines against figures worked out by hand, and profiles moved from one device to another."""

from __future__ import annotations

import json
import math

import pytest
from changed_operators import with_operators
from damage import CONFIG
from synthetic import decoder_like

from tightfit.planner.plan import plan
from tightfit.planner.report.explain import explain
from tightfit.profiles.api import profile
from tightfit.profiles.devices.data_sheets import FOLDER, DeviceDescription, find_device, known_devices
from tightfit.profiles.devices.estimate import (
    UNPACK_PASSES,
    estimate_program,
    estimate_tensor,
    operator_seconds,
    operator_workspace,
    retarget,
)
from tightfit.profiles.schema import Channel, Floor, Operator, Program, Tensor, Value
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import MIB
from tightfit.runtime.engine.weights.layout import QUANTISED
from tightfit.runtime.session.admission import check_machine

SOURCES = dict.fromkeys(
    ("memory_bytes", "flops_per_second", "bytes_per_second", "call_seconds", "floor", "read", "write"), "assumed: round"
)


def made_up(kind="cpu", **changes):
    """1 TFLOP/s in bfloat16, a tenth in float32, 10 GB/s, 1 µs per call."""
    channel = Channel(bytes_per_second=1e9, latency_seconds=1e-4)
    values = {
        "version": 1,
        "name": "made-up",
        "label": "round figures",
        "kind": kind,
        "threads": 2,
        "memory_bytes": 1 << 32,
        "flops_per_second": {"bfloat16": 1e12, "float32": 1e11},
        "bytes_per_second": 1e10,
        "call_seconds": 1e-6,
        "floor": Floor(import_peak_bytes=100 * MIB, resident_bytes=90 * MIB, instruction_bytes=50),
        "read": channel,
        "write": channel,
        "sources": SOURCES,
    }
    return DeviceDescription(**values | changes)


def values_of(**shapes):
    widths = {"bfloat16": 2, "float32": 4, "int64": 8}
    made = {}
    for name, (dtype, *shape) in shapes.items():
        size = widths[dtype]
        for extent in shape:
            size *= extent
        made[name] = Value(name=name, shape=shape, stride=[1] * len(shape), dtype=dtype, bytes=size, kind="activation")
    return made


def operator(target, inputs, outputs, flops=0.0, args=(), **more):
    return Operator(
        target=target, phase="forward", args=list(args), inputs=list(inputs), outputs=list(outputs), flops=flops, **more
    )


MATRICES = {"x": ("bfloat16", 256, 896), "w": ("bfloat16", 4864, 896), "y": ("bfloat16", 256, 4864)}


@pytest.mark.parametrize(
    ("kind", "shapes", "given", "seconds"),
    [
        # Arithmetic bounds: 2 * 256 * 896 * 4864 operations at 1 TFLOP/s, against 11.7 MB at 10 GB/s.
        ("cpu", MATRICES, operator("aten.mm.default", "xw", "y", 2.231369728e9), 2.231369728e-3 + 1e-6),
        # The same in float32 runs at a tenth.
        (
            "cpu",
            {k: ("float32", *v[1:]) for k, v in MATRICES.items()},
            operator("aten.mm.default", "xw", "y", 2.231369728e9),
            2.231369728e-2 + 1e-6,
        ),
        # Memory bounds: three tensors of 458752 bytes.
        (
            "cpu",
            dict.fromkeys("abc", ("bfloat16", 256, 896)),
            operator("aten.add.Tensor", "ab", "c"),
            1.376256e-4 + 1e-6,
        ),
        # Our gated product makes 3.7 passes on a CPU and one on a card.
        ("cpu", dict.fromkeys("guy", ("bfloat16", 100, 50)), operator("tightfit.gated", "gu", "y"), 3.7 * 3e-6 + 1e-6),
        ("cuda", dict.fromkeys("guy", ("bfloat16", 100, 50)), operator("tightfit.gated", "gu", "y"), 3e-6 + 1e-6),
        # Attention is float32 inside on a CPU, reaches 1.5 times its rate (it leaves out most of the future) and makes
        # 15 passes; on a card it runs in bfloat16.
        (
            "cpu",
            dict.fromkeys("qkvcy", ("bfloat16", 4, 4)),
            operator("tightfit.attention", "qkvc", "y", 1.5e8),
            1e-3 + 15 * 160 / 1e10 + 1e-6,
        ),
        (
            "cuda",
            dict.fromkeys("qkvcy", ("bfloat16", 4, 4)),
            operator("tightfit.attention", "qkvc", "y", 3.8e7),
            3.8e-5 + 1e-6,
        ),
        # The loss head's state is float32, its products are bfloat16; 2.6 passes over 84 bytes come after them.
        (
            "cpu",
            {"s": ("float32", 2, 3), "h": ("bfloat16", 2, 3), "w": ("bfloat16", 4, 3), "n": ("float32", 2, 3)},
            operator("tightfit.head_chunk", "shw", "n", 1e9),
            1e-3 + 2.6 * 84 / 1e10 + 1e-6,
        ),
        # Rows come from the disk (1 GB/s), the table itself is not read: 8000 bytes in ids, 2000000 made.
        (
            "cpu",
            {"t": ("bfloat16", 9999, 1000), "i": ("int64", 1000), "y": ("bfloat16", 1000, 1000)},
            operator("tightfit.embed_rows", "ti", "y", gathers=["t"]),
            2.008e-4 + 2e-3 + 1e-6,
        ),
    ],
)
def test_rooflines_by_hand(kind, shapes, given, seconds):
    assert operator_seconds(given, values_of(**shapes), made_up(kind)) == pytest.approx(seconds, rel=1e-12)


def test_a_type_without_a_rate_runs_as_float32():
    slow = made_up(flops_per_second={"float32": 1e11})
    found = operator_seconds(operator("aten.mm.default", "xw", "y", 1e9), values_of(**MATRICES), slow)
    assert found == pytest.approx(1e-2 + 1e-6)


def test_unpacking_and_updates_by_hand():
    weight = Tensor(name="w", kind="weight", shape=[100, 100], dtype="bfloat16", bytes=20_000, packed_bytes=6_000)
    assert estimate_tensor(weight, made_up()).unpack_seconds == pytest.approx(3.5 * 2.6e-6 + 1e-6)
    assert estimate_tensor(weight, made_up("cuda")).unpack_seconds == pytest.approx(2.6e-6 + 1e-6)
    for kind, passes in (("q6_k", 13.0), ("bfloat16", 1.0), ("float32", 1.0)):
        other = weight.model_copy(update={"packed_format": kind})
        assert estimate_tensor(other, made_up()).unpack_seconds == pytest.approx(passes * 2.6e-6 + 1e-6)
        assert estimate_tensor(other, made_up("cuda")).unpack_seconds == pytest.approx(2.6e-6 + 1e-6)
    assert set(QUANTISED) <= set(UNPACK_PASSES)
    trained = Tensor(name="p", kind="trainable", shape=[1000], dtype="float32", bytes=4_000)
    assert estimate_tensor(trained, made_up()).update_seconds == pytest.approx(7 * 4e-7 + 1e-6)
    batch = Tensor(name="b", kind="batch", shape=[8], dtype="int64", bytes=64)
    assert estimate_tensor(batch, made_up()) == batch


@pytest.mark.parametrize(
    ("given", "shapes", "measured"),
    [  # peak of the heap beyond inputs and outputs, as measured on two Zen 5 cores
        ("tightfit.attention", {"q": (256, 896), "k": (256, 128), "v": (256, 128), "c": (256, 32), "y": (256, 896)}, 0.35),
        ("tightfit.attention", {"q": (1024, 576), "k": (1024, 192), "v": (1024, 192), "c": (64, 32), "y": (1024, 576)}, 0.32),
        ("tightfit.attention_backward", {"d": (256, 896), "q": (256, 896), "k": (256, 128), "v": (256, 128), "a": (256, 896), "s": (1, 14, 256), "c": (256, 32), "y": (256, 896)}, 1.96),
        ("tightfit.head_chunk", {"s": (256, 899), "h": (256, 896), "w": (2048, 896), "y": (256, 899)}, 1.70),
        ("tightfit.head_chunk", {"s": (1024, 579), "h": (1024, 576), "w": (4096, 576), "y": (1024, 579)}, 1.48),
        ("tightfit.head_chunk", {"s": (256, 3), "h": (256, 896), "w": (2048, 896), "y": (256, 3)}, 0.26),
        ("tightfit.head_chunk", {"s": (1024, 3), "h": (1024, 576), "w": (4096, 576), "y": (1024, 3)}, 0.26),
        ("tightfit.projection", {"x": (256, 4864), "w": (896, 4864), "l": (256, 8), "y": (256, 896)}, 0.41),
        ("tightfit.lora_backward", {"d": (256, 4864), "x": (256, 896), "l": (256, 8), "y": (256, 8)}, 0.43),
        ("tightfit.dropout_lora_down", {"x": (256, 896), "a": (8, 896), "y": (256, 8)}, 0.60),
        ("tightfit.dropout_lora_down", {"x": (1024, 4096), "a": (8, 4096), "y": (1024, 8)}, 1.33),
        ("tightfit.dropout_lora_backward", {"d": (256, 896), "x": (256, 4864), "l": (256, 8), "y": (256, 8)}, 1.06),
        ("tightfit.dropout_projection_backward", {"d": (256, 896), "w": (896, 4864), "l": (256, 8), "y": (256, 4864)}, 0.93),
        ("tightfit.table_head", {"l": (256,), "o": (256,), "h": (256, 896), "w": (1024, 896), "y": (256,)}, 0.70),
        ("tightfit.table_head_backward", {"d": (256,), "n": (256,), "l": (256,), "m": (256,), "h": (256, 896), "w": (1024, 896), "y": (256,)}, 1.14),
        ("tightfit.table_head_backward", {"d": (1024,), "n": (1024,), "l": (1024,), "m": (1024,), "h": (1024, 576), "w": (2048, 576), "y": (1024,)}, 2.12),
        ("tightfit.table_rows", {"b": (256, 896), "w": (1024, 896), "i": (256,), "y": (256, 896)}, 1.31),
        ("tightfit.table_rows_backward", {"d": (1024, 576), "w": (2048, 576), "i": (1024,), "y": (2048, 576)}, 1.91),
        ("tightfit.rms_norm", {"x": (256, 896), "w": (896,), "y": (256, 896)}, 1.74),
    ],
)  # fmt: skip
def test_workspace_is_above_what_was_measured(given, shapes, measured):
    wide = {"s", "w"} if given == "tightfit.rms_norm" else {"s", "c"}
    values = values_of(**{n: ("float32" if n in wide else "bfloat16", *shape) for n, shape in shapes.items()})
    made = operator(given, list(shapes)[:-1], "y", args=[None] * 6 + [1] * 5)
    found = operator_workspace(made, values) / MIB
    assert measured <= found <= 2.1 * measured


def with_flops(profile, flops=1e9):
    """Every forward operator states so many FLOPs."""
    return with_operators(profile, lambda one: {"flops": flops if one.phase == "forward" else 0.0})


def test_a_profile_moves_to_another_device():
    here = with_flops(decoder_like(3, tokens=64, slices=2, slice_rows=256))
    there = made_up()
    moved = retarget(here, there)
    assert moved.device == there.device()
    assert not moved.device.measured
    assert moved.fingerprint != here.fingerprint
    assert [layer.name for layer in moved.layers] == [layer.name for layer in here.layers]
    for before, after in zip(here.programs, moved.programs, strict=True):
        values = {value.name: value for value in before.values}
        for old, new in zip(before.operators, after.operators, strict=True):
            assert new.seconds == operator_seconds(old, values, there)
            assert new == old.model_copy(update={"seconds": new.seconds, "workspace_bytes": new.workspace_bytes})
    # Times do not depend on where the profile came from, and a twice as fast device is twice as fast.
    assert retarget(moved, there).programs == moved.programs
    fast = made_up(flops_per_second={"bfloat16": 2e12, "float32": 2e11}, bytes_per_second=2e10, call_seconds=5e-7)
    twice = retarget(here, fast)
    for slow, quick in zip(moved.programs, twice.programs, strict=True):
        for old, new in zip(slow.operators, quick.operators, strict=True):
            assert new.seconds == pytest.approx(old.seconds / 2)


def test_measured_workspace_is_kept_on_a_cpu_and_dropped_on_a_card():
    here = with_flops(decoder_like(2, tokens=64, slices=2, slice_rows=256))
    first = here.programs[0]
    sized = [o.model_copy(update={"workspace_bytes": 12345 + i}) for i, o in enumerate(first.operators)]
    here = here.model_copy(update={"programs": [first.model_copy(update={"operators": sized}), *here.programs[1:]]})
    assert [o.workspace_bytes for o in retarget(here, made_up()).programs[0].operators] == [
        12345 + i for i in range(len(sized))
    ]
    card = retarget(here, made_up("cuda"))
    assert {o.workspace_bytes for p in card.programs for o in p.operators} == {0}


@pytest.mark.slow
def test_a_card_counts_its_context_and_says_estimated():
    card = find_device("rtx-4060")
    moved = retarget(with_flops(decoder_like(3, tokens=64, slices=2, slice_rows=256)), card)
    planned = plan(moved, 8 << 30, policy="keep-all")
    assert planned.peak_bytes > card.floor.resident_bytes == planned.floor_bytes
    assert (planned.device.kind, planned.device.measured) == ("cuda", False)
    small = plan(moved, card.floor.resident_bytes, policy="mebp")
    assert small.status == "infeasible"
    assert small.minimum_budget_bytes > card.floor.resident_bytes


def test_without_flops_nothing_can_be_told():
    with pytest.raises(InputError, match="the profile of synthetic states no FLOPs, so its times on made-up cannot"):
        retarget(decoder_like(2, tokens=64, slices=2, slice_rows=256), made_up())


# --- descriptions -----------------------------------------------------------------------------------------------------


def test_every_known_device_is_whole_and_found_by_its_name():
    devices = known_devices()
    assert [device.name for device in devices] == sorted(path.stem for path in FOLDER.glob("*.json"))
    assert {
        "zen5-2core",
        "zen4-2core",
        "zen3-2core",
        "amx-2core",
        "phone",
        "raspberry-pi-5",
        "h100",
        "rtx-4090",
        "rtx-4060",
    } <= {device.name for device in devices}
    for device in devices:
        assert find_device(device.name) == device
        assert device.floor.resident_bytes < device.memory_bytes
        # No figure is off by a power of ten: arithmetic per byte of memory traffic lies between 1 and 1000.
        assert 1 < max(device.flops_per_second.values()) / device.bytes_per_second < 1000


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError) as caught:
        find_device("h200")
    assert str(caught.value).startswith(
        "no device is called 'h200'; choose cpu (this machine, measured), one of amx-2core,"
    )
    assert "rtx-4090" in str(caught.value)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "MPS"])
def test_a_gpu_is_refused_for_what_it_is(name):
    with pytest.raises(InputError, match=f"nothing runs on '{name}' yet: .*for a GPU it only plans"):
        find_device(name)


def test_a_description_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(made_up().model_dump_json())
    assert find_device(str(path)) == made_up()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": SOURCES | {"read": "somewhere"}}, "sources does not say where read come from"),
        ({"flops_per_second": {"bfloat16": 1e12}}, "flops_per_second needs float32, and every rate above 0"),
        ({"flops_per_second": {"float32": 0.0}}, "flops_per_second needs float32, and every rate above 0"),
        ({"kind": "tpu"}, "field kind: Input should be 'cpu' or 'cuda'"),
        ({"bytes_per_second": 0}, "field bytes_per_second: Input should be greater than 0"),
        ({"colour": 1}, "field colour: Extra inputs are not permitted"),
        ({"version": 2}, "field version: Input should be 1"),
    ],
)
def test_a_wrong_description_names_the_field(tmp_path, change, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(made_up().model_dump(mode="json") | change))
    with pytest.raises(InputError) as caught:
        find_device(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("{", "not JSON"), ("[]", "valid dictionary")])
def test_what_is_no_description(tmp_path, text, message):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        find_device(str(path))


@pytest.mark.slow
def test_a_model_is_profiled_for_a_device_that_is_not_here(tmp_path, monkeypatch):
    from tightfit.profiles import api

    def nothing(*args, **options):
        raise AssertionError("an estimate measures nothing and packs no weights")

    monkeypatch.setattr(api, "measure", nothing)
    monkeypatch.setattr(api, "stored_weights", nothing)
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    made = profile(str(tmp_path / "config.json"), seq=16, batch=2, device="raspberry-pi-5")
    board = find_device("raspberry-pi-5")
    assert made.device == board.device()
    assert (made.batch, made.seq, made.model.store, made.device.torch_version) == (2, 16, None, None)
    for program in made.programs:
        values = {value.name: value for value in program.values}
        for op in program.operators:
            assert op.seconds == operator_seconds(op, values, board) >= board.call_seconds
            assert op.workspace_bytes == operator_workspace(op, values)
    assert all(tensor.unpack_seconds > 0 for tensor in made.tensors if tensor.kind == "weight")
    assert all(tensor.update_seconds > 0 for tensor in made.tensors if tensor.kind == "trainable")
    assert not list(tmp_path.glob("cache/profiles/*"))
    planned = plan(made, 1 << 30, policy="checkpoint-layers")
    assert "times are estimated, not measured" in "\n".join(explain(planned))
    with pytest.raises(InputError, match="estimated for raspberry-pi-5, not measured on this machine"):
        check_machine(planned)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "rows"), [("zen3-2core", 1), ("zen4-2core", 8)])
def test_the_head_has_scratch_for_bfloat16_where_the_device_multiplies_it(tmp_path, device, rows):
    """Whatever the machine that traces does: 2 samples of 4 tokens in bfloat16, each chunk's second output."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    made = profile(str(tmp_path / "config.json"), seq=4, batch=2, device=device)
    for other in ("zen4-2core", "zen3-2core"):
        moved = retarget(profile(str(tmp_path / "config.json"), seq=4, batch=2, device=other), find_device(device))
        for one in (made, moved):
            assert {(shape[0], size // math.prod(shape), rounded) for shape, size, rounded in scratch(one)} == {
                (rows, 2, rows > 1)
            }


@pytest.mark.slow
def test_attention_has_scratch_where_the_device_needs_it(tmp_path):
    """On a CPU float32 copies and scores of 2 samples of 4 tokens; a card attends in bfloat16, and what was planned for
    one comes back for a CPU.
    """
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    on_card = profile(str(tmp_path / "config.json"), seq=4, batch=2, device="rtx-4060")
    on_cpu = profile(str(tmp_path / "config.json"), seq=4, batch=2, device="zen4-2core")
    due = attention_scratches(on_cpu)
    width = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    heads, q, k = CONFIG["num_attention_heads"], CONFIG["hidden_size"], width * CONFIG["num_key_value_heads"]
    assert due == {
        ("attention", 2, 4 * (width + 4 + 2 * k + 2 * q + 4 * heads), 4),
        ("attention_backward", 2, 4 * (width + 4 + 4 * k + 3 * q + 8 * heads), 4),
    }
    assert attention_scratches(on_card) == {("attention", 1, 1, 4), ("attention_backward", 1, 1, 4)}
    assert attention_scratches(retarget(on_card, find_device("zen4-2core"))) == due


def attention_scratches(made):
    """(operator, rows, columns, bytes of a number) of all programs"""
    found = set()
    for program in made.programs:
        values = {value.name: value for value in program.values}
        for op in program.operators:
            if "attention" in op.target:
                last = values[op.outputs[-1]]
                found.add((op.target.removeprefix("tightfit."), *last.shape, last.bytes // math.prod(last.shape)))
    return found


def scratch(made):
    """(shape, bytes, whether products are rounded) of every chunk of the loss head"""
    for program in made.programs:
        values = {value.name: value for value in program.values}
        for op in program.operators:
            if op.target == "tightfit.head_chunk":
                yield values[op.outputs[1]].shape, values[op.outputs[1]].bytes, op.args[5]


def test_threads_belong_to_the_description():
    with pytest.raises(InputError, match="threads 2: the figures of phone are for 4; leave it out"):
        profile("config.json", device="phone", threads=2)


@pytest.mark.parametrize("device", ["zen4-2core", "rtx-4060"])
def test_attention_of_tiles_has_scratch_and_time_of_the_device(device):
    """A tile of 4 tokens with 2 heads of 8 columns and 1 key head, the tile before it of 6 tokens."""
    names = {"q": [4, 16], "k0": [6, 8], "k1": [4, 8], "y": [4, 16], "lse": [2, 4], "s": [9999]}
    made = tile_program(names)
    on = find_device(device)
    estimated = estimate_program(made, on)
    shapes = {value.name: value.shape for value in estimated.values}
    block, piece = 4, 6
    due = 2 * piece * 8 + 2 * block * 16 + 3 * block * piece
    assert shapes["s"] == ([due] if on.kind == "cpu" else [1])
    assert {value.name: value.bytes for value in estimated.values}["s"] == 4 * math.prod(shapes["s"])
    (operator,) = estimated.operators
    assert operator.seconds > 0
    assert (operator.workspace_bytes > 0) == (on.kind == "cpu")


def tile_program(shapes):
    """One `tile_attention` on tensors of these shapes, in bfloat16 but for its last two outputs."""
    values = []
    for name, shape in shapes.items():
        dtype, size = ("float32", 4) if name in {"lse", "s"} else ("bfloat16", 2)
        stride = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        values.append(
            Value(
                name=name,
                shape=shape,
                stride=stride,
                dtype=dtype,
                bytes=size * math.prod(shape),
                kind="activation",
            )
        )

    def operand(name):
        return {"operand": {"value": name, "size": shapes[name], "stride": [shapes[name][1], 1], "offset": 0}}

    keys = [operand("k0"), operand("k1")]
    operator = Operator(
        target="tightfit.tile_attention",
        phase="forward",
        args=[operand("q"), keys, keys, None, 2, 1, 0.3, 0],
        inputs=["q", "k0", "k1"],
        outputs=["y", "lse", "s"],
        flops=1e6,
    )
    return Program(name="tiles", values=values, operators=[operator])
