"""Profiles of a device and of a server that trains a side network beside a small decoder, without measured times, and
the plan of both.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fleet_kinds import plan_side
from torch._subclasses import FakeTensorMode

from tightfit.planner.fleet.io import save_fleet
from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.schema import Link
from tightfit.profiles.models.side_shape import CONFIG_KEY, INPUT, SideShape

LINK = Link(up_bytes_per_second=1e8, down_bytes_per_second=1e8)
BUDGET = 400 << 20


def side_profile(profile, side: SideShape):
    """The profile of a side network beside the decoder of `profile`, which keeps its weights in the same store."""
    from tightfit.profiles.models.decoder_config import decoder_shape
    from tightfit.profiles.models.side_network import SideNetwork
    from tightfit.profiles.sources.lookup import resolve
    from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS, INFERENCE
    from tightfit.profiles.tracing.trace import trace
    from tightfit.runtime.engine.weights.store import find_extent

    source = resolve(profile.model.source)
    shape, dtype = decoder_shape(source.config), getattr(torch, profile.compute_dtype)
    with FakeTensorMode():
        module = SideNetwork(shape, side, dtype=dtype)
        tokens = torch.zeros(profile.batch, profile.seq, dtype=torch.int64)
        sample = {"labels": tokens}
        for number in range(len(side.blocks)):
            sample[f"{INPUT}.{number}"] = torch.zeros(tokens.numel(), shape.hidden, dtype=dtype)
    traced = trace(module, sample, decompositions=DECOMPOSITIONS, inference=INFERENCE)
    tensors = [
        t.model_copy(update={"packed_bytes": find_extent(source.entries, t.name).bytes}) if t.kind == "weight" else t
        for t in traced.tensors
    ]
    config = profile.model.config | {CONFIG_KEY: side.as_json()}
    return profile.model_copy(
        update={
            "fingerprint": "s" * 64,
            "model": profile.model.model_copy(update={"config": config, "lora": None}),
            "tensors": tensors,
            "programs": traced.programs,
            "layers": traced.layers,
            "loss": traced.loss,
            "token_losses": traced.token_losses,
        }
    )


def specs_of(profile, side: SideShape):
    """The device and the server, as the planner takes them."""
    both = {"device": profile, "server": side_profile(profile, side)}
    return [MemberSpec(name=name, profile=one, budget_bytes=BUDGET, link=LINK) for name, one in both.items()]


def write_fleet(folder: Path, profile, side: SideShape, *, micro_batches: int, bits: int):
    """Plans of both members in `folder`; the fleet's plan."""
    fleet, plans = plan_side(specs_of(profile, side), micro_batches, bits=bits, time_limit=20.0)
    save_fleet(fleet, plans, folder)
    return fleet


def as_process(folder: Path, name: str, port: int, out: Path, options: dict) -> list[str]:
    """The command line of a process that runs one member; `options` of `run`. Only the device gets data."""
    import sys

    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from tightfit.planner.fleet.io import load_fleet, load_member_plan\n"
        "from tightfit.runtime.session.fleet import membership\nfrom tightfit.runtime.session.launch import run\n"
        "folder, name, port, out, options = sys.argv[1:]\nfolder = Path(folder)\n"
        "fleet = load_fleet(folder)\n"
        "member = membership(fleet, name, '127.0.0.1', int(port), folder / 'fleet.key', 60.0)\n"
        "options = {'data': 'random'} | json.loads(options)\n"
        "if name != fleet.names[0]:\n    options['data'] = '/does/not/exist'\n"
        "report = run(load_member_plan(folder, fleet, name), out=out, member=member, **options)\n"
        "print(json.dumps(report))\n"
    )
    return [sys.executable, "-c", code, str(folder), name, str(port), str(out), json.dumps(options)]
