"""The executor in this process: schedules of one program set give the same bits, and those of plain PyTorch."""

from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from broken_plans import listed
from hypothesis import given
from hypothesis import strategies as st
from in_process import LazyChannel, make_training, random_records, train
from tiny_plans import decoder_profile, naive_plan

from tightfit.planner.instructions import read_all
from tightfit.runtime.engine.cpu.cpu import KERNELS
from tightfit.runtime.engine.kernels.compiled import compile_operator
from tightfit.runtime.engine.training.job import BLOCK, RUN, width
from tightfit.runtime.engine.training.storage import CHUNK
from tightfit.runtime.engine.weights.safetensors_file import SafetensorsReader
from tightfit.runtime.session.job_compiler import compile_job, hole

STEPS = 3


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return decoder_profile(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def records(tmp_path_factory, profile):
    return random_records(tmp_path_factory.mktemp("data"), seq=profile.seq)


def trained(plan, records, directory, channel=None):
    """Losses of a few steps and the bytes of adapter and optimizer state."""
    return train(plan, records, directory, STEPS, lr=1e-2, channel=channel)


def names(profile, kind):
    return [t.name for t in profile.tensors if t.kind == kind]


PLANS = {
    "spilled": lambda p: {
        "spill": [
            t.name for t in p.tensors if t.kind == "activation" and t.name.endswith("/out0") and "layers" in t.name
        ][:1]
    },
    "states offloaded": lambda p: {"offload": names(p, "trainable")[::2]},
    "recomputed": lambda p: {"recompute": True},
    "packed and unpacked": lambda p: {"packed": names(p, "weight")[1:5], "unpacked": names(p, "weight")[5:9]},
    "moved": lambda p: {"shift": 64 * 4099},
}


@pytest.fixture(scope="module")
def plain(profile, records, tmp_path_factory):
    return trained(naive_plan(profile), records, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("kind", PLANS)
def test_bits_do_not_depend_on_the_schedule(kind, profile, records, plain, tmp_path):
    plan = naive_plan(profile, **PLANS[kind](profile))
    assert trained(plan, records, tmp_path) == plain


def fetched_in_vain(plan):
    """The plan with a state that is fetched to where an operator is about to write, and freed unused."""
    instructions = listed(plan.train)
    sizes = {t.name: t.bytes for t in plan.tensors}
    state = next(i[1] for i in instructions if i[0] == "fetch")
    place = next(i for i, instruction in enumerate(instructions) if instruction[0] == "run")
    instructions[place:place] = [["fetch", state, instructions[place][3][0]], ["free", state]]
    assert sizes[state.partition(":")[2]] <= sizes[instructions[place + 2][1] + "/out0"]
    return plan.model_copy(update={"train": plan.train.model_copy(update={"instructions": read_all(instructions)})})


@pytest.mark.parametrize("kind", [*PLANS, "fetched in vain"])
def test_bits_do_not_depend_on_when_transfers_are_made(kind, profile, records, plain, tmp_path):
    """Whoever needs what a transfer moves waits for it, and so does who takes its memory."""
    if kind == "fetched in vain":
        plan = fetched_in_vain(naive_plan(profile, **PLANS["states offloaded"](profile)))
    else:
        plan = naive_plan(profile, **PLANS[kind](profile))
    assert trained(plan, records, tmp_path, LazyChannel()) == plain


def test_training_lowers_the_loss_of_one_batch(profile, records, tmp_path):
    training = make_training(naive_plan(profile), records, tmp_path, lr=1e-2)
    training.initialise()
    training.batches.training(0, training.inputs)
    training.batches.training = lambda step, inputs: None
    losses = [training.step(number) for number in range(1, 13)]
    training.close()
    assert losses[-1] < losses[0] - 0.05


def test_every_lora_b_moves_and_starts_at_zero(profile, records, tmp_path):
    from safetensors.torch import load_file

    training = make_training(naive_plan(profile), records, tmp_path, lr=1e-2)
    training.initialise()
    saved = []
    for step in (1, 2):
        folder = tmp_path / str(step)
        folder.mkdir()
        training.save_trained(str(folder))
        saved.append(load_file(folder / "adapter_model.safetensors"))
        training.step(step)
    before, after = saved
    training.close()
    for name, tensor in before.items():
        if ".lora_B." in name:
            assert not tensor.any(), name
            assert after[name].any(), name
        else:
            assert tensor.std() > 0.3 * tensor.shape[1] ** -0.5, name


def test_unaligned_offsets_are_refused(profile):
    from tightfit.runtime.common.errors import InputError

    for verb, operand, shift, wanted in (("run", 3, 4, 64), ("read", 2, 64, 4096)):
        plan = naive_plan(profile)
        instructions = listed(plan.train)
        one = next(i for i in instructions if i[0] == verb and (verb == "read" or i[3][0] is not None))
        if verb == "run":
            one[operand][0] += shift
        else:
            one[operand] += shift
        train = plan.train.model_copy(update={"instructions": read_all(instructions)})
        with pytest.raises(InputError, match=f"not a multiple of {wanted}"):
            compile_job(plan.model_copy(update={"train": train}), {})


def test_what_is_spilled_has_whole_blocks_of_its_own(profile):
    spilled = PLANS["spilled"](profile)["spill"]
    job = compile_job(naive_plan(profile, spill=spilled, offload=names(profile, "trainable")), {})
    kept = [number for number, extent in enumerate(job.extents) if extent >= 0]
    assert len(kept) == len(spilled) + 2 * len(names(profile, "trainable"))
    blocks = [
        block
        for number in kept
        for block in range(job.extents[number] // BLOCK, -(-(job.extents[number] + job.sizes[number]) // BLOCK))
    ]
    assert all(job.extents[number] % BLOCK == 0 for number in kept)
    assert sorted(blocks) == list(range(job.header["spill_bytes"] // BLOCK))


def test_tensors_larger_than_a_chunk_are_saved_and_loaded_whole(tmp_path, monkeypatch):
    profile = decoder_profile(tmp_path / "store", rank=64)
    data = random_records(tmp_path / "data", seq=profile.seq)
    plan = naive_plan(profile, offload=names(profile, "trainable")[1::2])  # of lora_B, which moves first
    saved = []
    for chunk in (CHUNK, 3 * BLOCK):
        monkeypatch.setattr("tightfit.runtime.engine.training.storage.CHUNK", chunk)
        monkeypatch.setattr(SafetensorsReader, "chunks", partialmethod(SafetensorsReader.chunks, size=chunk))
        folders = [tmp_path / f"{chunk} {when}" for when in ("first", "again")]
        for folder in folders:
            folder.mkdir()
        training = make_training(plan, data, tmp_path, lr=1e-2)
        training.initialise()
        training.step(1)
        state = training.save_state(str(folders[0]))
        training.step(2)
        training.load_state(str(folders[0]), state)
        assert training.save_state(str(folders[1])) == state
        training.close()
        saved.append(state)
    assert saved[0] == saved[1]
    assert max(t.bytes for t in profile.tensors if t.kind == "trainable") > 3 * BLOCK


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), max_size=6),
    st.integers(0, 300),
    st.integers(0, 63),
    st.randoms(use_true_random=False),
)
def test_the_hole_holds_nothing_that_stays_and_is_the_largest(residents, rest, odd, random):
    """Gaps and sizes in units of 64 bytes; the last tensor's size need not be whole ones."""
    taken, end = [], 0
    for gap, size in residents:
        taken.append((end + 64 * gap, end + 64 * (gap + size)))
        end += 64 * (gap + size)
    sizes = [stop - start for start, stop in taken]
    if taken:
        sizes[-1] -= odd
    places = [(str(i), start) for i, (start, _) in enumerate(taken)]
    if taken:  # one without bytes, inside of another
        places.append((str(len(taken)), taken[0][0]))
    random.shuffle(places)
    plan = SimpleNamespace(arena_bytes=end + 64 * rest, resident=dict(places))
    start, stop = hole(plan, {str(i): i for i in range(len(places))}, [*sizes, 0])
    free = set(range(0, end + 64 * rest - BLOCK + 1, BLOCK))
    for (low, _), size in zip(taken, sizes, strict=True):
        free -= {block for block in free if block < low + size and low < block + BLOCK}
    assert set(range(start, stop, BLOCK)) <= free
    longest = run = 0
    for block in range(0, end + 64 * rest, BLOCK):
        run = run + 1 if block in free else 0
        longest = max(longest, run)
    assert stop - start == longest * BLOCK


def test_what_is_read_and_what_it_becomes_lie_apart_in_a_hole_or_on_the_heap(profile, records, tmp_path):
    """A trainable's packed bytes may begin and end inside a page."""
    training = make_training(naive_plan(profile), records, tmp_path, lr=1e-2)
    trainable = training.trainables[0]
    size = training.job.sizes[trainable.value.number]
    packed = size + 2 * BLOCK
    both = 0
    for pages in range(2 * size // BLOCK + 6):
        start, end = 2 * BLOCK, (2 + pages) * BLOCK
        training.storage._hole = (start, end)
        places = [
            (tensor.data_ptr() - training.device.address, bytes_)
            for tensor, bytes_ in (
                (training.storage.room(packed), packed),
                (training.storage.temporary(trainable.value, trainable.shape), size),
            )
        ]
        inside = [(at, at + bytes_) for at, bytes_ in places if 0 <= at < training.header["arena_bytes"]]
        assert all(start <= at and stop <= end for at, stop in inside)
        assert len(inside) < 2 or inside[0][1] <= inside[1][0]
        both += len(inside) == 2
    training.close()
    assert both


def test_job_file_survives_the_disk(profile, tmp_path):
    from tightfit.runtime.engine.training.job import Job

    job = compile_job(naive_plan(profile), {"seed": 5})
    job.write(str(tmp_path / "job"))
    again = Job.read(str(tmp_path / "job"))
    assert again.train == job.train
    assert again.extents == job.extents
    assert again.header["seed"] == 5
    assert again.where == job.where
    assert again.weights == job.weights
    assert again.trainables == job.trainables


def test_job_words_are_walked_by_width(profile):
    job = compile_job(naive_plan(profile, offload=names(profile, "trainable")), {})
    place, count = 0, {}
    while place < len(job.train):
        count[job.train[place]] = count.get(job.train[place], 0) + 1
        place += width(job.train, place)
    assert place == len(job.train)
    programs = {program.name: program for program in profile.programs}
    every = [operator for layer in profile.layers for operator in programs[layer.program].operators]
    assert count[RUN] == sum(operator.phase != "inference" for operator in every)


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        ("aten.mm.default", ["x", "xt"], {}),
        ("aten.addmm.default", ["y", "x", "xt"], {"alpha": 2.0}),
        ("aten.mul.Scalar", ["x", 0.5], {}),
        ("aten.add.Tensor", ["x", "x"], {"alpha": 3}),
        ("aten._to_copy.default", ["x"], {"dtype": {"dtype": "bfloat16"}}),
        ("aten.clone.default", ["xt"], {"memory_format": {"memory_format": "contiguous_format"}}),
        ("aten.cat.default", [["x", "x"], 1], {}),
        ("aten.sum.dim_IntList", ["x", [1], True], {}),
        ("aten._softmax.default", ["x", -1, False], {}),
        ("aten.native_layer_norm.default", ["x", [16], None, None, 1e-5], {}),
        ("aten.max_pool2d_with_indices.default", ["image", [2, 2], [2, 2]], {}),
        ("aten.pow.Tensor_Scalar", ["x", {"float": "inf"}], {}),
    ],
)
def test_compiled_operators_equal_torch(target, args, kwargs):
    torch.manual_seed(0)
    tensors = {"x": torch.randn(8, 16), "y": torch.randn(8, 8), "image": torch.randn(1, 2, 4, 4)}
    windows = {
        "x": ("x", [8, 16], [16, 1]), "xt": ("x", [16, 8], [1, 16]), "y": ("y", [8, 8], [8, 1]),
        "image": ("image", [1, 2, 4, 4], [32, 16, 4, 1]),
    }  # fmt: skip

    def operand(item):
        if isinstance(item, list):
            return [operand(part) for part in item]
        if isinstance(item, str):
            value, size, stride = windows[item]
            return {"operand": {"value": value, "size": size, "stride": stride, "offset": 0}}
        return item

    def real(item):
        if isinstance(item, list):
            return [real(part) for part in item]
        if isinstance(item, str):
            value, size, stride = windows[item]
            return tensors[value].as_strided(size, stride)
        if isinstance(item, dict):
            return float(item["float"]) if "float" in item else getattr(torch, next(iter(item.values())))
        return item

    _, name, overload = target.split(".")
    packet = getattr(torch.ops.aten, name)
    expected = getattr(packet, overload)(*map(real, args), **{k: real(v) for k, v in kwargs.items()})
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    outputs = [f"out{index}" for index in range(len(expected))]
    values = {
        o: {"dtype": str(t.dtype)[6:], "shape": list(t.shape), "stride": list(t.stride())}
        for o, t in zip(outputs, expected)
    }
    found = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in expected]
    operator = {
        "target": target,
        "args": [operand(a) for a in args],
        "kwargs": kwargs,
        "outputs": outputs,
        "gathers": [],
    }
    compiled = compile_operator(operator, values, KERNELS)
    compiled.run(tensors, found)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    compiled.run(tensors, [found[0], *[None] * (len(found) - 1)] if compiled.partial else found)
    assert torch.equal(found[0], expected[0])
