"""Four devices on one machine, as different as they come: each has its share of a core, its memory cap and its own link.

    python tests/benchmarks/fleet.py [--rate 100] [--quotas 1,.5,.25,.1] [--budgets 160,240,320,569] [--micro-batches 32]
        [--updates 3] [--json FILE] [--write]

SmolLM2-135M on film reviews. The model is measured once, on one core while the other computes too; the profile of a
device with a fraction of a core has its processor seconds divided by the share that a small program measures there while
all devices compute. A device is a network namespace, whose link to a switch is limited in both directions (`tc`, token
bucket), a CPU quota (cgroup) and the memory cgroup that tightfit makes for each run. The device with a whole core has it
for itself, the others share the second one. It needs root, and a Linux with network namespaces and token buckets.

Printed: each device's predicted and measured peak; the step, predicted and measured, beside its proven bound and equal
shares; bytes on the links; whether every member's adapter is that of one process that accumulates the same micro-batches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

import tables
from rich.table import Table

from examples.reviews import SEQ, fetch
from tightfit.planner.fleet.io import save_fleet
from tightfit.planner.fleet.plan import MemberSpec, plan_fleet
from tightfit.planner.fleet.schema import FleetPlan, Link
from tightfit.planner.io import save_plan
from tightfit.planner.plan import planner_of
from tightfit.profiles.api import profile
from tightfit.profiles.schema import Profile, adamw
from tightfit.runtime.common.interpreter import command, python_path

MIB = 1 << 20
PERIOD = 100_000
"""microseconds in which a device gets its share of a core"""
CALIBRATION_SECONDS = 4.0
CPU = Path("/sys/fs/cgroup/cpu")
NETWORK, PORT = "10.77.0", 29400
LEARNING_RATE = 5e-4


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a device's processes run."""

    name: str
    quota: float
    address: str
    core: int

    @property
    def namespace(self) -> str:
        return f"tightfit-{self.name}"

    @property
    def group(self) -> Path:
        return CPU / self.namespace

    def inside(self, words: Sequence[str]) -> list[str]:
        """The command line that runs `words` there."""
        # Not `ip netns exec`, which mounts /sys anew, without the cgroups.
        enter = f'echo $$ > {self.group}/cgroup.procs && exec nsenter --net=/var/run/netns/{self.namespace} taskset -c {self.core} "$@"'
        return ["sh", "-c", enter, "sh", *words]

    def bytes_sent(self) -> int:
        """Bytes that have left its network device, with headers."""
        found = json.loads(_said("ip", "-n", self.namespace, "-s", "-j", "link", "show", "eth0"))
        return int(found[0]["stats64"]["tx"]["bytes"])


def _said(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@contextmanager
def places(quotas: Sequence[float], megabits: float) -> Iterator[list[Place]]:
    """Make devices with these shares of a core, whose links carry so many megabits per second each way."""
    made = [
        Place(name=f"device{number}", quota=quota, address=f"{NETWORK}.{number + 1}", core=0 if number == 0 else 1)
        for number, quota in enumerate(quotas)
    ]
    limit = ["root", "tbf", "rate", f"{megabits}mbit", "burst", "32kb", "latency", "100ms"]
    with ExitStack() as stack:

        def network(name: str) -> None:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            _said("ip", "netns", "add", name)
            stack.callback(_said, "ip", "netns", "del", name)

        switch = "tightfit-switch"
        network(switch)
        _said("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _said("ip", "-n", switch, "link", "set", "switch", "up")
        for place in made:
            network(place.namespace)
            port = f"p-{place.name}"
            _said("ip", "link", "add", "eth0", "netns", place.namespace, "type", "veth", "peer", port, "netns", switch)
            there = ("ip", "-n", place.namespace)
            _said(*there, "addr", "add", f"{place.address}/24", "dev", "eth0")
            _said(*there, "link", "set", "lo", "up")
            _said(*there, "link", "set", "eth0", "up")
            _said("tc", "-n", place.namespace, "qdisc", "add", "dev", "eth0", *limit)
            _said("ip", "-n", switch, "link", "set", port, "master", "switch", "up")
            _said("tc", "-n", switch, "qdisc", "add", "dev", port, *limit)
            place.group.mkdir(exist_ok=True)
            stack.callback(place.group.rmdir)
            (place.group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (place.group / "cpu.cfs_quota_us").write_text(str(int(place.quota * PERIOD)))
        yield made


WORK = """
import sys, time, torch
torch.set_num_threads(1)
left, right = torch.randn(256, 576, dtype=torch.bfloat16), torch.randn(576, 1536, dtype=torch.bfloat16)
room = torch.randn(1 << 20)
begun, done, end = time.monotonic(), 0, float(sys.argv[1])
while time.monotonic() < begun + end:
    for _ in range(10):
        left @ right
    room.mul_(1.0)
    done += 1
print(done / (time.monotonic() - begun))
"""
"""a program that computes as a training process does, for so many seconds; it says how fast"""


def rates(commands: Sequence[Sequence[str]]) -> list[float]:
    """How fast `WORK` is under each of these command lines, which run at the same time."""
    words = [sys.executable, "-c", WORK, str(CALIBRATION_SECONDS)]
    running = [subprocess.Popen([*one, *words], stdout=subprocess.PIPE, text=True) for one in commands]
    return [float(program.communicate()[0]) for program in running]


def shares(devices: Sequence[Place]) -> list[float]:
    """What share of a core each device really has while all of them compute: an interrupted core works more slowly."""
    whole = rates([["taskset", "-c", "0"], ["taskset", "-c", "1"]])[0]
    empty: list[str] = []
    return [rate / whole for rate in rates([place.inside(empty) for place in devices])]


@contextmanager
def neighbour() -> Iterator[None]:
    """While entered, the other core computes too, as it does when all devices run: two virtual cores may be one."""
    program = subprocess.Popen(["taskset", "-c", "1", sys.executable, "-c", WORK, "inf"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        program.kill()
        program.wait()


def slowed(measured: Profile, quota: float) -> Profile:
    """The profile of a device whose processor does `quota` of the work of the measured one in the same time."""
    factor = 1 / quota

    def disk(channel: Any) -> Any:
        costs = ("compute_seconds_per_byte", "compute_seconds_per_transfer")
        return channel.model_copy(update={name: factor * getattr(channel, name) for name in costs})

    times = ("unpack_seconds", "update_seconds", "perturb_seconds")
    tensors = [
        tensor.model_copy(update={name: factor * getattr(tensor, name) for name in times})
        for tensor in measured.tensors
    ]
    programs = [
        program.model_copy(
            update={
                "operators": [one.model_copy(update={"seconds": factor * one.seconds}) for one in program.operators]
            }
        )
        for program in measured.programs
    ]
    device = measured.device.model_copy(
        update={"read": disk(measured.device.read), "write": disk(measured.device.write)}
    )
    return measured.model_copy(update={"tensors": tensors, "programs": programs, "device": device})


def run_fleet(folder: Path, fleet: FleetPlan, devices: Sequence[Place], data: Path, out: Path, steps: int) -> None:
    """Run every member in its place; raises RuntimeError with what it said where one fails."""
    by_name = {place.name: place for place in devices}
    first = by_name[fleet.chain[0].name]
    environment = os.environ | {"PYTHONPATH": python_path()}
    running = {}
    out.mkdir(parents=True, exist_ok=True)
    for member in fleet.chain:
        words = command("tightfit.runtime.cli.main", "fleet", "run", str(folder), "--data", str(data))
        words += ["--steps", str(steps), "--lr", str(LEARNING_RATE), "--checkpoint-every", "0", "-o", str(out)]
        words += ["--member", member.name, "--at", f"{first.address}:{PORT}", "--json", "--overwrite"]
        with (out / f"{member.name}.log").open("wb") as log:
            running[member.name] = subprocess.Popen(
                by_name[member.name].inside(words), env=environment, stdout=log, stderr=subprocess.STDOUT
            )
    failed = [name for name, child in running.items() if child.wait()]
    if failed:
        raise RuntimeError("\n".join(f"{name}: {(out / f'{name}.log').read_text()[-2000:]}" for name in failed))


def run_alone(measured: Profile, micro_batches: int, data: Path, folder: Path, steps: int) -> str:
    """One process that accumulates all micro-batches; the hash of its adapter."""
    alone = measured.model_copy(update={"optimizer": adamw(micro_batches)})
    save_plan(planner_of(alone).plan(1 << 30, time_limit=30), folder / "alone.json")
    words = command("tightfit.runtime.cli.main", "run", str(folder / "alone.json"), "--data", str(data), "--json")
    words += ["--steps", str(steps), "--lr", str(LEARNING_RATE), "--checkpoint-every", "0", "-o", str(folder / "alone")]
    subprocess.run(words, env=os.environ | {"PYTHONPATH": python_path()}, check=True, capture_output=True)
    return adapter_hash(folder / "alone")


def adapter_hash(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Measure, plan, run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0, help="megabits per second of every link, each way")
    parser.add_argument("--quotas", type=_numbers, default=[1.0, 0.5, 0.25, 0.1], help="of a core, of each device")
    parser.add_argument("--budgets", type=_numbers, default=[160, 240, 320, 569], help="MiB, of each device")
    parser.add_argument("--micro-batches", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/fleet.md")
    given = parser.parse_args()
    report = tables.Report()
    reviews = fetch()
    with neighbour():
        measured = profile(str(reviews.model), batch=given.batch, seq=SEQ, lora_rank=8, threads=1, force=True)
    rate = given.rate * 1e6 / 8
    link = Link(up_bytes_per_second=rate, down_bytes_per_second=rate)
    steps = given.updates * given.micro_batches
    with tempfile.TemporaryDirectory(dir=ROOT) as name, places(given.quotas, given.rate) as devices:
        folder = Path(name)
        real = shares(devices)
        specs = [
            MemberSpec(name=place.name, profile=slowed(measured, share), budget_bytes=int(size * MIB), link=link)
            for place, share, size in zip(devices, real, given.budgets, strict=True)
        ]
        fleet, plans = plan_fleet(specs, given.micro_batches)
        save_fleet(fleet, plans, folder / "fleet")
        before = {place.name: place.bytes_sent() for place in devices}
        run_fleet(folder / "fleet", fleet, devices, reviews.train, folder / "out", steps)
        sent = {place.name: place.bytes_sent() - before[place.name] for place in devices}
        told = {
            member.name: json.loads((folder / "out" / member.name / "report.json").read_text())
            for member in fleet.chain
        }
        hashes = {member.name: adapter_hash(folder / "out" / member.name) for member in fleet.chain}
        alone = run_alone(measured, given.micro_batches, reviews.train, folder, steps)
        seconds = [
            json.loads(line) for line in (folder / "out" / fleet.chain[0].name / "fleet.jsonl").read_text().splitlines()
        ]
    same = set(hashes.values()) == {alone}
    if given.json:
        figures = {"fleet": fleet.model_dump(mode="json", exclude={"timeline"}), "reports": told, "sent": sent}
        given.json.write_text(json.dumps(figures | {"equal": same, "updates": seconds}, indent=1))
    _print(report, given, fleet, told, sent, real)
    report.text(
        f"SHA-256 of the adapter after {given.updates} updates: {'equal' if same else 'NOT equal'} for all"
        f" {len(hashes)} members and one process that accumulates {given.micro_batches} micro-batches ({alone[:16]})."
    )
    if given.write:
        print(report.write("fleet", "Several devices", (__doc__ or "").split("\n\n", 2)[2]))
    if not same:
        sys.exit(1)


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _print(
    report: tables.Report,
    given: Any,
    fleet: FleetPlan,
    told: dict[str, dict[str, Any]],
    sent: dict[str, int],
    real: Sequence[float],
) -> None:
    table = Table(
        "device",
        "of a core",
        "measured share",
        "micro-batches",
        "budget, MiB",
        "peak: predicted",
        "measured",
        "sent per update, MB",
    )
    names = [f"device{number}" for number in range(len(given.quotas))]
    quotas, measured_share = dict(zip(names, given.quotas, strict=True)), dict(zip(names, real, strict=True))
    for member in fleet.chain:
        peak = told[member.name]["peak_bytes"]
        table.add_row(
            member.name,
            f"{quotas[member.name]:g}",
            f"{measured_share[member.name]:.3f}",
            str(member.micro_batches),
            f"{member.budget_bytes / MIB:,.0f}",
            f"{peak['predicted'] / MIB:,.1f}",
            f"{peak['measured'] / MIB:,.1f}",
            f"{sent[member.name] / given.updates / 1e6:.2f}",
        )
    report.table(table)
    first = told[fleet.chain[0].name]["fleet"]
    measured = first["seconds"]["measured"]
    report.text(
        f"A step of {fleet.micro_batches} micro-batches over links of {given.rate:g} Mbit/s: {fleet.makespan_seconds:.2f} s"
        f" predicted, {measured:.2f} s measured ({measured / fleet.makespan_seconds:.3f} x); proven bound"
        f" {fleet.bound_seconds:.2f} s (gap {fleet.gap:.2%}). Exchange: {fleet.exchange_seconds:.2f} s predicted,"
        f" {statistics.median([one['fleet']['exchange_seconds']['measured'] for one in told.values()]):.2f} s measured"
        f" (median of the members, waiting for the slowest included); {fleet.trained_bytes / 1e6:.2f} MB pass each way."
    )
    for baseline in fleet.baselines:
        if baseline.makespan_seconds is None:
            report.text(f"{baseline.name}: {baseline.reason}.")
        else:
            ratio = baseline.makespan_seconds / fleet.makespan_seconds
            report.text(f"{baseline.name}: {baseline.makespan_seconds:.2f} s predicted, {ratio:.2f} x.")


if __name__ == "__main__":
    main()
