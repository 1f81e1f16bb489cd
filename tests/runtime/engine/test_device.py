"""The seam for other devices: an engine on an arena apart from host memory computes the same bits, by copies that it
asks for.
"""

from __future__ import annotations

import pytest
from apart import Apart
from in_process import LazyChannel, drawn_records, make_training
from late_device import Late
from tiny_plans import decoder_profile, naive_plan

from tightfit.planner.instructions import Fetch, Read, Spill
from tightfit.planner.problem.tensor_index import TensorIndex
from tightfit.runtime.common.errors import CapError, InputError
from tightfit.runtime.engine.cpu.cpu import Cpu
from tightfit.runtime.engine.device.device import ReachedMark
from tightfit.runtime.engine.device.meter import Meter
from tightfit.runtime.engine.training.devices import open_device

STEPS = 3
NO_CAP = Meter(1 << 60)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return decoder_profile(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def records(tmp_path_factory, profile):
    """A sample for each row of the steps; they are what is evaluated as well."""
    path = tmp_path_factory.mktemp("data") / "few.records"
    return drawn_records(path, profile.batch * (STEPS + 1), 3, seq=profile.seq)


@pytest.fixture(scope="module")
def plan(profile):
    """With everything that moves: streamed, packed and unpacked weights, a spilled activation, states that are away."""
    of = {kind: [t.name for t in profile.tensors if t.kind == kind] for kind in ("activation", "trainable", "weight")}
    spilled = [name for name in of["activation"] if name.endswith("/out0") and "layers" in name][:1]
    return naive_plan(
        profile, spill=spilled, offload=of["trainable"][::2], packed=of["weight"][1:4], unpacked=of["weight"][5:8]
    )


def trained(plan, records, folder, device):
    """Losses, an evaluation, and the bytes of adapter and states; then the same again from the checkpoint."""
    folder.mkdir()
    late = isinstance(device, Late)
    training = make_training(plan, records, folder, lr=1e-2, device=device, channel=LazyChannel() if late else None)
    if late:
        device.take_over(training.executor)
    training.initialise()
    losses = [training.step(number) for number in range(1, STEPS + 1)]
    found = training.evaluate(records, lambda done, of: None)["loss"]
    state = training.save_state(str(folder))
    saved = [(folder / name).read_bytes() for name in ("adapter_model.safetensors", "optimizer.safetensors")]
    training.load_state(str(folder), state)
    losses.append(training.step(STEPS + 1))
    training.close()
    return losses, found, saved


@pytest.fixture(scope="module")
def expected(plan, records, tmp_path_factory):
    return trained(plan, records, tmp_path_factory.mktemp("expected") / "cpu", None)


def test_an_arena_apart_from_host_memory_gives_the_same_bits(plan, records, expected, tmp_path):
    apart = Apart(plan.arena_bytes, NO_CAP, most=plan.arena_bytes)
    assert trained(plan, records, tmp_path / "apart", apart) == expected
    assert apart.put_bytes
    assert apart.got_bytes


def test_what_a_step_copies_is_what_the_plan_says(plan, records, tmp_path):
    apart = Apart(plan.arena_bytes, NO_CAP)
    training = make_training(plan, records, tmp_path, lr=1e-2, device=apart)
    training.initialise()
    before = apart.put_bytes, apart.got_bytes
    training.step(1)
    training.channel.drain()
    tensors = TensorIndex(plan).tensors
    batch = sum(host.numel() * host.itemsize for host in training.inputs)
    moves = [one for one in plan.train.instructions if isinstance(one, Read | Fetch | Spill)]
    read = sum(tensors[one.weight].packed_bytes for one in moves if isinstance(one, Read))
    fetched = sum(tensors[one.tensor].bytes for one in moves if isinstance(one, Fetch))
    spilled = sum(tensors[one.tensor].bytes for one in moves if isinstance(one, Spill))
    assert all((read, fetched, spilled))
    assert apart.put_bytes - before[0] == batch + read + fetched
    losses = 4 * (1 + training.inputs[0].numel())  # the mean, and one of each token
    assert apart.got_bytes - before[1] == spilled + losses
    training.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_device_that_works_later_than_it_is_asked_gives_the_same_bits(plan, records, expected, tmp_path, seed):
    late = Late(plan.arena_bytes, seed)
    assert trained(plan, records, tmp_path / "late", late) == expected
    assert late.most_behind > 20


@pytest.mark.parametrize("missing", ["transfers do not wait for operators", "operators do not wait for transfers"])
def test_a_wait_that_is_missing_shows(plan, records, expected, tmp_path, monkeypatch, missing):
    if missing.startswith("transfers"):
        monkeypatch.setattr(Late, "mark", lambda self: ReachedMark())
    else:
        monkeypatch.setattr(Late, "follow", lambda self, mark: None)
    assert trained(plan, records, tmp_path / "late", Late(plan.arena_bytes, seed=0)) != expected


def test_a_device_holds_no_more_than_it_has(plan):
    with pytest.raises(CapError):
        Apart(plan.arena_bytes, NO_CAP, most=plan.arena_bytes - 1)


def test_the_device_is_the_one_that_the_job_is_for():
    header = {"device": "cpu", "arena_bytes": 4096, "cap_bytes": 1 << 40, "budget_bytes": 1 << 40}
    assert isinstance(open_device(header), Cpu)
    with pytest.raises(InputError, match="'cuda' cannot be run here; devices that can: cpu"):
        open_device(header | {"device": "cuda"})
