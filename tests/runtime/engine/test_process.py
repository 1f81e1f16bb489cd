import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest
from places import SOURCES

from tightfit.runtime.common.errors import CapError
from tightfit.runtime.engine.device import resident
from tightfit.runtime.engine.device.meter import SAMPLES, Meter
from tightfit.runtime.engine.start import process
from tightfit.runtime.supervision import training_process

MIB = 1 << 20


def lean(code, *arguments, **extra):
    """Run `code` in a process with the runtime's environment; returns its JSON answer."""
    environment = process.child_environment(2) | extra
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


@pytest.fixture(scope="module")
def floor():
    done = subprocess.run(
        training_process.command("--floor"),
        env=process.child_environment(2),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures, exchange = map(json.loads, done.stdout.splitlines())
    assert 0 < exchange["exchange_bytes"] < 9 * MIB
    return figures


def test_the_floor_is_that_of_kernels_without_the_python_around_them(floor):
    assert floor["torch"] == "lean", "the lean start fell back to the full import"
    low, high, start = (30, 50, 90) if floor["tables_on_disk"] else (70, 105, 160)
    assert low * MIB < floor["resident_bytes"] < high * MIB
    assert floor["resident_bytes"] < floor["import_peak_bytes"] < start * MIB
    assert floor["file_bytes"] < 20 * MIB


def test_the_floor_is_a_constant(floor):
    done = subprocess.run(
        training_process.command("--floor"),
        env=process.child_environment(2),
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        abs(json.loads(done.stdout.splitlines()[0])["resident_bytes"] - floor["resident_bytes"])
        < 0.01 * floor["resident_bytes"]
    )


def test_the_floor_is_measured_once_new_libraries_are_on_disk(monkeypatch):
    """Just after an installation it was 16 MiB too high: pages that are not on disk yet stay resident."""
    from tightfit.profiles.measuring.floor import idle_floor

    done: list[str] = []
    answers = {
        "tightfit.runtime.engine.training.child": '{"resident_bytes": 1}',
        "tightfit.runtime.supervision.supervisor": "7\n",
    }

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        module = next(name for name in answers if name in command)
        done.append(module)
        return subprocess.CompletedProcess(command, 0, stdout=answers[module])

    monkeypatch.setattr(os, "sync", lambda: done.append("sync"))
    monkeypatch.setattr(subprocess, "run", run)
    assert idle_floor(2) == {"resident_bytes": 1, "supervisor_bytes": 7}
    assert done == ["sync", "tightfit.runtime.engine.training.child", "tightfit.runtime.supervision.supervisor"]


KERNELS = """
import json, sys
from tightfit.runtime.engine.start import lean_torch
mode = lean_torch.load()
import torch
torch.default_generator.manual_seed(3)
x = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
y = torch.ops.aten.mm.default(x.to(torch.bfloat16), x.to(torch.bfloat16).t())
z = torch.empty(64, 64); torch.ops.aten.addmm.out(x, x, -x, alpha=2.0, out=z)
rows = [float(r.sum()) for r in x.split(16)] + [float((1 - x).sum()), float((2 / (x * x + 1)).sum()), float((x ** 2).sum())]
print(json.dumps({"mode": mode, "y": y.float().tolist(), "z": z.tolist(), "rows": rows, "modules": len(sys.modules), "numpy": sys.modules.get("numpy") is not None}))
"""


@pytest.mark.slow
def test_lean_kernels_are_torchs_own():
    small, full = lean(KERNELS), lean(KERNELS, TIGHTFIT_TORCH="plain")
    assert (small["mode"], full["mode"]) == ("lean", "plain")
    for name in ("y", "z", "rows"):
        assert small[name] == full[name]
    assert small["modules"] < 250 < full["modules"]
    assert not small["numpy"]


def test_a_lean_start_that_fails_falls_back_to_the_full_import():
    code = """
import json, os, sys
from tightfit.runtime.engine.start import lean_torch
def broken():
    raise ImportError("another build")
if os.environ.get("TIGHTFIT_TORCH") != "plain":
    lean_torch._load = broken
mode = lean_torch.load()
import torch
print(json.dumps({"mode": mode, "sum": float(torch.ones(3).sum())}))
"""
    answer = lean(code)
    assert answer["mode"] == "plain"
    assert answer["sum"] == 3.0
    assert "another build" in answer["stderr"]


def test_an_unknown_version_is_tried_in_another_process_first():
    code = """
import json, os, sys
from tightfit.runtime.engine.start import lean_torch
lean_torch.torch_interface.untried = lambda version: "unknown"
lean_torch._load = os.abort
mode = lean_torch.load()
import torch
print(json.dumps({"mode": mode, "sum": float(torch.ones(3).sum())}))
"""
    answer = lean(code)
    assert answer["mode"] == "plain"
    assert answer["sum"] == 3.0


@pytest.mark.slow
def test_a_metaclass_that_native_code_asks_for_is_one():
    """From 2.14 on native types are made with `torch._custom_class_base.CustomClassBaseMeta`."""
    answer = lean("""
import json
from tightfit.runtime.engine.start import lean_torch
lean_torch.load()
from torch._a_module_of_tomorrow import Base, BaseMeta
print(json.dumps({"kinds": [type(BaseMeta("Made", (), {})) is BaseMeta, isinstance(Base, type), issubclass(Base, type)]}))
""")
    assert answer["kinds"] == [True, True, False]


def test_numpy_can_be_had_beside_the_lean_torch():
    answer = lean("""
import json
from tightfit.runtime.engine.start import lean_torch
lean_torch.load()
try:
    import numpy
except ImportError:
    blocked = True
lean_torch.allow_numpy()
import numpy
import torch
values = torch.frombuffer(numpy.arange(3, dtype=numpy.float32), dtype=torch.float32)
print(json.dumps({"blocked": blocked, "values": values.tolist()}))
""")
    assert answer["blocked"]
    assert answer["values"] == [0.0, 1.0, 2.0]


def test_names_that_the_lean_torch_lacks_are_errors():
    answer = lean("""
import json
from tightfit.runtime.engine.start import lean_torch
lean_torch.load()
import torch
try:
    torch.compile
except AttributeError as error:
    print(json.dumps({"said": str(error)}))
""")
    assert "has no attribute 'compile' in the lean process" in answer["said"]


def test_file_pages_are_released_and_come_back():
    answer = lean("""
import json
from tightfit.runtime.engine.start import lean_torch, process; from tightfit.runtime.engine.device import resident
lean_torch.load()
import torch
torch.mm(torch.ones(8, 8), torch.ones(8, 8))
before = resident.memory()
released = process.release_file_pages()
after = resident.memory()
print(json.dumps({"before": before.file, "after": after.file, "released": released, "sum": float(torch.mm(torch.ones(8, 8), torch.ones(8, 8)).sum())}))
""")
    assert answer["sum"] == 512.0
    assert answer["after"] < answer["before"] / 2
    assert answer["released"] > 1 * MIB


def test_what_was_written_before_it_was_read_only_stays(tmp_path):
    """As the dynamic linker's relocations do, in a library's pages: they are no copies of the file."""
    size, page = 8 * mmap.PAGESIZE, mmap.PAGESIZE
    (tmp_path / "library").write_bytes(b"a" * size)
    with (tmp_path / "library").open("rb") as file:
        pages = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    assert pages[:] == b"a" * size
    pages[3 * page] = ord("b")
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.PROT_READ) == 0
    process.release_file_pages()
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(address // page * 8)
        there = [entry >> 63 for entry in array("Q", file.read(8 * 8))]
    assert there == [0, 0, 0, 1, 0, 0, 0, 0]
    assert pages[:] == b"a" * 3 * page + b"b" + b"a" * (size - 3 * page - 1)


LARGE_FOLIOS = """
import json, mmap, os, sys
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start import process
path, limit = sys.argv[1:]
process.most_mappings = lambda: int(limit)
file = os.open(path, os.O_RDWR | os.O_CREAT)
os.write(file, bytes(16 << 20))  # in one go, as an installation or read-ahead does
mappings = lambda: sum(1 for _ in open("/proc/self/maps"))
def touched(split):
    pages = mmap.mmap(file, 16 << 20, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    before = mappings()
    split()
    made, before = mappings() - before, memory().file
    for at in range(0, len(pages), 2 << 20):
        pages[at + 5000]
    return memory().file - before, made
print(json.dumps({"whole": touched(lambda: None), "split": touched(process.split_file_mappings)}))
"""


def test_a_page_of_a_file_comes_alone_however_the_page_cache_holds_it(tmp_path):
    """Where it has folios of 2 MiB, Linux 6.18 maps one as a whole: a step's peak was 1.9 MiB above the predicted
    one.
    """
    answer = lean(LARGE_FOLIOS, tmp_path / "library", process.SPARE_MAPPINGS + 60000)
    grown, made = answer["split"]
    assert grown <= 8 * (64 << 10) + (256 << 10)  # and what Python maps of its own meanwhile
    assert grown <= answer["whole"][0] + (256 << 10)
    assert made >= 250  # of 16 MiB


def test_files_are_split_as_far_as_the_kernel_allows(tmp_path):
    spare = process.SPARE_MAPPINGS
    made = [lean(LARGE_FOLIOS, tmp_path / str(more), spare + more)["split"][1] for more in (60000, 600, 300, 0)]
    assert made == sorted(made, reverse=True)
    assert made[0] > made[1] > made[3] == 0
    assert made[1] <= 300
    assert 0 < made[2] <= 150


@pytest.mark.parametrize(
    ("size", "parts"), [(1, [(1, 2), (3, 4), (5, 6), (7, 8)]), (2, [(2, 4), (6, 8)]), (4, [(4, 8)]), (8, []), (16, [])]
)
def test_every_second_part_of_mappings(size, parts):
    edges = [edge * mmap.PAGESIZE for edge in (0, 8, 20, 21)]
    assert [
        (start // mmap.PAGESIZE, end // mmap.PAGESIZE) for start, end in process._second_parts(edges, size)
    ] == parts


@pytest.mark.slow
def test_what_a_lean_process_has_mapped_of_libraries_is_in_small_parts():
    answer = lean("""
import json
from tightfit.runtime.engine.start import lean_torch
lean_torch.load()
from tightfit.runtime.engine.start.kernel_warmup import prepare
prepare()
largest = 0
for line in open("/proc/self/maps"):
    addresses, permissions, _, _, _, *path = line.split(None, 5)
    if path and path[0].startswith("/") and "w" not in permissions:
        start, end = (int(edge, 16) for edge in addresses.split("-"))
        largest = max(largest, end - start)
print(json.dumps({"largest": largest}))
""")
    assert answer["largest"] <= 64 << 10


NARROW = """
import json, os, sys
from tightfit.runtime.engine.start import lean_torch, process
from tightfit.runtime.engine.device.resident import memory
lean_torch.load()
import torch
torch.set_num_threads(1)
x = torch.ones(64, 64)
def use():
    return (x @ x).exp().sum().item()
use()
found = []
mappings = lambda: sum(1 for _ in open("/proc/self/maps"))
for more in sys.argv[1:]:
    read, write = os.pipe()
    if os.fork() == 0:  # with the same pages as the others
        before = mappings()
        process.most_mappings = lambda: process.SPARE_MAPPINGS + before + int(more)
        process.narrow_file_mappings()
        process.release_file_pages()
        use()
        os.write(write, json.dumps([mappings() - before, memory().file]).encode())
        os._exit(0)
    found.append(json.loads(os.read(read, 99)))
    os.wait()
print(json.dumps({"found": found}))
"""


@pytest.mark.slow
def test_mappings_are_made_as_far_as_the_kernel_allows():
    """Where a process has as many as it may, the next buffer ends in "cannot allocate memory"."""
    (free, least), (tight, more), (few, _), (none, most) = lean(NARROW, 60000, 800, 200, 0)["found"]
    assert 1000 < free < process.SPARE_MAPPINGS
    assert 200 < tight < 800 + 20  # Python's own make some more
    assert 0 < few < 200 + 20
    assert none < 20
    assert least < more < most  # what is left buys something


@pytest.mark.parametrize(("size", "groups"), [(1, [3, 5, 17, 31]), (2, [1, 15]), (4, [1, 7]), (8, [3])])
def test_every_second_group_of_pages(size, groups):
    pages = [0, 2, 3, 5, 16, 17, 30, 31]
    assert list(process._every_second(pages, size)) == groups


def test_the_limit_of_mappings_is_the_kernels():
    assert process.most_mappings() == int(Path("/proc/sys/vm/max_map_count").read_text())


def test_memory_agrees_with_itself():
    found = resident.memory()
    assert found.resident <= found.peak
    assert abs(found.anonymous + found.file + found.shared - found.resident) < 1 * MIB
    reader = resident.ResidentReader()
    assert abs(reader() - resident.memory().resident) < 8 * MIB
    reader.close()
    with pytest.raises(OSError):
        resident.memory(2**30)


def test_the_environment_is_the_same_for_every_child(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("LD_PRELOAD", "libelse.so")
    environment = process.child_environment(3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "LD_PRELOAD" not in environment
    assert str(SOURCES) in environment["PYTHONPATH"].split(os.pathsep)


def test_the_meter_refuses_what_is_above_the_cap():
    meter = Meter(1 * MIB)
    with pytest.raises(CapError, match=r"the process holds .* MiB and the cap is 1.0 MiB"):
        meter.check(0)
    meter.check(1)  # between two readings
    with pytest.raises(CapError):
        meter.check_peak()
    just_below, well_above = Meter(resident.memory().resident - MIB), Meter(resident.memory().peak + 64 * MIB)
    with pytest.raises(CapError):
        just_below.check(0)
    well_above.check(0)
    with pytest.raises(CapError):
        Meter(resident.memory().peak - 1).check_peak()
    assert resident.memory().peak - 64 * MIB < well_above.check_peak() <= resident.memory().peak


def test_the_meter_keeps_a_timeline_of_the_step_that_is_watched():
    meter = Meter(1 << 50)
    for steps, kept in ((5, 5), (SAMPLES + 3, SAMPLES)):
        begun = [time.perf_counter()]
        meter.watch(1e-9)
        begun.append(time.perf_counter())
        between = []
        for instruction in range(steps):
            time.sleep(1e-6)  # longer than the microsecond in which moments are told
            asked = time.perf_counter()
            meter.check(instruction)
            between.append((asked - begun[1], time.perf_counter() - begun[0]))
        samples = meter.stop()
        assert [instruction for instruction, _, _ in samples] == list(range(kept))
        moments = [moment for _, moment, _ in samples]
        assert sorted(set(moments)) == moments
        assert all(least - 1e-6 <= moment <= most for moment, (least, most) in zip(moments, between))
        assert all(resident > 1 * MIB for _, _, resident in samples)
        meter.check(16)
        assert len(meter.stop()) == kept


def test_a_floor_is_told_though_members_of_a_fleet_cannot_meet(monkeypatch):
    from tightfit.profiles.measuring import floor as measuring_floor

    dies = "import os, signal\nprint('{\"resident_bytes\": 7}', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(measuring_floor, "command", lambda *_: [sys.executable, "-c", dies])
    told = measuring_floor.idle_floor(1)
    assert told["resident_bytes"] == 7
    assert "exchange_bytes" not in told
