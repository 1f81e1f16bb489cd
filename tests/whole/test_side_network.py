"""A device and a server as real processes: the side network is what PyTorch's autograd trains beside the same
decoder.
"""

from __future__ import annotations

import json
import socket
import subprocess

import pytest
import torch
from reference import evaluated, stored_weights, take, training_batches
from rich.console import Console
from safetensors.torch import load_file
from side_networks import as_process, write_fleet
from tiny_plans import CONFIG, decoder_profile, device
from torch.nn import functional as F

from tightfit.profiles.models.side_shape import SideShape
from tightfit.runtime.engine.training.adapter import initialise
from tightfit.runtime.supervision.report_text import report_text

CONFIG = CONFIG | {"num_hidden_layers": 4, "hidden_act": "silu"}
SIDE = SideShape(blocks=(0, 2, 3), rank=8)
MICRO_BATCHES, LR, SEED = 2, 1e-2, 3
OPTIONS = {
    "steps": 6, "lr": LR, "seed": SEED, "checkpoint_every": 0, "eval_data": "random", "cgroup": False, "overwrite": True,
}  # fmt: skip

NO_DATA = {"eval_data": None}
"""of the server"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """float32, so that the reference may be compared closely; one thread, since two processes run at once."""
    made = decoder_profile(tmp_path_factory.mktemp("store"), config=CONFIG, dtype="float32")
    return made.model_copy(update={"device": device(threads=1)})


def run_fleet(folder, profile, *, bits, **options):
    """Both members' reports, by name."""
    fleet = write_fleet(folder, profile, SIDE, micro_batches=MICRO_BATCHES, bits=bits)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = fleet.names
    running = [
        subprocess.Popen(
            as_process(folder, name, port, folder / name, OPTIONS | options | ({} if name == "device" else NO_DATA)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    told = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return dict(zip(names, map(json.loads, told), strict=True))


@pytest.fixture(scope="module")
def exact(profile, tmp_path_factory):
    """The folder and the reports of a run whose messages are not rounded."""
    folder = tmp_path_factory.mktemp("exact")
    return folder, run_fleet(folder, profile, bits=0)


class Eager:
    """transformers' decoder on the dequantised weights, and a side network written down again, without tightfit's
    modules.
    """

    def __init__(self, profile):
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIG))
        self.model.requires_grad_(False)
        take(self.model, stored_weights(profile.model.store), CONFIG)
        self.outputs = {}
        for block in SIDE.blocks:
            self.model.model.layers[block].register_forward_hook(
                lambda module, inputs, output, block=block: self.outputs.update(
                    {block: output[0] if isinstance(output, tuple) else output}
                )
            )
        hidden = CONFIG["hidden_size"]
        self.side = {}
        for place in range(len(SIDE.blocks)):
            shapes = {"down.weight": (SIDE.rank, hidden), "up.weight": (hidden, SIDE.rank)} | (
                {"gate": (1,)} if place else {}
            )
            for name, shape in shapes.items():
                self.side[f"side.{place}.{name}"] = value = torch.empty(shape)
                initialise(f"side.{place}.{name}", SEED, value)
                value.requires_grad_(True)

    def losses(self, ids, labels):
        """The negative log-likelihood of every token, 0 where there is no label."""
        self.model(input_ids=ids)
        state = None
        for place, block in enumerate(SIDE.blocks):
            got = self.outputs[block]
            x = got / (got.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt()
            own = {name: self.side.get(f"side.{place}.{name}") for name in ("down.weight", "up.weight", "gate")}
            if state is not None:
                x = torch.lerp(state, x, own["gate"].sigmoid())
            added = F.silu(x @ own["down.weight"].T) @ own["up.weight"].T
            state = added if state is None else state + added
        logits = self.model.lm_head(self.model.model.norm(self.outputs[SIDE.blocks[-1]] + state))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")


@pytest.mark.slow
def test_the_side_network_is_what_autograd_trains(profile, exact):
    folder, reports = exact
    eager = Eager(profile)
    batches = training_batches(folder / "device", OPTIONS["steps"], profile.batch, profile.seq, SEED)
    optimizer = torch.optim.AdamW(eager.side.values(), lr=LR, weight_decay=0.0)
    losses = []
    for step in range(0, OPTIONS["steps"], MICRO_BATCHES):
        total, count = 0.0, 0
        for inputs in batches[step : step + MICRO_BATCHES]:
            own = eager.losses(*inputs)
            total, count = total + own.sum(), count + int((inputs[1] >= 0).sum())
            losses.append(float(own.detach().sum()) / int((inputs[1] >= 0).sum()))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    for report in reports.values():
        assert report["loss"] == pytest.approx(losses, rel=1e-5)
    saved = load_file(folder / "server" / "side" / "model.safetensors")
    assert set(saved) == set(eager.side)
    states = load_file(folder / "server" / f"checkpoint-{OPTIONS['steps']}" / "optimizer.safetensors")
    for name, value in eager.side.items():
        moment = optimizer.state[value]["exp_avg"]
        torch.testing.assert_close(states[f"adam_m:{name}"], moment, rtol=1e-3, atol=1e-3 * float(moment.abs().max()))
        torch.testing.assert_close(saved[name], value.detach(), rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_rounded_messages_change_the_result_a_little_and_the_report_says_what_it_is(profile, exact, tmp_path):
    rounded = run_fleet(tmp_path, profile, bits=8)
    loss, unrounded = rounded["server"]["loss"], exact[1]["server"]["loss"]
    assert loss != unrounded
    assert loss == pytest.approx(unrounded, rel=2e-2)
    assert rounded["device"]["loss"] == loss
    for report in rounded.values():
        assert report["peak_bytes"]["measured"] <= report["peak_bytes"]["predicted"]
    told = json.loads((tmp_path / "server" / "side" / "side_config.json").read_text())
    assert told["blocks"] == list(SIDE.blocks)
    assert (told["rank"], told["message_bits"], told["dtype"]) == (SIDE.rank, 8, "float32")
    assert "no adapter" in told["what"]
    assert rounded["device"]["adapter"] is None
    for report in rounded.values():
        assert report["policy"] == "mobillm"
        assert report["fleet"]["result"].startswith("a side network")
        console = Console(width=200)
        with console.capture() as captured:
            console.print(report_text(report))
        assert "a side network, which the server trains" in captured.get()
    assert list((tmp_path / "server" / "data").iterdir()) == []  # the data stay on the device
    assert rounded["server"]["adapter"] == str(tmp_path / "server" / "side")


@pytest.mark.slow
def test_before_training_the_side_network_is_the_decoder_and_a_run_that_goes_on_is_the_whole_one(
    profile, exact, tmp_path
):
    folder, whole = exact
    eager = Eager(profile)
    loss = evaluated(eager.model, folder / "device", profile.batch, profile.seq)
    for report in whole.values():
        assert report["evaluation"]["before"]["loss"] == pytest.approx(loss, rel=1e-5)
        assert report["evaluation"]["after"]["loss"] != report["evaluation"]["before"]["loss"]
    run_fleet(tmp_path, profile, bits=0, steps=2)
    resumed = run_fleet(tmp_path, profile, bits=0, overwrite=False, resume=True)
    assert resumed["server"]["loss"] == whole["server"]["loss"]
    files = [place / "server" / "side" / "model.safetensors" for place in (folder, tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()
