"""The recorded step is the simulator's: its moments, transfers and bytes are those of the replay that states peak and
seconds.
"""

from __future__ import annotations

import pytest
from bare_graphs import graph_of
from hand_schedule import EVALUATE, OPERATORS, TRAIN, page, written
from small_steps import SMALL_STEPS, small_step

from tightfit.planner.instructions import Fetch, Free, Read, Run, Spill, Unpack
from tightfit.planner.plan import plan as solve
from tightfit.planner.simulation.recording import record
from tightfit.planner.simulation.replay import LINE
from tightfit.planner.simulation.simulate import simulate


@pytest.fixture(scope="module", params=SMALL_STEPS)
def plan(request):
    return small_step(request.param)


@pytest.fixture(scope="module")
def recording(plan):
    return record(plan)


def test_every_moment_that_was_counted_by_hand():
    """`hand_schedule` counts them in milliseconds, in its comments."""
    plan = written(OPERATORS, TRAIN, EVALUATE, arena=page(10) + LINE, optimizer={"name": "adamw", "state_tensors": 2})
    recording = record(plan)
    ms = [round(1e3 * moment, 6) for moment in recording.end]
    assert ms == [
        0.375, 4.375, 6, 6, 7.5, 9.5, 24, 24.5, 37, 40, 41, 41, 41, 41.375, 41.75, 51.5, 52.5, 53.5, 53.5, 61.5, 71.5, 71.5, 72.5
    ]  # fmt: skip
    begun = [round(1e3 * moment, 6) for moment in recording.begin]
    waits = {index: begun[index] - before for index, before in enumerate([0.0, *ms[:-1]]) if begun[index] > before}
    assert waits == {2: 0.625, 6: 14.5, 8: 8.5, 15: 9.25, 19: 8, 20: 10}
    assert [index for index, again in enumerate(recording.again) if again] == [8]
    transfers = [(one.instruction, round(1e3 * one.begin, 6), round(1e3 * one.end, 6)) for one in recording.transfers]
    assert transfers == [
        (0, 0, 5), (4, 6, 24), (7, 24, 33), (13, 41, 46), (14, 46, 51), (16, 51.5, 61.5), (17, 61.5, 71.5), (22, 71.5, 81.5)
    ]  # fmt: skip
    assert round(1e3 * recording.seconds, 6) == 81.5
    assert recording.workspace[1] == recording.workspace[8] == 5000
    assert recording.came[:3] == [(-1, "x"), (-1, "t"), (0, "packed:w")]
    assert (6, "l/a") in recording.went
    assert (7, "l/a") in recording.came


def test_its_seconds_are_the_simulators(plan, recording):
    simulated = simulate(plan).train
    instructions = plan.train.instructions
    assert recording.seconds == simulated.seconds
    works = [end - begin for begin, end in zip(recording.begin, recording.end)]
    assert len(works) == len(recording.again) == len(instructions)
    again = sum(work for work, repeated in zip(works, recording.again) if repeated)
    assert again == pytest.approx(simulated.recompute_seconds)
    unpacking = sum(work for work, entry in zip(works, instructions) if isinstance(entry, Unpack))
    assert unpacking == pytest.approx(simulated.unpack_seconds)
    waits = [begin - before for begin, before in zip(recording.begin, [0.0, *recording.end])]
    assert min(waits) >= 0
    assert sum(waits) + recording.seconds - recording.end[-1] == pytest.approx(simulated.stall_seconds, abs=1e-12)
    assert sum(works) == pytest.approx(
        simulated.compute_seconds + simulated.recompute_seconds + simulated.unpack_seconds
    )


def test_transfers_follow_each_other_on_the_disk_and_nobody_waits_for_one_that_has_ended(plan, recording):
    instructions, device = plan.train.instructions, plan.device
    assert Read in {type(instructions[transfer.instruction]) for transfer in recording.transfers}
    moving = [index for index, entry in enumerate(instructions) if isinstance(entry, Read | Fetch | Spill)]
    assert [transfer.instruction for transfer in recording.transfers] == moving
    for before, after in zip(recording.transfers, recording.transfers[1:]):
        assert after.begin >= before.end
    for transfer in recording.transfers:
        # It begins when it is asked for, or when the disk is done with what was asked before.
        assert transfer.begin >= recording.begin[transfer.instruction]
        channel = device.write if isinstance(instructions[transfer.instruction], Spill) else device.read
        assert transfer.end - transfer.begin >= channel.latency_seconds
    # An unpacking begins once its weight has been read.
    landed = {
        instructions[transfer.instruction].weight: transfer.end
        for transfer in recording.transfers
        if isinstance(instructions[transfer.instruction], Read)
    }
    unpacked = [(entry.weight, index) for index, entry in enumerate(instructions) if isinstance(entry, Unpack)]
    assert unpacked
    first = {}
    for weight, index in unpacked:
        first.setdefault(weight, index)
    assert any(weight in landed for weight in first)


def test_what_comes_goes_or_stays(plan, recording):
    lying = set()
    events = sorted(
        [(index, 1, name) for index, name in recording.came] + [(index, 0, name) for index, name in recording.went]
    )
    for _, comes, name in events:
        assert (name in lying) != bool(comes), name
        lying ^= {name}
    assert lying == set(plan.resident)
    freed = [index for index, entry in enumerate(plan.train.instructions) if isinstance(entry, Free)]
    assert [index for index, _ in recording.went] == freed


def test_a_bare_graph_counted_by_hand():
    """a (100 bytes) and b (300) are made, a is no longer needed, c (200) is made of b."""
    profile = graph_of(
        [
            {"name": name, "seconds": seconds, "output_bytes": size, "inputs": inputs}
            for name, seconds, size, inputs in (("a", 1.0, 100, []), ("b", 2.0, 300, ["a"]), ("c", 4.0, 200, ["b"]))
        ]
    )
    plan = solve(profile, 10_000, policy="keep-all")
    recording = record(plan)
    runs = [index for index, entry in enumerate(plan.train.instructions) if isinstance(entry, Run)]
    assert [recording.begin[index] for index in runs] == [0.0, 1.0, 3.0]
    assert [recording.end[index] for index in runs] == [1.0, 3.0, 7.0]
    assert recording.seconds == 7.0
    assert [name for _, name in recording.came] == ["a", "b", "c"]
    assert not any(recording.again)
    assert recording.transfers == []
