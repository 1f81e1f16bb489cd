"""Four devices on one machine, as different as they come: each has its share of a core, its memory cap and its own
link.

    python tests/benchmarks/fleet.py [--kinds data,pipeline] [--rates 100,10] [--quotas 1,.5,.25,.1]
        [--budgets 160,240,320,569] [--micro-batches 32] [--updates 3] [--equal] [--json FILE] [--write]

SmolLM2-135M on film reviews. A device is a network namespace with a limited link (`tc`), a share of a core (cgroup) and
a memory cgroup for each run; every device measures its own profile in its place. "x" is relative to the plan's
predicted step. It needs root, and a Linux with network namespaces and token buckets.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fleet_kinds import plan_data, plan_pipeline

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

import tables
from rich.table import Table

from examples.reviews import SEQ, fetch
from tightfit.planner.fleet.io import save_fleet, sealed_fleet
from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.parts import link_bytes
from tightfit.planner.fleet.schema import FleetPlan, Link
from tightfit.planner.io import save_plan
from tightfit.planner.plan import planner_of
from tightfit.profiles.api import profile
from tightfit.profiles.io import load_profile
from tightfit.profiles.schema import Profile, adamw
from tightfit.runtime.common.interpreter import command, python_path

MIB = 1 << 20
PERIOD = 100_000
"""microseconds in which a device gets its share of a core"""
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
import torch
torch.set_num_threads(1)
left, right = torch.randn(256, 576, dtype=torch.bfloat16), torch.randn(576, 1536, dtype=torch.bfloat16)
room = torch.randn(1 << 20)
while True:
    for _ in range(10):
        left @ right
    room.mul_(1.0)
"""
"""a program that computes as a training process does, without end"""


def measured_together(devices: Sequence[Place], model: Path, batch: int, folder: Path) -> dict[str, Profile]:
    """Each device's profile of the model, measured in its place while all others compute too, as they do in a step."""
    profile(str(model), batch=batch, seq=SEQ, lora_rank=8, threads=1)  # packs the weights once
    environment = os.environ | {"PYTHONPATH": python_path()}
    measuring: dict[str, subprocess.Popen[bytes]] = {}
    computing: list[subprocess.Popen[bytes]] = []
    for place in devices:
        words = command("tightfit.runtime.cli.main", "profile", str(model), "--batch", str(batch), "--seq", str(SEQ))
        words += ["--lora-rank", "8", "--threads", "1", "--force", "-o", str(folder / f"{place.name}.json")]
        measuring[place.name] = subprocess.Popen(place.inside(words), env=environment, stdout=subprocess.DEVNULL)
    by_name = {place.name: place for place in devices}
    try:
        while measuring:
            for name, child in list(measuring.items()):
                if child.poll() is None:
                    continue
                if child.returncode:
                    raise RuntimeError(f"measuring {name} ended with code {child.returncode}")
                del measuring[name]
                words = by_name[name].inside([sys.executable, "-c", WORK])
                computing.append(subprocess.Popen(words))
            time.sleep(0.2)
    finally:
        for child in [*computing, *measuring.values()]:
            child.kill()
            child.wait()
    return {place.name: load_profile(folder / f"{place.name}.json") for place in devices}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a fleet's run left."""

    reports: dict[str, dict[str, Any]]
    sent: dict[str, int]
    """bytes that each device has sent, with headers"""
    hashes: dict[str, str]
    seconds: list[float]
    """of each update"""


def run_fleet(folder: Path, fleet: FleetPlan, devices: Sequence[Place], data: Path, out: Path, steps: int) -> Ran:
    """Run every member in its place; raises RuntimeError with what it said where one fails."""
    by_name = {place.name: place for place in devices}
    first = by_name[fleet.names[0]]
    environment = os.environ | {"PYTHONPATH": python_path()}
    running = {}
    out.mkdir(parents=True, exist_ok=True)
    before = {name: by_name[name].bytes_sent() for name in fleet.names}
    for name in fleet.names:
        words = command("tightfit.runtime.cli.main", "fleet", "run", str(folder), "--data", str(data))
        words += ["--steps", str(steps), "--lr", str(LEARNING_RATE), "--checkpoint-every", "0", "-o", str(out)]
        words += ["--member", name, "--at", f"{first.address}:{PORT}", "--json", "--overwrite"]
        with (out / f"{name}.log").open("wb") as log:
            running[name] = subprocess.Popen(
                by_name[name].inside(words), env=environment, stdout=log, stderr=subprocess.STDOUT
            )
    failed = [name for name, child in running.items() if child.wait()]
    if failed:
        raise RuntimeError("\n".join(f"{name}: {(out / f'{name}.log').read_text()[-2000:]}" for name in failed))
    lines = (out / fleet.names[0] / "fleet.jsonl").read_text().splitlines()
    return Ran(
        reports={name: json.loads((out / name / "report.json").read_text()) for name in running},
        sent={name: by_name[name].bytes_sent() - before[name] for name in running},
        hashes={name: adapter_hash(out / name) for name in running},
        seconds=[json.loads(line)["seconds"] for line in lines],
    )


def equal_shares(fleet: FleetPlan) -> FleetPlan:
    """The same members, each with as many micro-batches. Gradients wait on disk: in memory, those of more micro-batches
    than planned have no room.
    """
    replicas, first = [], 0
    for rank, replica in enumerate(fleet.replicas):
        count = fleet.micro_batches // len(fleet.replicas) + (rank < fleet.micro_batches % len(fleet.replicas))
        changes = {"first": first, "micro_batches": count, "gradients": "disk"}
        replicas.append(replica.model_copy(update=changes))
        first += count
    return sealed_fleet(fleet.model_copy(update={"replicas": replicas}))


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
    parser.add_argument("--kinds", default="data,pipeline", help="data, pipeline or both")
    parser.add_argument("--rates", type=_numbers, default=[100.0], help="megabits per second of every link, each way")
    parser.add_argument("--quotas", type=_numbers, default=[1.0, 0.5, 0.25, 0.1], help="of a core, of each device")
    parser.add_argument("--budgets", type=_numbers, default=[160, 240, 320, 569], help="MiB, of each device")
    parser.add_argument("--micro-batches", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--equal", action="store_true", help="measure equal shares, too")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/fleet.md")
    given = parser.parse_args()
    report = tables.Report()
    reviews = fetch()
    steps = given.updates * given.micro_batches
    figures: list[dict[str, Any]] = []
    same = True
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        folder = Path(name)
        with places(given.quotas, given.rates[0]) as devices:
            profiles = measured_together(devices, reviews.model, given.batch, folder)
        alone = run_alone(next(iter(profiles.values())), given.micro_batches, reviews.train, folder, steps)
        for kind, rate in itertools.product(given.kinds.split(","), given.rates):
            link = Link(up_bytes_per_second=rate * 1e6 / 8, down_bytes_per_second=rate * 1e6 / 8)
            specs = [
                MemberSpec(name=name, profile=measured, budget_bytes=int(size * MIB), link=link)
                for (name, measured), size in zip(profiles.items(), given.budgets, strict=True)
            ]
            planned = plan_data if kind == "data" else plan_pipeline
            fleet, plans = planned(specs, given.micro_batches)
            place = folder / f"{kind}-{rate:g}"
            save_fleet(fleet, plans, place)
            with places(given.quotas, rate) as devices:
                ran = run_fleet(place, fleet, devices, reviews.train, place / "out", steps)
                wanted = {alone} if kind == "data" else {alone, *ran.hashes.values()}
                equal = set(ran.hashes.values()) == wanted and ran.hashes[fleet.names[0]] == alone
                same &= equal
                _print(report, given, rate, fleet, ran)
                whose = (
                    f"all {len(ran.hashes)} members" if kind == "data" else "the first member, which saves the whole,"
                )
                report.text(
                    f"SHA-256 of the adapter after {given.updates} updates: {'equal' if equal else 'NOT equal'} for {whose}"
                    f" and one process that accumulates {given.micro_batches} micro-batches ({alone[:16]})."
                )
                told = {"fleet": fleet.model_dump(mode="json"), **asdict(ran), "equal": equal}
                figures.append({"kind": kind, "rate": rate, **told})
                if given.equal and fleet.kind == "data parallel":
                    shares = equal_shares(fleet)
                    save_fleet(shares, plans, place / "equal")
                    other = run_fleet(
                        place / "equal", shares, devices, reviews.train, place / "equal-out", given.micro_batches
                    )
                    ratio = other.seconds[0] / statistics.median(ran.seconds)
                    report.text(f"equal shares: {other.seconds[0]:.2f} s measured, {ratio:.2f} x.")
            if given.json:
                given.json.write_text(json.dumps(figures, indent=1))
    if given.write:
        print(report.write("fleet", "Several devices", (__doc__ or "").split("\n\n", 2)[2]))
    if not same:
        sys.exit(1)


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _print(report: tables.Report, given: Any, rate: float, fleet: FleetPlan, ran: Ran) -> None:
    share = "layers" if fleet.cut else "micro-batches"
    columns = ("device", "of a core", share, "budget, MiB", "peak: predicted", "measured", "sent per update, MB")
    table = Table(*columns)
    quotas = {f"device{number}": quota for number, quota in enumerate(given.quotas)}
    for name in fleet.names:
        peak, part = ran.reports[name]["peak_bytes"], fleet.part(name)
        table.add_row(
            name,
            f"{quotas[name]:g}",
            f"{part.layers[0]} to {part.layers[1] - 1}, {part.ahead} ahead"
            if fleet.cut
            else str(fleet.replica(name).micro_batches),
            f"{fleet.member(name).budget_bytes / MIB:,.0f}",
            f"{peak['predicted'] / MIB:,.1f}",
            f"{peak['measured'] / MIB:,.1f}",
            f"{ran.sent[name] / given.updates / 1e6:.2f}",
        )
    report.table(table)
    measured = statistics.median(ran.seconds[1:] or ran.seconds)
    waiting = [one["fleet"]["exchange_seconds"]["measured"] for one in ran.reports.values()]
    report.text(
        f"{fleet.kind}: a step of {fleet.micro_batches} micro-batches over links of {rate:g} Mbit/s: {fleet.makespan_seconds:.2f} s"
        f" predicted, {measured:.2f} s measured ({measured / fleet.makespan_seconds:.3f} x); proven bound"
        f" {fleet.bound_seconds:.2f} s (gap {fleet.gap:.2%}). Exchanging and waiting for others: {statistics.median(waiting):.2f} s"
        " measured (median of the members)."
    )
    if not fleet.cut:
        report.text(
            f"Exchange: {fleet.exchange_seconds:.2f} s predicted; {fleet.trained_bytes / 1e6:.2f} MB pass each way."
        )
    else:
        passed = ", ".join(f"{size / 1e6:.2f}" for size in link_bytes(fleet))
        report.text(f"Over the cuts pass {passed} MB in a step, both ways together.")
    for baseline in fleet.baselines:
        if baseline.makespan_seconds is None:
            report.text(f"{baseline.name}: {baseline.reason}.")
        else:
            ratio = baseline.makespan_seconds / fleet.makespan_seconds
            report.text(f"{baseline.name}: {baseline.makespan_seconds:.2f} s predicted, {ratio:.2f} x.")


if __name__ == "__main__":
    main()
