"""Small fleets on this machine: a traced model without measured times, a plan for each member, processes that run them.

`python fleets.py FLEET.json NAME PORT OUT OPTIONS` runs one member, and `python fleets.py PLAN.json OUT OPTIONS` a plan
alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from tiny_plans import CONFIG, decoder_profile  # noqa: E402  a member's process finds it beside this file

from tightfit.planner.fleet.io import plan_file  # noqa: E402
from tightfit.planner.fleet.part_profiles import cuts, stage_profile  # noqa: E402
from tightfit.planner.fleet.schema import FleetPlan, Link, Member, Part, Passed, Replica  # noqa: E402
from tightfit.planner.io import load_plan, save_plan  # noqa: E402
from tightfit.planner.plan import planner_of  # noqa: E402
from tightfit.profiles.models.lora import LoraConfig  # noqa: E402
from tightfit.profiles.schema import EXCHANGE, adamw  # noqa: E402
from tightfit.runtime.common.errors import TightfitError  # noqa: E402
from tightfit.runtime.engine.fleet.keys import new_pairs  # noqa: E402
from tightfit.runtime.session.fleet import free_port, membership  # noqa: E402
from tightfit.runtime.session.launch import run  # noqa: E402

BUDGET = 400 << 20
LINK = Link(up_bytes_per_second=1e8, down_bytes_per_second=1e8)
TIMEOUT = 60.0


class Workshop:
    """A folder with the plans of one model, for one process and for a fleet's members."""

    def __init__(
        self, folder: Path, micro_batches: int, *, layers: int = 2, lora: LoraConfig | None = None, config: Any = CONFIG
    ) -> None:
        self.folder, self.micro_batches = folder, micro_batches
        traced = decoder_profile(folder, config={**config, "num_hidden_layers": layers}, lora=lora)
        # One thread for each of several processes on two cores.
        profile = traced.model_copy(update={"device": traced.device.model_copy(update={"threads": 1})})
        self.profile = profile
        self.trained_bytes = sum(tensor.bytes for tensor in profile.tensors if tensor.kind == "trainable")
        alone = profile.model_copy(update={"optimizer": adamw(micro_batches)})
        save_plan(planner_of(alone).plan(BUDGET), folder / "alone.json")
        exchanges = {"name": EXCHANGE, "state_tensors": 0, "accumulate": micro_batches}
        save_plan(
            planner_of(profile.model_copy(update={"optimizer": exchanges})).plan(BUDGET), folder / plan_file("member")
        )

    def fleet(self, shares, shelves) -> FleetPlan:
        """A fleet whose members compute so many micro-batches each; `shelves`: (gradients, states) of each, in turn."""
        replicas, first = [], 0
        for number, share in enumerate(shares):
            gradients, states = shelves[number % len(shelves)]
            part = self._part(number, "member")
            replicas.append(Replica(parts=[part], first=first, micro_batches=share, gradients=gradients, states=states))
            first += share
        assert first == self.micro_batches
        return self._fleet(
            "data parallel", replicas, compute_seconds=0.8, exchange_seconds=0.1, update_seconds=0.1, bit_identical=True
        )

    def pipeline(self, at, ahead, bits=0) -> FleetPlan:
        """A pipeline cut before each of the layers `at`; `ahead` is that of each member. Writes the members' plans."""
        where = {cut.at: cut for cut in cuts(self.profile)}
        edges = [None, *(where[one] for one in at), None]
        tensors = {tensor.name: tensor for tensor in self.profile.tensors}

        def passed(names):
            return [Passed(shape=tensors[name].shape, dtype=tensors[name].dtype) for name in names]

        parts = []
        for number, (below, above) in enumerate(itertools.pairwise(edges)):
            profile = stage_profile(self.profile, below, above, micro_batches=self.micro_batches, bits=bits)
            name = f"stage-{number}-of-{'-'.join(map(str, at))}-{bits}"
            save_plan(planner_of(profile).plan(BUDGET), self.folder / plan_file(name))
            parts.append(
                self._part(
                    number,
                    name,
                    layers=[below.at if below else 0, above.at if above else len(self.profile.layers)],
                    layer_names=[profile.layers[0].name],
                    ahead=ahead[number],
                    up=passed(above.up) if above else [],
                    down=passed(below.down) if below else [],
                    forward_seconds=0.1,
                )
            )
        replica = Replica(parts=parts, micro_batches=self.micro_batches)
        return self._fleet("pipeline", [replica], bits=bits, bit_identical=not bits)

    def _part(self, number, plan, **fields) -> Part:
        """What member `number` computes by the plan of that name."""
        return Part(
            member=f"m{number}", plan=plan, plan_fingerprint="x", peak_bytes=1, micro_batch_seconds=0.1,
            bound_seconds=0.1, **fields,
        )  # fmt: skip

    def _fleet(self, kind, replicas, **fields) -> FleetPlan:
        """A plan in which every part is a member's."""
        members = [
            Member(name=part.member, device="test", measured=True, budget_bytes=BUDGET, link=LINK)
            for replica in replicas
            for part in replica.parts
        ]
        return FleetPlan(
            fingerprint="x", kind=kind, model="tiny", batch=2, micro_batches=self.micro_batches,
            accumulate=self.micro_batches, members=members, replicas=replicas, trained_bytes=self.trained_bytes,
            makespan_seconds=1.0, bound_seconds=1.0, gap=0.0, solve_seconds=0.0, **fields,
        )  # fmt: skip

    def alone(self, out: Path, **options) -> str:
        """Run one process that accumulates all micro-batches; returns the hash of its adapter."""
        subprocess.run(command(self.folder / "alone.json", out, json.dumps(options)), check=True)
        return adapter_hash(out)

    def start(self, fleet: FleetPlan, out: Path, **options) -> dict[str, subprocess.Popen]:
        """Start every member; its folder is `out` / name. `options` of one member alone under its name."""
        port = free_port(count=len(fleet.members))
        path = self.folder / f"fleet-{port}.json"
        path.with_suffix(".key").write_text(json.dumps(new_pairs(member.name for member in fleet.members)))
        path.write_text(fleet.model_dump_json())
        own = {member.name: options.pop(member.name, {}) for member in fleet.members}
        return {
            name: subprocess.Popen(
                command(path, name, str(port), out / name, json.dumps(options | own[name])),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for name in own
        }


def command(*arguments) -> list[str]:
    return [sys.executable, __file__, *map(str, arguments)]


def ended(members: dict[str, subprocess.Popen], timeout: float = 120.0) -> dict[str, tuple[int, str]]:
    """Exit code and output of every member, once all have ended."""
    said = {name: member.communicate(timeout=timeout)[0] for name, member in members.items()}
    return {name: (member.returncode, said[name]) for name, member in members.items()}


def kill_training(member):
    """Kill the training process of a member that runs here, with the process that supervises it."""
    import psutil

    for child in psutil.Process(member.pid).children(recursive=True):
        child.kill()
    member.kill()


def adapter_hash(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def main(arguments: list[str]) -> int:
    options = json.loads(arguments[-1])
    data = options.pop("data", "random")
    try:
        if len(arguments) == 3:
            run(load_plan(Path(arguments[0])), data, out=arguments[1], **options)
        else:
            path, name, port, out = arguments[:4]
            fleet = FleetPlan.model_validate_json(Path(path).read_text())
            seat = membership(fleet, name, "127.0.0.1", int(port), Path(path).with_suffix(".key"), TIMEOUT)
            file = Path(path).parent / plan_file(fleet.part(name).plan)
            run(load_plan(file), data, out=out, member=seat, **options)
    except TightfitError as error:
        sys.stdout.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
