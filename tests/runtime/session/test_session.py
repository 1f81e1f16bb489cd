"""Training loops of one's own: against autograd, against `run` to the bit, and what is left when they end in the
middle.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import opened_below, own_groups
from places import ROOT
from reference import CONFIGS, all_layers, peft_model, relative_error, starting_weights, trained_by_peft
from safetensors.torch import load_file
from tiny_models import random_weights, write_directory
from tiny_plans import decoder_profile, module_profile, naive_plan
from torch import Tensor

from examples import own_module
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.schema import Plan
from tightfit.profiles.api import profile
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import CapError, InfeasibleError, InputError, RunError, TightfitError
from tightfit.runtime.common.run_folder import find_checkpoints
from tightfit.runtime.session.launch import run
from tightfit.runtime.session.session import Session

ROWS, SEQ, RANK = 3, 21, 4
CONFIG = CONFIGS["llama"]
MIB = 1 << 20
Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Profile:
    folder = tmp_path_factory.mktemp("llama")
    write_directory(folder, CONFIG, random_weights(CONFIG))
    return profile(str(folder), batch=ROWS, seq=SEQ, lora_rank=RANK, lora_alpha=8.0, dtype="float32")


@pytest.fixture(scope="module")
def smallest(decoder: Profile) -> Plan:
    return plan(decoder, ModelPlanner(decoder).minimum().peak_bytes)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return naive_plan(module_profile(tmp_path_factory.mktemp("module"), "examples.own_module:cnn"))


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return naive_plan(decoder_profile(tmp_path_factory.mktemp("store"), dtype="float32"))


def texts(count: int) -> list[Batch]:
    """As transformers' collators make them: of other lengths, padded on the right, some words not asked for, some rows
    fewer.
    """
    generator = torch.Generator().manual_seed(3)
    batches = []
    for number in range(count):
        rows, length = ROWS - number % 2, SEQ - 5 * (number % 3)
        ids = torch.randint(1, CONFIG["vocab_size"], (rows, length), generator=generator)
        labels = ids.clone()
        labels[:, : 1 + number % 4] = -100
        ids[0, -3:], labels[0, -3:] = 0, -100
        batches.append((ids, labels))
    return batches


def rate(step: int) -> float:
    return 4e-3 / (1 + step)


def by_autograd(made: Profile, batches: list[Batch]) -> tuple[list[float], dict[str, Tensor], float]:
    """transformers + peft with labels as they are: losses, the adapter, and the loss of the first batch afterwards."""
    weights = starting_weights(made)
    model = peft_model(CONFIG, weights, all_layers(RANK, 8.0), torch.float32)
    trained = trained_by_peft(model)
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.02)
    losses = []
    for step, (ids, labels) in enumerate(batches):
        loss = model(input_ids=ids, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
    after = model(input_ids=batches[0][0], labels=batches[0][1]).loss.item()
    return losses, {n: p.detach() for n, p in trained.items()}, after


def bits(out: Path, step: int, file: str = "adapter_model.safetensors") -> tuple[bytes, bytes]:
    folder = out / f"checkpoint-{step}"
    return (folder / file).read_bytes(), (folder / "optimizer.safetensors").read_bytes()


def half_of_a_batch(write: Callable[[int, memoryview], int], descriptor: int, data: memoryview) -> int:
    """Ctrl-C comes while it is written."""
    if len(data) > 100:
        write(descriptor, data[:100])
        raise KeyboardInterrupt
    return write(descriptor, data)


@pytest.mark.slow
def test_a_loop_of_one_s_own_follows_the_exact_gradient(decoder: Profile, smallest: Plan, tmp_path: Path) -> None:
    batches = texts(8)
    losses, trained, after = by_autograd(decoder, batches)
    with Session(smallest, out=tmp_path, weight_decay=0.02) as session:
        found = [session.step(*batch, lr=rate(step)) for step, batch in enumerate(batches)]
        assert session.taken == 8
        assert session.report is None
        assert session.loss(*batches[0]) == pytest.approx(after, rel=2e-5)
    assert found == pytest.approx(losses, rel=2e-5)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, expected in trained.items():
        own = adapter[f"base_model.model.{name}"]
        assert relative_error(own, expected) < 1e-3, name
    report = session.report
    assert report is not None
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["loss"] == found
    assert report["peak_bytes"]["measured"] <= smallest.peak_bytes
    assert report["phases"]["evaluate"]["peak_bytes"]["measured"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "checkpoint-8", "metrics.jsonl", "report.json"]


def test_it_is_the_run_of_the_same_batches_to_the_bit(module: Plan, tmp_path: Path) -> None:
    """Whatever is asked between the steps."""
    batches = list(own_module.images(5, 1))
    run(module, batches, steps=5, out=tmp_path / "run", lr=3e-3)
    with Session(module, out=tmp_path / "session", lr=3e-3, checkpoint_every=2) as session:
        first = session.loss(*batches[0])
        for number, batch in enumerate(batches):
            session.step(*batch)
            if number in {0, 1}:
                session.loss(*batches[4])
                saved = session.save()
                assert saved == session.save() == tmp_path / "session" / f"checkpoint-{number + 1}"
                written = (saved / "model.safetensors").stat().st_mtime_ns
                assert session.save() == saved
                assert (saved / "model.safetensors").stat().st_mtime_ns == written
    assert session.report is not None
    assert session.report["loss"][0] == first
    assert bits(tmp_path / "session", 5, "model.safetensors") == bits(tmp_path / "run", 5, "model.safetensors")
    mine, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("session", "run"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError("by the loop"), KeyboardInterrupt()])
def test_an_error_in_the_loop_keeps_its_steps(
    smallest: Plan, decoder: Profile, tmp_path: Path, error: BaseException
) -> None:
    batches = texts(6)
    with Session(smallest, out=tmp_path / "whole") as session:
        whole = [session.step(*batch) for batch in batches]
    part = tmp_path / "part"
    with pytest.raises(type(error)) as caught, Session(smallest, out=part) as session:  # noqa: PT012
        losses = [session.step(*batch) for batch in batches[:4]]
        raise error
    assert caught.value.__notes__ == [
        f"interrupted after step 4; everything is saved in {part / 'checkpoint-4'}, continue with resume=True"
    ]
    assert session.report is None
    assert not (part / "adapter").exists()
    with pytest.raises(InputError, match="holds an earlier run"), Session(smallest, out=part):
        pass
    with Session(plan(decoder, 1 << 40), out=part, resume=True) as session:
        assert session.taken == 4
        losses += [session.step(*batch) for batch in batches[session.taken :]]
    assert losses == whole
    assert session.report is not None
    assert session.report["loss"] == whole
    assert bits(part, 6) == bits(tmp_path / "whole", 6)


def test_what_cannot_be_a_batch_costs_nothing(naive: Plan, tmp_path: Path) -> None:
    assert naive.seq is not None
    rows, length, words = naive.batch, naive.seq, naive.model.config["vocab_size"]
    ids = torch.randint(1, words, (rows, length), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :2] = -100
    good = ids, labels
    refused = [
        ((), "has 0 tensors; give input_ids and labels, or input_ids alone"),
        ((ids, labels, ids), "the third are no positions: they are counted from 0 in each sample of a row"),
        (([1, 2],), "item 0 is of type list"),
        ((ids, labels[:, 1:]), rf"the plan was made for at most {rows} rows of {length} tokens, labels like input_ids"),
        ((ids.repeat(1, 2), labels.repeat(1, 2)), "cut the batch, or profile with another batch and seq"),
        ((ids - words, labels), rf"input_ids has the token {int(ids.min()) - words};"),
        ((ids, torch.full_like(labels, -100)), "has no label after the first token"),
    ]  # fmt: skip
    with Session(naive, out=tmp_path) as session:
        for batch, told in refused:
            with pytest.raises(InputError, match=told) as caught:
                session.step(*batch)
            assert str(caught.value).startswith("the batch of step 1")
            with pytest.raises(InputError, match=told) as caught:
                session.loss(*batch)
            assert "step" not in str(caught.value)
        for lr in (-1.0, float("inf"), float("nan"), "1e-3"):
            with pytest.raises(InputError, match=r"^lr "):
                session.step(*good, lr=lr)  # type: ignore[arg-type]
        alone = session.loss(ids)
        assert alone == session.loss(ids, ids)
        both, half = ids[:2, : length // 2], torch.arange(length // 2)
        apart, shared = session.loss(both), session.loss(*(x.reshape(1, -1) for x in (both, both, half.repeat(2, 1))))
        assert shared == pytest.approx(apart, rel=1e-6)
        assert shared != session.loss(both.reshape(1, -1))
        session.step(*good)
        assert session.taken == 1
    assert session.report is not None
    assert len(session.report["loss"]) == 1


def test_a_tensor_by_itself_is_no_batch(module: Plan, tmp_path: Path) -> None:
    pixels, _ = next(own_module.images(1, 0))
    with pytest.raises(InputError, match=r"^batch 0 is a tensor; a batch is a tuple of tensors: give \(tensor,\)$"):
        run(module, [pixels], steps=1, out=tmp_path)  # type: ignore[list-item]


def test_options_that_no_session_can_have(naive: Plan, tmp_path: Path) -> None:
    for name, value in {
        "seed": 10**13,
        "weight_decay": float("nan"),
        "checkpoint_every": -1,
        "keep_checkpoints": 0,
    }.items():
        with pytest.raises(InputError, match=f"^{name} {value}: it should be "):
            Session(naive, out=tmp_path, **{name: value})  # type: ignore[arg-type]


def test_a_module_gets_the_shapes_it_was_profiled_with(module: Plan, tmp_path: Path) -> None:
    pixels, labels = next(own_module.images(1, 1))
    with Session(module, out=tmp_path) as session:
        with pytest.raises(
            InputError, match=r"^the batch of step 1 has tensors .* profile with a batch of that shape$"
        ):
            session.step(pixels[:3], labels[:3])
        with pytest.raises(InputError, match="has tensors"):
            session.step()
        with pytest.raises(InputError, match="the batch of step 1: item 0 is float64"):
            session.step(pixels.double(), labels)
        turned = pixels.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
        assert session.loss(turned, labels) == session.loss(pixels, labels)


def test_a_session_is_of_use_in_its_block_alone(naive: Plan, tmp_path: Path) -> None:
    ids = torch.ones(2, 24, dtype=torch.int64)
    session = Session(naive, out=tmp_path / "out")
    with pytest.raises(RunError, match="the session is not open"):
        session.step(ids)
    assert not (tmp_path / "out").exists()
    with session:
        with pytest.raises(InputError, match="another run is under way"), Session(naive, out=tmp_path / "out"):
            pass
        session.step(ids)
    assert opened_below(tmp_path) == []
    assert own_groups() == []
    assert session._request_pipe == -1
    with pytest.raises(RunError, match="the session is over"):
        session.step(ids)


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_s_data_in_the_output_folder_stay(naive: Plan, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "train.records", "evaluate.batches"):
        (tmp_path / "data" / name).write_text("")
    with Session(naive, out=tmp_path, overwrite=overwrite):
        pass
    # Of an earlier run nothing is left.
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["train.jsonl"]


def test_a_session_refuses_what_a_run_does(naive: Plan, tmp_path: Path) -> None:
    """Before there is anything of it on the disk."""
    other = naive.device.model_copy(update={"torch_version": "2.0.0"})
    refused: list[tuple[dict[str, Any], type[TightfitError], str]] = [
        ({"device": other}, InputError, r"made with torch 2\.0\.0"),
        ({"status": "infeasible", "minimum_budget_bytes": 200 * MIB}, InfeasibleError, r"200\.0 MiB"),
    ]
    for changed, kind, told in refused:
        with pytest.raises(kind, match=told), Session(naive.model_copy(update=changed), out=tmp_path / "out"):
            pass
    for lr in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match=r"^lr "):
            Session(naive, out=tmp_path / "out", lr=lr)
    assert not (tmp_path / "out").exists()


def test_no_step_at_all_leaves_the_start(naive: Plan, tmp_path: Path) -> None:
    with Session(naive, out=tmp_path, cgroup=False) as session:
        pass
    assert session.report is not None
    assert session.report["enforced_by"] == "meter"
    assert session.report["loss"] == []
    assert session.report["step_seconds"]["measured"] is None
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_cap_holds_for_a_loop_of_one_s_own(
    naive: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: bool
) -> None:
    monkeypatch.setattr(
        "tightfit.runtime.session.session.check_schedule", lambda plan: None
    )  # the planner would never emit it
    small = naive.model_copy(update={"budget_bytes": 60 * MIB})
    with pytest.raises(CapError, match=r"60\.0 MiB"), Session(small, out=tmp_path, cgroup=cgroup) as session:
        session.step(torch.ones(2, 24, dtype=torch.int64))
    assert not (tmp_path / "job").exists()


def test_a_loss_that_is_no_number_ends_it(naive: Plan, tmp_path: Path) -> None:
    """The rate that is told is that of the step; who goes on all the same is told again."""
    ids = torch.arange(48).view(2, 24)
    with pytest.raises(InputError, match="is not a number") as last, Session(naive, out=tmp_path) as session:  # noqa: PT012
        with pytest.raises(  # noqa: PT012
            InputError, match=r"the loss of step \d+ is not a number; lower the learning rate \(lr 1e\+30\)"
        ):
            for _ in range(20):
                session.step(ids, lr=1e30)
        with pytest.raises(RunError, match="the session is over"):
            session.step(ids)
    assert not hasattr(last.value, "__notes__")


@pytest.mark.slow_but_for("answer-3")
@pytest.mark.parametrize(("part", "taken"), [("question", 2), ("answer", 3)])
def test_one_that_was_interrupted_in_the_middle_is_over(
    naive: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, taken: int
) -> None:
    """Half of a batch is in the pipe, or an answer that nobody took: nothing more can be asked, and the steps are
    saved.
    """
    ids = torch.ones(2, 24, dtype=torch.int64)

    def unheard() -> Iterator[None]:
        deadline = time.monotonic() + 60
        while len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise KeyboardInterrupt

    with (  # noqa: PT012
        pytest.raises(RunError, match=rf"^interrupted after step {taken}; everything is saved in"),
        Session(naive, out=tmp_path) as session,
    ):
        for _ in range(2):
            session.step(ids)
        if part == "question":
            monkeypatch.setattr(
                "tightfit.runtime.engine.training.session_protocol.os.write", partial(half_of_a_batch, os.write)
            )
        else:
            monkeypatch.setattr(session._child, "messages", unheard)
        with pytest.raises(KeyboardInterrupt):
            session.step(ids)
        monkeypatch.undo()
        with pytest.raises(RunError, match="was interrupted after step 2, in the middle of what was asked"):
            session.step(ids)
    assert find_checkpoints(str(tmp_path))[-1][0] == taken


def test_one_that_is_interrupted_before_it_is_open_leaves_nothing_running(
    naive: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(naive, out=tmp_path)

    def interrupted(event: str) -> dict[str, int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt), session:
        pass
    assert session._child.process.returncode is not None
    assert opened_below(tmp_path) == []
    assert own_groups() == []


@contextlib.contextmanager
def looping(made: Plan, folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A program that took three steps and now thinks: (its process, the lean one's number)."""
    path = folder / "plan.json"
    path.write_text(made.model_dump_json())
    code = (
        "import time, torch\nfrom tightfit.planner.schema import Plan\nfrom tightfit.runtime.session.session import Session\n"
        f"with Session(Plan.model_validate_json(open({str(path)!r}).read()), out={str(folder / 'out')!r}) as session:\n"
        "    for _ in range(3):\n        session.step(torch.ones(2, 24, dtype=torch.int64))\n"
        "    print(session._child.process.pid, flush=True)\n    time.sleep(600)\n"
    )
    root = ROOT
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whatever_ends_the_program_its_steps_are_saved(naive: Plan, tmp_path: Path, number: signal.Signals) -> None:
    with looping(naive, tmp_path) as (process, _):
        process.send_signal(number)
        process.wait(60)
    deadline = time.monotonic() + 60
    while not find_checkpoints(str(tmp_path / "out")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(InputError), Session(naive, out=tmp_path / "out", resume=True) as session:
            assert session.taken == 3
            break
        assert time.monotonic() < deadline  # the folder is locked until all is saved
        time.sleep(0.02)


def test_a_lean_process_that_is_asked_to_end_while_it_waits_saves(naive: Plan, tmp_path: Path) -> None:
    ids = torch.ones(2, 24, dtype=torch.int64)
    with (  # noqa: PT012
        pytest.raises(RunError, match=r"^interrupted after step 1; everything is saved in .*checkpoint-1"),
        Session(naive, out=tmp_path) as session,
    ):
        session.step(ids)
        os.kill(session._child.process.pid, signal.SIGTERM)
        session._child.process.wait(60)
        session.step(ids)


def test_one_that_dies_is_told(naive: Plan, tmp_path: Path) -> None:
    ids = torch.ones(2, 24, dtype=torch.int64)
    with (  # noqa: PT012
        pytest.raises(
            RunError, match=r"the training process was ended by SIGKILL.*; the last checkpoint is .*checkpoint-1"
        ) as told,
        Session(naive, out=tmp_path) as session,
    ):
        session.step(ids)
        session.save()
        os.kill(session._child.process.pid, signal.SIGKILL)
        session.step(ids)
    assert not hasattr(told.value, "__notes__")  # nothing is said twice


@pytest.mark.slow
def test_other_batches_than_given_ones_are_another_run(naive: Plan, tmp_path: Path) -> None:
    run(naive, "random", steps=1, out=tmp_path)
    with (
        pytest.raises(InputError, match="was made by `run`; resume with `run`, on the same data, or start"),
        Session(naive, out=tmp_path, resume=True),
    ):
        pass
    with Session(naive, out=tmp_path, overwrite=True) as session:
        session.step(torch.ones(2, 24, dtype=torch.int64))
    assert not (tmp_path / "data").exists()
    with pytest.raises(InputError, match="was made by a Session; resume with a Session, on the same data, or start"):
        run(naive, "random", steps=2, out=tmp_path, resume=True)


@pytest.mark.slow_but_for("False")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from Python 3.12 on, where there are threads
@pytest.mark.parametrize("middle", [False, True])
def test_a_copy_of_the_program_holds_nothing_up(
    naive: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, middle: bool
) -> None:
    """A DataLoader's workers are copies, with the pipe open, and may outlive the loop; in the middle of a batch too."""
    ids = torch.ones(2, 24, dtype=torch.int64)
    before, copy = time.monotonic(), 0
    try:
        with pytest.raises(KeyboardInterrupt), Session(naive, out=tmp_path) as session:  # noqa: PT012
            session.step(ids)
            copy = os.fork()
            if not copy:
                try:
                    time.sleep(1200)
                finally:
                    os._exit(0)
            if middle:
                monkeypatch.setattr(
                    "tightfit.runtime.engine.training.session_protocol.os.write", partial(half_of_a_batch, os.write)
                )
                session.step(ids)
            raise KeyboardInterrupt
        # Nor does its copy of the lock.
        with Session(naive, out=tmp_path, resume=True) as session:
            assert session.taken == 1
    finally:
        if copy:
            os.kill(copy, signal.SIGKILL)
            os.waitpid(copy, 0)
    assert time.monotonic() - before < 600


def test_the_thread_that_opens_a_session_may_end(naive: Plan, tmp_path: Path) -> None:
    """Linux takes the end of the thread that started a process for that of its parent."""
    session = Session(naive, out=tmp_path)
    opening = threading.Thread(target=session.__enter__)
    opening.start()
    opening.join()
    time.sleep(0.5)
    with contextlib.ExitStack() as stack:
        stack.push(session)
        session.step(torch.ones(2, 24, dtype=torch.int64))
    assert session.report is not None
    assert len(session.report["loss"]) == 1


@pytest.mark.slow
def test_a_program_may_have_more_than_a_thousand_files_open(naive: Plan, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("no more files can be opened here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    try:
        with contextlib.ExitStack() as files:
            for _ in range(1100):
                files.enter_context(Path("/dev/null").open())
            with Session(naive, out=tmp_path) as session:
                session.step(torch.ones(2, 24, dtype=torch.int64))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_a_mistake_in_the_first_batch_costs_nothing(naive: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the batch of step 1") as caught, Session(naive, out=tmp_path) as session:
        session.step(torch.ones(2, 25, dtype=torch.int64))
    assert caught.value.__notes__ == ["interrupted before the first step; start again"]
    with Session(naive, out=tmp_path) as session:
        session.step(torch.ones(2, 24, dtype=torch.int64))
    assert session.taken == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Python's own, of the process that still saves
def test_one_that_nobody_leaves_ends_with_its_last_reference(naive: Plan, tmp_path: Path) -> None:
    session = Session(naive, out=tmp_path).__enter__()
    session.step(torch.ones(2, 24, dtype=torch.int64))
    del session
    gc.collect()
    deadline = time.monotonic() + 60
    while not find_checkpoints(str(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_an_update_that_is_not_finished_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_directory(folder, CONFIG, random_weights(CONFIG))
    made = profile(str(folder), batch=1, seq=SEQ, lora_rank=RANK, accumulate=3)
    planned, batches = plan(made, 1 << 40), [(ids[:1], labels[:1]) for ids, labels in texts(6)]
    with Session(planned, out=tmp_path / "whole", lr=5e-3) as session:
        whole = [session.step(*batch) for batch in batches]
    with (
        pytest.warns(UserWarning, match=r"^steps 4: an update takes 3 steps.* the last ones .* in the checkpoint"),
        Session(planned, out=tmp_path / "part", lr=5e-3) as session,
    ):
        part = [session.step(*batch) for batch in batches[:4]]
    with Session(planned, out=tmp_path / "part", lr=5e-3, resume=True) as session:
        part += [session.step(*batch) for batch in batches[4:]]
    assert part == whole
    # All is done where the program makes an error of the warning.
    error = Session(planned, out=tmp_path / "error")
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=r"^steps 1: an update takes 3 steps"):  # noqa: PT012
        warnings.simplefilter("error")
        with error:
            error.step(*batches[0])
    assert error.report is not None
    assert (tmp_path / "error" / "adapter").exists()
    assert bits(tmp_path / "part", 6) == bits(tmp_path / "whole", 6)
