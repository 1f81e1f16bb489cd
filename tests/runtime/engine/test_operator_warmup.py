"""Kernels are made before anything is loaded: every operator of the schedules runs once, on zeros."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
from broken_plans import listed
from in_process import make_training, random_records
from tiny_plans import decoder_profile, naive_plan

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.cpu import Cpu
from tightfit.runtime.engine.device.device import aligned
from tightfit.runtime.engine.device.meter import Meter
from tightfit.runtime.engine.start import process
from tightfit.runtime.engine.training.executor import bind
from tightfit.runtime.engine.training.job import BEGINS_AT, TILES_AT, operators_run, program_headers
from tightfit.runtime.engine.training.operator_warmup import warm_up_operators


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return decoder_profile(tmp_path_factory.mktemp("store"))


@pytest.fixture
def prepared(profile, tmp_path, monkeypatch):
    """A training, and the operators and the arena that it rehearses with."""
    given = []
    monkeypatch.setattr(
        "tightfit.runtime.engine.training.trainer.warm_up_operators",
        lambda operators, arena: given.extend((list(operators), arena)),
    )
    training = make_training(naive_plan(profile), random_records(tmp_path, seq=profile.seq), tmp_path, lr=1e-2)
    yield training, *given
    training.close()


def headers(profile):
    return program_headers(program.model_dump() for program in profile.programs)


def calls(operators):
    """How often each is called from now on."""
    counted = Counter()

    def counting(operator, call):
        def counted_call(outputs):
            counted[id(operator)] += 1
            call(outputs)

        return counted_call

    for operator in operators:
        operator.call = counting(operator, operator.call)
    return counted


def test_every_operator_of_the_schedules_runs_once_on_zeros(profile, prepared):
    training, operators, arena = prepared
    plan = naive_plan(profile)
    layers = {layer.name: layer.program for layer in plan.layers}
    numbers = {program.name: number for number, program in enumerate(plan.programs)}
    wanted = {
        (numbers[layers[instruction[1]]], instruction[2])
        for phase in (plan.train, plan.evaluate)
        for instruction in listed(phase)
        if instruction[0] == "run"
    }
    assert operators_run(training.job) == wanted
    assert len(operators) == len(wanted)
    counted = calls(operators)
    reads = []
    for operator in operators:
        call = operator.call
        operator.call = lambda outputs, call=call, operator=operator: (
            reads.extend(bool(read.tensor.any()) for read in operator.reads),
            call(outputs),
        )
    arena.release()
    warm_up_operators(operators, arena)
    gathering = [operator for operator in operators if operator.gathers]
    assert gathering
    called = [operator for operator in operators if not operator.gathers and operator.name not in BEGINS_AT]
    chunks = [operator for operator in operators if operator.name in BEGINS_AT]
    assert counted == {id(operator): 1 for operator in [*called, *first_of_each_size(chunks)]}
    assert len(reads) > len(called)
    assert not any(reads)
    assert not arena.bytes.any()


def first_of_each_size(operators):
    sizes = {}
    for operator in operators:
        key = operator.name, *((read.size, read.stride) for read in operator.reads)
        sizes.setdefault(key, operator)
    return list(sizes.values())


def warmed(profile, size):
    """(operators that are different ones, how often those of each name were called by the tiles that they attend to) in
    an arena of so many bytes.
    """
    device = Cpu(size, Meter(1 << 60))
    operators = {o.call: o for bound in bind(headers(profile), device, None) for o in bound}.values()
    counted = Counter()

    def counting(operator, call):
        def counted_call(outputs):
            counted[operator.name, tiles_of(operator)] += 1
            call(outputs)

        return counted_call

    for operator in operators:
        operator.call = counting(operator, operator.call)
    warm_up_operators(operators, device)
    return operators, counted


def tiles_of(operator):
    """The tiles that an operator attends to; 0: it does nothing of the kind."""
    return len(operator.reads[0].container[TILES_AT[operator.name]]) if operator.name in TILES_AT else 0


def tiles_called(counted, name):
    return {tiles for called, tiles in counted if called == name}


def side_by_side(operator):
    """Bytes of an operator's tensors in the arena, side by side."""
    views = [*operator.reads, *filter(None, operator.writes)]
    sizes = Counter()
    for view in views:
        sizes[view.place] = max(sizes[view.place], aligned(view.bytes))
    return sizes.total()


@pytest.mark.slow
def test_of_equal_products_one_is_made_and_all_have_their_views(tmp_path):
    """Views stay, so that what they take is there before anything is loaded. Attention to three tiles makes the
    products of that to two.
    """
    operators, counted = warmed(decoder_profile(tmp_path, batch=1, seq=40, tile=8), 1 << 24)
    forward, backward = TILES_AT
    assert tiles_called(counted, forward) == {1, 2}
    # The backward of the last tile, which attends to all five, is without sums; of the others that of four comes first.
    assert tiles_called(counted, backward) == {1, 4, 5}
    assert sum(count for (name, _), count in counted.items() if name in BEGINS_AT) == len(
        first_of_each_size([operator for operator in operators if operator.name in BEGINS_AT])
    )
    for operator in operators:
        if not operator.gathers:
            assert all(view.tensor is not None for view in [*operator.reads, *filter(None, operator.writes)])


def test_an_operator_without_room_leaves_its_products_to_one_that_has_it(tmp_path):
    """Attention to four tiles does not fit side by side: that to three makes the same products."""
    profile = decoder_profile(tmp_path, batch=1, seq=40, tile=8)
    backward = list(TILES_AT)[1]
    operators, _ = warmed(profile, 1 << 24)
    longest = next(operator for operator in operators if operator.name == backward and tiles_of(operator) == 4)
    _, counted = warmed(profile, side_by_side(longest) - 1)
    assert tiles_called(counted, backward) == {1, 3}


def test_an_operator_that_the_arena_has_no_room_for_is_left_to_its_step(profile):
    operators = [operator for bound in bind(headers(profile), Cpu(64, Meter(1 << 60)), None) for operator in bound]
    counted = calls(operators)
    warm_up_operators(operators, Cpu(0, Meter(1 << 60)))
    assert not counted


def test_an_operator_that_cannot_run_is_told():
    window = {"operand": {"value": "x", "size": [2, 3], "stride": [3, 1]}}
    value = {"name": "x", "dtype": "float32", "shape": [2, 3], "stride": [3, 1]}
    operator = {"target": "aten.mm.default", "args": [window, window], "kwargs": {}, "outputs": ["x"], "gathers": []}
    arena = Cpu(1 << 12, Meter(1 << 60))
    (operators,) = bind(program_headers([{"values": [value], "operators": [operator]}]), arena, None)
    with pytest.raises(InputError, match=r"operator aten\.mm\.default is not supported \(mat1 and mat2 shapes"):
        warm_up_operators(operators, arena)


def test_buffers_lie_apart_for_as_long_as_is_said():
    code = """
import ctypes, json, pathlib
from tightfit.runtime.engine.start.process import apart
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def in_heap(size):
    line = next(line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
    low, high = (int(end, 16) for end in line.split()[0].split("-"))
    return low <= libc.malloc(ctypes.c_size_t(size)) < high

with apart(320 << 10):
    inside = [in_heap(size) for size in (300 << 10, 400 << 10)]
print(json.dumps([*inside, in_heap(400 << 10)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=process.child_environment(1), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [True, False, True]


@pytest.mark.slow
def test_a_second_rehearsal_leaves_nothing_behind(tmp_path):
    """All that is kept is made by the first."""
    code = """
import gc, json, sys
from tightfit.runtime.engine.start import lean_torch
lean_torch.load()
from tightfit.runtime.engine.start.kernel_warmup import prepare
prepare()
from tightfit.runtime.engine.cpu.cpu import Cpu
from tightfit.runtime.engine.device.meter import Meter
from tightfit.runtime.engine.training.executor import bind
from tightfit.runtime.engine.start.process import trim_heap
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.training.operator_warmup import warm_up_operators
device = Cpu(1 << 28, Meter(1 << 60))
operators = [operator for bound in bind(json.load(sys.stdin), device, None) for operator in bound]
held = []
for _ in range(3):
    warm_up_operators(operators, device)
    gc.collect()
    trim_heap()
    held.append(memory().anonymous)
print(json.dumps(held))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(headers(decoder_profile(tmp_path))),
        env=process.child_environment(2),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, _, third = json.loads(done.stdout)
    assert third - first < 100_000
