from __future__ import annotations

import pytest
from rich.console import Console
from sample_fleets import sample_fleet, sample_member, sample_replica

from tightfit.planner.fleet.schema import Baseline
from tightfit.planner.report.fleet_text import (
    fleet_sentences,
    fleet_sheet,
    fleet_text,
)


def printed(fleet, width):
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(fleet_text(fleet))
    return captured.get()


def test_the_chain_says_what_each_member_does_and_holds():
    sheet = fleet_sheet(sample_fleet())
    assert sheet.headings == [
        "member", "micro-batches", "each", "together", "peak of budget, MiB", "gradients", "states", "device",
    ]  # fmt: skip
    assert sheet.rows == [
        ["laptop", "5", "1.000 s", "5.000 s", "310.0 of 320.0", "memory", "disk", "laptop's chip"],
        ["phone", "3", "1.500 s", "4.500 s", "249.0 of 250.0", "disk", "disk", "phone's chip"],
    ]


def test_a_step_is_told_in_sentences():
    assert fleet_sentences(sample_fleet()) == [
        "one step of 8 micro-batches takes 7.250 s, within 3.45% of the best allotment and plans of this kind (none takes less than 7.000 s), found in 3.5 s",
        "all have computed after 5.000 s; then 2.000 s until every device has the sum of the gradients (1.0 MiB over each link, both ways), and 0.250 s for the update",
        "phone has computed its share 0.500 s before the slowest, and waits: one micro-batch more would take it 1.500 s",
        "watch takes no part: nothing fits within 64.0 MiB",
        "equal shares (laptop 3, phone 3, watch 2): not possible, watch cannot hold its share in 64.0 MiB",
        "the fastest alone (laptop) would take 8.265 s, 1.14 × as long",
        "results equal those of one process to the bit, whatever the allotment",
    ]


def test_one_device_alone_exchanges_nothing():
    alone = sample_fleet(
        members=[sample_member("laptop"), sample_member("phone", reason="it is slow")],
        replicas=[sample_replica("laptop", 0, 8, 1.0)],
        exchange_seconds=0.0,
        baselines=[Baseline(name="fastest alone", makespan_seconds=7.25, shares={"laptop": 8, "phone": 0})],
    )
    said = fleet_sentences(alone)
    assert "laptop does all of it alone: nothing is exchanged" in said
    assert "the fastest alone (laptop) would take as long" in said
    assert "phone takes no part: it is slow" in said
    assert fleet_sentences(sample_fleet(micro_batches=1))[0].startswith("one step of one micro-batch takes 7.250 s")


def test_what_is_estimated_or_differs_is_said():
    guessed = [sample_member(name, measured=False) for name in ("laptop", "phone")]
    fleet = sample_fleet(members=guessed, bit_identical=False, differences=["PyTorch 2.9 and 2.10", "2 and 4 threads"])
    said = fleet_sentences(fleet)
    assert said[0].startswith("times of laptop and phone are estimated, not measured")
    assert said[-1] == (
        "results may differ from those of one process in their last bits: PyTorch 2.9 and 2.10; 2 and 4 threads"
    )
    # Only of those that take part.
    alone = [sample_replica("laptop", 0, 8, 1.0)]
    idle = sample_fleet(members=[sample_member("laptop"), sample_member("phone", measured=False)], replicas=alone)
    assert not any("estimated" in sentence for sentence in fleet_sentences(idle))


def test_equal_shares_that_are_possible_are_compared():
    shares = {"laptop": 4, "phone": 4, "watch": 0}
    fleet = sample_fleet(baselines=[Baseline(name="equal shares", makespan_seconds=14.5, shares=shares)])
    assert "equal shares (laptop 4, phone 4) would take 14.500 s, 2.00 × as long" in fleet_sentences(fleet)


@pytest.mark.parametrize("width", [80, 200])
def test_no_figure_is_cut_in_a_terminal(width):
    text = printed(sample_fleet(), width)
    for cell in (cell for row in fleet_sheet(sample_fleet()).rows for cell in row[:-1]):
        assert cell in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_names_cannot_command_the_terminal():
    member = sample_member("laptop", device="\x1b[31mred")
    alone = [sample_replica("laptop", 0, 8, 1.0)]
    reason = Baseline(name="equal shares", makespan_seconds=None, reason="\x1b[2J")
    text = printed(sample_fleet(members=[member], replicas=alone, model="\x1b[1m", baselines=[reason]), 200)
    assert "\x1b" not in text
    assert r"\x1b[31mred" in text
    assert r"equal shares: not possible, \x1b[2J" in text
