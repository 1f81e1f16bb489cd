import ctypes
import errno
import mmap
import os
import re
import struct
import sys
import threading

import pytest
from damage import opened_below

from tightfit.runtime.common.errors import RunError
from tightfit.runtime.engine.device.channels import SLICE_NANOSECONDS, SWITCH_SECONDS, TransferChannel
from tightfit.runtime.engine.device.spill import BLOCK, STAGING_BYTES, SpillFile


def test_transfers_run_in_order_and_tickets_imply_those_before():
    channel, seen, gate = TransferChannel(), [], threading.Event()
    first = channel.submit(gate.wait)
    tickets = [channel.submit(seen.append, number) for number in range(5)]
    assert seen == []
    gate.set()
    channel.wait(tickets[3])
    assert seen[:4] == [0, 1, 2, 3]
    channel.wait(first)
    channel.drain()
    assert seen == [0, 1, 2, 3, 4]
    channel.close()


def test_an_error_surfaces_where_it_is_waited_for_and_stops_later_transfers():
    channel, seen = TransferChannel(), []

    def fail():
        raise RunError("disk on fire")

    before = channel.submit(seen.append, 1)
    ticket = channel.submit(fail)
    after = channel.submit(seen.append, 2)
    channel.wait(before)
    for awaited in (ticket, after):
        with pytest.raises(RunError, match="disk on fire"):
            channel.wait(awaited)
    channel.close()
    assert seen == [1]


def test_an_idle_channel_has_taken_up_a_request_when_it_returns():
    channel, taken_up, gate = TransferChannel(), [], threading.Event()

    def transfer():
        taken_up.append(True)
        gate.wait()

    for _ in range(200):
        before = channel._served
        gate.clear()
        ticket = channel.submit(transfer)
        assert channel._requests.empty(), "the thread has it"
        assert channel._served == before
        gate.set()
        channel.wait(ticket)
    assert len(taken_up) == 200
    channel.close()


def test_a_request_behind_another_or_a_failed_one_does_not_wait():
    channel, gate = TransferChannel(), threading.Event()
    channel.submit(gate.wait)
    second = channel.submit(int)  # would never return if it waited for its turn
    gate.set()
    channel.wait(second)
    failed = channel.submit(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        channel.wait(failed)
    for _ in range(3):
        channel.submit(int)
    channel.close()


SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
RELEASE = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


@pytest.mark.skipif(sys.platform != "linux" or RELEASE < (6, 12), reason="slices are Linux 6.12's")
@pytest.mark.skipif(os.uname().machine not in SCHED_GETATTR, reason="the number of the system call is not known")
def test_the_thread_has_a_short_slice_and_its_callers_priority():
    def attributes(thread):
        found = ctypes.create_string_buffer(56)
        number = SCHED_GETATTR[os.uname().machine]
        assert ctypes.CDLL(None).syscall(ctypes.c_long(number), thread, found, 56, 0) == 0
        _, policy, _, nice, _, slice_, *_ = struct.unpack("IIQiIQQQII", found.raw)
        return policy, nice, slice_

    channel = TransferChannel()
    channel.wait(channel.submit(int))
    policy, nice, slice_ = attributes(channel._thread.native_id)
    own_policy, own_nice, own_slice = attributes(threading.get_native_id())
    channel.close()
    assert (policy, nice) == (own_policy, own_nice)
    if policy == os.SCHED_OTHER:
        assert slice_ == SLICE_NANOSECONDS < own_slice


def test_pythons_lock_is_handed_on_sooner_until_the_channel_is_closed():
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-3)
    channel = TransferChannel()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    channel.close()
    assert sys.getswitchinterval() == pytest.approx(5e-3)
    sys.setswitchinterval(before)


@pytest.mark.parametrize("size", [1, 100, BLOCK, STAGING_BYTES - 1, STAGING_BYTES + 13, 3 * STAGING_BYTES])
def test_spilled_bytes_come_back(tmp_path, size):
    data = os.urandom(size)
    source, target = ctypes.create_string_buffer(data, size), ctypes.create_string_buffer(size)
    spill = SpillFile(str(tmp_path), size + BLOCK)
    spill.write(ctypes.addressof(source), size, BLOCK)
    spill.read(ctypes.addressof(target), size, BLOCK)
    assert target.raw == data
    spill.zero(size, BLOCK)
    spill.read(ctypes.addressof(target), size, BLOCK)
    assert target.raw == bytes(size)
    spill.close()


def test_the_spill_file_has_no_name(tmp_path):
    spill = SpillFile(str(tmp_path), 1 << 20)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(spill.descriptor).st_blocks * 512 >= 1 << 20
    spill.close()


def test_a_disk_that_fills_up_is_an_error_not_a_short_write(tmp_path, monkeypatch):
    spill = SpillFile(str(tmp_path), 1 << 16)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    buffer = ctypes.create_string_buffer(100)
    with pytest.raises(RunError, match=r"No space left on device.*start again with overwrite=True"):
        spill.write(ctypes.addressof(buffer), 100, 0)
    spill.close()


@pytest.mark.parametrize("how", ["a little at a time", "past the page cache: no"])
def test_a_file_system_of_few_talents_keeps_what_is_spilled(tmp_path, monkeypatch, how):
    """One that moves less than it is asked to, and one that accepts O_DIRECT and refuses the transfers."""
    size = 2 * STAGING_BYTES + 13
    memory = mmap.mmap(-1, 2 * (size + BLOCK))
    memory[:size] = data = os.urandom(size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    spill = SpillFile(str(tmp_path), BLOCK + size)

    def through(call):
        def moved(descriptor, buffers, offset):
            if how == "a little at a time":
                return call(descriptor, [buffers[0][:BLOCK]], offset)
            if spill.direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(descriptor, buffers, offset)

        return moved

    monkeypatch.setattr(os, "pwritev", through(os.pwritev))
    monkeypatch.setattr(os, "preadv", through(os.preadv))
    back = address + size + BLOCK
    for source, target in ((address, back), (address + 1, back + 1)):  # in place, and through the staging buffer
        ctypes.memmove(source, data, size)
        spill.write(source, size, BLOCK)
        ctypes.memset(target, 0, size)
        spill.read(target, size, BLOCK)
        assert ctypes.string_at(target, size) == data
    spill.close()


def test_a_spill_file_that_was_cut_is_an_error(tmp_path):
    spill = SpillFile(str(tmp_path), 2 * BLOCK)
    os.ftruncate(spill.descriptor, BLOCK)
    buffer = ctypes.create_string_buffer(100)
    with pytest.raises(RunError, match="ends early, at byte 4096 of 8192"):
        spill.read(ctypes.addressof(buffer), 100, BLOCK)
    spill.close()


def test_without_nameless_files_and_without_reservations_there_is_a_spill_file(tmp_path, monkeypatch):
    opened = os.open

    def named_only(path, flags, *mode, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return opened(path, flags, *mode, **options)

    def unreserved(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "open", named_only)
    monkeypatch.setattr(os, "posix_fallocate", unreserved)
    spill = SpillFile(str(tmp_path), 2 * BLOCK)
    assert os.fstat(spill.descriptor).st_size == 2 * BLOCK
    assert list(tmp_path.iterdir()) == []
    spill.close()


@pytest.mark.parametrize("told", ["by the figures", "by the reservation"])
def test_a_disk_without_room_is_refused_and_nothing_stays_open(tmp_path, monkeypatch, told):
    """The room may be gone between the two, and some file systems reserve nothing."""

    def refused(*arguments):
        raise OSError(errno.EOPNOTSUPP if told == "by the figures" else errno.ENOSPC, "")

    monkeypatch.setattr(os, "posix_fallocate", refused)
    with pytest.raises(RunError, match=r"the plan spills .* MiB and .* has .* MiB free"):
        SpillFile(str(tmp_path), 1 << (60 if told == "by the figures" else 20))
    assert opened_below(tmp_path) == []


def test_no_spill_file_in_a_missing_directory(tmp_path):
    with pytest.raises(RunError, match="no spill file can be made"):
        SpillFile(str(tmp_path / "missing"), 100)
