import html
import io
import time

import pytest
import torch
from rich.console import Console
from synthetic import device, small_chain

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.report.explain import explain
from tightfit.planner.report.html import comparison_page
from tightfit.planner.report.summary import plan_summary, profile_summary
from tightfit.profiles.measuring import bandwidth
from tightfit.profiles.measuring.bandwidth import LayerWorkload, measure_transfers
from tightfit.runtime.cli.answers import comparison_text, profile_text
from tightfit.runtime.common.errors import RunError
from tightfit.runtime.engine.device.channels import TransferChannel

LATENCY, BANDWIDTH = 1e-2, 2e8


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    monkeypatch.setattr(bandwidth, "MOST_TURNS", bandwidth.LEAST_TURNS)


@pytest.fixture
def channel():
    channel = TransferChannel()
    yield channel
    channel.close()


def sleep(address, size, offset):
    time.sleep(LATENCY + size / BANDWIDTH)


class Products:
    """A group that counts how often a transfer was under way when it ended. It lasts a tenth of one however busy the
    cores are, which real products do not.
    """

    def __init__(self):
        self.under_way, self.beside = 0, 0

    def run(self):
        time.sleep(LATENCY / 10)
        self.beside += self.under_way


def test_figures_are_those_of_a_transfer_beside_a_computation(channel):
    group = Products()

    def transfer(address, size, offset):
        group.under_way = 1
        sleep(address, size, offset)
        group.under_way = 0

    figures = measure_transfers(channel, {"read": transfer}, 0, group)["read"]
    assert LATENCY * 0.7 < figures["latency_seconds"] < LATENCY * 2
    assert BANDWIDTH / 2.5 < figures["bytes_per_second"] < BANDWIDTH * 1.5
    assert group.beside, "groups end while a transfer is under way"


@pytest.mark.slow
def test_transfers_are_measured_one_behind_the_other_and_each_counts_its_own_time(channel):
    """As in a run, whose plan has several under way: what a transfer waits for those before it is the queue's time, not
    its own.
    """
    waiting, most = 0, 0
    submit = channel.submit

    def counted(transfer, *arguments):
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)

        def made(*given):
            nonlocal waiting
            transfer(*given)
            waiting -= 1

        return submit(made, *arguments)

    channel.submit = counted
    figures = measure_transfers(channel, {"write": sleep}, 0, Products())["write"]
    assert most == bandwidth.QUEUED
    assert LATENCY * 0.7 < figures["latency_seconds"] < LATENCY * 2


def test_what_computing_loses_is_told_by_transfer_and_by_byte(channel):
    """A transfer that holds Python's lock, which the group needs: all that it takes is lost."""

    def busy(address, size, offset):
        end = time.perf_counter() + LATENCY + size / BANDWIDTH
        while time.perf_counter() < end:
            sum(range(1000))

    class Interpreted:
        def run(self):
            for _ in range(100):
                sum(range(1000))

    figures = measure_transfers(channel, {"read": busy}, 0, Interpreted())["read"]
    assert LATENCY / 4 < figures["compute_seconds_per_transfer"] < LATENCY * 1.5
    assert 0.25 < figures["compute_seconds_per_byte"] * BANDWIDTH < 1.5


class Crossed:
    """A computation beside which small transfers take as long as large ones, as where each waits for a core."""

    def __init__(self, monkeypatch):
        self.beside = False
        beside = bandwidth._beside_work

        def one(*args):
            self.beside = True
            try:
                return beside(*args)
            finally:
                self.beside = False

        monkeypatch.setattr(bandwidth, "_beside_work", one)

    def transfer(self, address, size, offset):
        time.sleep(LATENCY + (max(bandwidth.SIZES) if self.beside else size) / BANDWIDTH)

    def run(self):
        time.sleep(LATENCY / 10)


def test_no_bandwidth_is_above_that_of_transfers_alone(channel, monkeypatch):
    """The bandwidth of transfers alone is taken, and large transfers still take what they took."""
    figures = measure_transfers(channel, {"read": Crossed(monkeypatch).transfer}, 0, Products())["read"]
    assert BANDWIDTH / 2.5 < figures["bytes_per_second"] < BANDWIDTH * 1.5
    size = max(bandwidth.SIZES)
    taken = figures["latency_seconds"] + size / figures["bytes_per_second"]
    assert LATENCY * 0.7 < taken - size / BANDWIDTH < LATENCY * 2


def test_a_doubt_that_an_older_version_wrote_is_still_told():
    """The profile and each of its plans say it first, in one line."""
    on = device()
    read = on.read.model_copy(update={"doubt": "reads came out at 9 MB/s"})
    planner = ModelPlanner(small_chain(1, on=on.model_copy(update={"read": read})))
    assert profile_summary(planner.profile)["marks"] == [read.doubt]
    made = planner.plan(1 << 40)
    assert explain(made)[0] == f"caution: {read.doubt}"
    assert plan_summary(made)["marks"] == [read.doubt]
    console = Console(file=io.StringIO(), width=1000)
    console.print(profile_text(planner.profile))
    console.print(comparison_text([made]))
    first = console.file.getvalue().splitlines()
    assert read.doubt in first[0]
    assert sum(read.doubt in line for line in first) == 2
    assert read.doubt in html.unescape(comparison_page([made]))


def test_a_disk_that_fails_is_an_error_and_no_endless_loop(channel):
    def fail(address, size, offset):
        raise RunError("disk on fire")

    with pytest.raises(RunError, match="disk on fire"):
        measure_transfers(channel, {"read": fail}, 0, LayerWorkload(torch.float32))
