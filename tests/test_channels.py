import ctypes
import os
import threading

import pytest

from profiles.errors import RunError
from runtime.channels import Channel
from runtime.spill import BLOCK, STAGING_BYTES, SpillFile


def test_transfers_run_in_order_and_tickets_imply_those_before():
    channel, seen, gate = Channel(), [], threading.Event()
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
    channel, seen = Channel(), []

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


def test_a_disk_without_room_is_refused_with_figures(tmp_path):
    with pytest.raises(RunError, match=r"the plan spills .* MiB and .* has .* MiB free"):
        SpillFile(str(tmp_path), 1 << 60)


def test_a_disk_that_fills_up_is_an_error_not_a_short_write(tmp_path, monkeypatch):
    spill = SpillFile(str(tmp_path), 1 << 16)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    buffer = ctypes.create_string_buffer(100)
    with pytest.raises(RunError, match=r"No space left on device.*--resume"):
        spill.write(ctypes.addressof(buffer), 100, 0)
    spill.close()


def test_no_spill_file_in_a_missing_directory(tmp_path):
    with pytest.raises(RunError, match="no spill file can be made"):
        SpillFile(str(tmp_path / "missing"), 100)
