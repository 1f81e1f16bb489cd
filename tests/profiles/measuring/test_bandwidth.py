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
from tightfit.profiles.measuring.bandwidth import Group, measure_channels, measure_transfers
from tightfit.profiles.schema import Channel as Channel_
from tightfit.runtime.cli.answers import comparison_text, profile_text
from tightfit.runtime.common.errors import RunError
from tightfit.runtime.engine.device.channels import Channel

LATENCY, BANDWIDTH = 1e-2, 2e8


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    monkeypatch.setattr(bandwidth, "MOST_TURNS", bandwidth.LEAST_TURNS)


@pytest.fixture
def channel():
    channel = Channel()
    yield channel
    channel.close()


def sleep(address, size, offset):
    time.sleep(LATENCY + size / BANDWIDTH)


class Products:
    """A group that counts how often a transfer was under way when it ended. It lasts a tenth of one however busy the cores are,
    which real products do not.
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


def test_the_time_of_a_transfer_counts_from_its_request(channel):
    """What is queued ahead of it, or keeps its thread from starting, is part of it."""
    submit = channel.submit

    def behind_another(transfer):
        submit(time.sleep, 5e-3)
        return submit(transfer)

    channel.submit = behind_another
    figures = measure_transfers(channel, {"write": sleep}, 0, Group(torch.float32))["write"]
    assert figures["latency_seconds"] >= (LATENCY + 5e-3) * 0.95


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
    """A computation beside which large transfers end as soon as small ones in the first `turns` attempts: two medians that cross."""

    def __init__(self, monkeypatch, attempts):
        self.attempts, self.beside = attempts, False
        measured, beside = bandwidth._measured, bandwidth._beside

        def attempt(*args):
            self.attempts -= 1
            return measured(*args)

        def one(*args):
            self.beside = True
            try:
                return beside(*args)
            finally:
                self.beside = False

        monkeypatch.setattr(bandwidth, "_measured", attempt)
        monkeypatch.setattr(bandwidth, "_beside", one)

    def transfer(self, address, size, offset):
        crossed = self.beside and self.attempts >= 0
        time.sleep(LATENCY if crossed else LATENCY + size / BANDWIDTH)

    def run(self):
        time.sleep(LATENCY / 10)


@pytest.mark.parametrize("attempts", [1, 99])
def test_what_is_not_possible_is_measured_again_and_marked_where_it_stays_so(channel, monkeypatch, attempts):
    group = Crossed(monkeypatch, attempts)
    figures = measure_transfers(channel, {"read": group.transfer}, 0, group)["read"]
    assert BANDWIDTH / 2.5 < figures["bytes_per_second"] < BANDWIDTH * 1.5
    assert attempts - group.attempts == (2 if attempts == 1 else bandwidth.ATTEMPTS)
    read = Channel_.model_validate(figures)
    if attempts == 1:
        assert read.doubt is None
        return
    assert read.doubt.startswith("reads came out at ")
    assert "in each of 3 attempts: the " in read.doubt
    # The profile and each of its plans say it first, in one line.
    on = device()
    on = on.model_copy(update={"read": read})
    planner = ModelPlanner(small_chain(1, on=on))
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


def test_measured_on_a_disk(tmp_path):
    found = measure_channels(tmp_path, "float32")
    for name in ("read", "write"):
        assert found[name]["bytes_per_second"] > 1e5
        assert found[name]["latency_seconds"] < 1.0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_an_error_and_no_endless_loop(channel):
    def fail(address, size, offset):
        raise RunError("disk on fire")

    with pytest.raises(RunError, match="disk on fire"):
        measure_transfers(channel, {"read": fail}, 0, Group(torch.float32))
