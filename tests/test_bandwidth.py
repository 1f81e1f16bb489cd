import ctypes
import os
import struct
import sys
import threading
import time

import pytest
import torch

from runtime.bandwidth import Group, measure_channels, measure_transfers
from runtime.channels import SLICE_NANOSECONDS, SWITCH_SECONDS, Channel

LATENCY, BANDWIDTH = 1e-2, 2e8
SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


@pytest.fixture
def channel():
    before = sys.getswitchinterval()
    channel = Channel()
    yield channel
    channel.close()
    sys.setswitchinterval(before)


def sleep(address, size, offset):
    time.sleep(LATENCY + size / BANDWIDTH)


def test_figures_are_those_of_a_transfer_beside_a_computation(channel):
    figures = measure_transfers(channel, {"read": sleep}, 0, Group(torch.float32))["read"]
    assert LATENCY * 0.7 < figures["latency_seconds"] < LATENCY * 2
    assert BANDWIDTH / 2.5 < figures["bytes_per_second"] < BANDWIDTH * 1.5
    assert all(value >= 0 for value in figures.values())


def test_the_time_of_a_transfer_counts_from_its_request(channel):
    """What is queued ahead of it, or keeps its thread from starting, is part of it."""
    submit = channel.submit

    def behind_another(transfer):
        submit(time.sleep, 5e-3)
        return submit(transfer)

    channel.submit = behind_another
    figures = measure_transfers(channel, {"write": sleep}, 0, Group(torch.float32))["write"]
    assert figures["latency_seconds"] >= (LATENCY + 5e-3) * 0.95


def test_measured_on_a_disk(tmp_path):
    found = measure_channels(tmp_path, "float32")
    for name in ("read", "write"):
        assert found[name]["bytes_per_second"] > 1e5
        assert found[name]["latency_seconds"] < 1.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.uname().machine not in SCHED_GETATTR, reason="the number of the system call is not known")
@pytest.mark.skipif(
    tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 12), reason="slices are Linux 6.12's"
)
def test_the_thread_of_transfers_has_a_short_slice_and_its_callers_priority(channel):
    channel.wait(channel.submit(lambda: None))

    def attributes(thread):
        found = ctypes.create_string_buffer(56)
        number = SCHED_GETATTR[os.uname().machine]
        assert ctypes.CDLL(None).syscall(ctypes.c_long(number), thread, found, 56, 0) == 0
        _, policy, _, nice, _, slice_, *_ = struct.unpack("IIQiIQQQII", found.raw)
        return policy, nice, slice_

    policy, nice, slice_ = attributes(channel._thread.native_id)
    assert (policy, nice) == attributes(threading.get_native_id())[:2]
    assert slice_ == SLICE_NANOSECONDS < attributes(threading.get_native_id())[2]


def test_who_waits_for_pythons_lock_asks_for_it_soon(channel):
    channel.wait(channel.submit(lambda: None))
    assert sys.getswitchinterval() <= SWITCH_SECONDS * 1.001
