"""The method `mobillm` of `convergence.py`: trains a side network by two processes here, and judges it by transformers.

The device has the cap of all methods, the server 1 GiB; both share this machine's cores, so that measured seconds are
longer than those of two machines.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from fleet_kinds import plan_side
from safetensors.torch import load_file
from side_networks import as_process
from torch import Tensor
from torch.nn import functional as F

from tightfit.planner.fleet.io import load_fleet, save_fleet
from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.schema import FleetPlan, Link
from tightfit.profiles.api import profile
from tightfit.profiles.schema import Profile
from tightfit.runtime.engine.fleet.message import Passing, put, take

RANK, BITS = 64, 8
SERVER_BYTES = 1 << 30
LINK = Link(up_bytes_per_second=12.5e6, down_bytes_per_second=12.5e6, latency_seconds=2e-3)


def planned_pair(made: Profile, source: str, cap: int, folder: Path) -> FleetPlan:
    """The plan of both members, whose device has the profile `made`; from `folder` where it is there."""
    if (folder / "fleet.json").exists() and (found := load_fleet(folder)).members[0].budget_bytes == cap:
        return found
    threads = made.device.threads
    server = profile(source, batch=made.batch, seq=made.seq or 0, threads=threads, side_rank=RANK)
    specs = [
        MemberSpec(name="device", profile=made, budget_bytes=cap, link=LINK),
        MemberSpec(name="server", profile=server, budget_bytes=SERVER_BYTES, link=LINK),
    ]
    fleet, plans = plan_side(specs, 1, bits=BITS)
    save_fleet(fleet, plans, folder)
    return fleet


def trained_pair(fleet: FleetPlan, folder: Path, data: Path, out: Path, *, steps: int, lr: float, every: int) -> Path:
    """The server's folder of a run with all its checkpoints, made now or finished, unless it is there."""
    if (out / "server" / f"checkpoint-{steps}").exists():
        return out / "server"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "data": str(data), "steps": steps, "lr": lr, "checkpoint_every": every, "keep_checkpoints": 1000, "truncate": True,
        "resume": all(any((out / one.name).glob("checkpoint-*")) for one in fleet.members), "overwrite": True,
    }  # fmt: skip
    running = [
        subprocess.Popen(as_process(folder, one.name, port, out / one.name, options), stdout=subprocess.DEVNULL)
        for one in fleet.members
    ]
    if any(process.wait() for process in running):
        raise SystemExit("a member of the mobillm fleet has failed; its message is above")
    return out / "server"


class SideJudge:
    """Loss and next-token accuracy of a side network beside transformers' model, whose outputs are rounded as they are
    for messages.
    """

    def __init__(self, model: torch.nn.Module, fleet: FleetPlan, records: Any, samples: int) -> None:
        """`model`: transformers' causal language model in bfloat16; `records`: of held-out samples, of which the first
        `samples` are judged.
        """
        self.model, self.fleet, self.records, self.samples = model, fleet, records, samples
        self.outputs: dict[int, Tensor] = {}
        for block in fleet.blocks:
            model.model.layers[block].register_forward_hook(self._keeping(block))  # type: ignore[union-attr,index]

    def _keeping(self, block: int) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            made = output[0] if isinstance(output, tuple) else output
            flat = made.reshape(-1, made.shape[-1]).contiguous()
            passing = Passing(shape=tuple(flat.shape), dtype=str(flat.dtype).removeprefix("torch."))
            room = torch.zeros(passing.wire_bytes(self.fleet.bits), dtype=torch.uint8)
            put(flat, room, self.fleet.bits)
            taken = torch.empty_like(flat)
            take(room, taken, self.fleet.bits)
            self.outputs[block] = taken.view(made.shape)

        return keep

    def logits(self, side: dict[str, Tensor], ids: Tensor) -> Tensor:
        self.model(input_ids=ids)
        state: Tensor | None = None
        eps = self.model.config.rms_norm_eps
        for place, block in enumerate(self.fleet.blocks):
            wide = self.outputs[block].float()
            x = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            if state is not None:
                share = torch.sigmoid(side[f"side.{place}.gate"])
                x = share * x + (1 - share) * state
            added = F.silu(x @ side[f"side.{place}.down.weight"].T) @ side[f"side.{place}.up.weight"].T
            state = added if state is None else state + added
        last = self.outputs[self.fleet.blocks[-1]]
        assert state is not None
        hidden = (last.float() + state).to(last.dtype)
        return self.model.lm_head(self.model.model.norm(hidden)).float()  # type: ignore[operator,union-attr,no-any-return]

    @torch.no_grad()
    def __call__(self, checkpoint: Path) -> dict[str, float]:
        side = load_file(checkpoint / "model.safetensors")
        total, right, count = 0.0, 0, 0
        for begin in range(0, min(self.samples, self.records.count), self.fleet.batch):
            rows = range(begin, min(begin + self.fleet.batch, self.records.count))
            inputs, labels = (torch.empty(len(rows), self.records.seq, dtype=torch.int64) for _ in range(2))
            self.records.fill(rows, inputs, labels)
            asked = labels.flatten() >= 0
            logits, wanted = self.logits(side, inputs).flatten(0, 1)[asked], labels.flatten()[asked]
            total += float(F.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(1) == wanted).sum())
            count += len(wanted)
        return {"loss": total / count, "accuracy": right / count}


def judged_pair(fleet: FleetPlan, folder: Path, judge: SideJudge, start: dict[str, float], lr: float) -> dict[str, Any]:
    """What a run was like, with its curve on held-out texts from `start` on, in the form of `convergence.judged`."""
    lines = [json.loads(line) for line in (folder / "fleet.jsonl").read_text().splitlines()]
    report = json.loads((folder.parent / "device" / "report.json").read_text())
    curve = [{"step": 0, "seconds": 0.0, **start}]
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        step = int(path.name.split("-")[1])
        curve.append({"step": step, "seconds": sum(line["seconds"] for line in lines[:step]), **judge(path)})
    measured = statistics.median(line["seconds"] for line in lines[1:])
    return {
        "policy": fleet.kind,
        "lr": lr,
        "peak_bytes": report["peak_bytes"],
        "step_seconds": {"predicted": fleet.makespan_seconds, "measured": measured},
        "enforced_by": report["enforced_by"],
        "curve": curve,
    }
