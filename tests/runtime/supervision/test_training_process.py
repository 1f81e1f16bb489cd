"""What a parent makes of what the lean process tells, and of its end."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_plans import decoder_profile, naive_plan

from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import CapError, InputError, RunError, TightfitError
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.session.settings import order_of, planned_figures
from tightfit.runtime.supervision.training_process import RunOrder, TrainingProcess

MIB = 1 << 20


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return naive_plan(decoder_profile(tmp_path_factory.mktemp("store")))


def ended(
    plan: Plan, directory: Path, told: list[bytes], code: int, words: bytes = b"", group: Any = None
) -> TrainingProcess:
    """One that wrote `told` piece by piece, said `words` and ended with `code`."""
    read, write = os.pipe()
    for piece in told:
        os.write(write, piece)
    os.close(write)
    process: Any = SimpleNamespace(wait=lambda: code)
    file = io.BytesIO()
    file.write(words)  # and stands at its end, as of the process that wrote it
    order = RunOrder(directory=str(directory), lock=0, environment={}, planned=planned_figures(plan), cgroup=True)
    return TrainingProcess(order, group, process, read, file)


def cgroup(kills: int, peak: int) -> Any:
    return SimpleNamespace(oom_kills=lambda: kills, peak_bytes=lambda: peak)


def error(child: TrainingProcess) -> TightfitError:
    with pytest.raises(TightfitError) as caught:
        child.end()
    os.close(child._read)
    return caught.value


def line(event: str, **content: Any) -> bytes:
    return json.dumps({"event": event, **content}).encode() + b"\n"


def test_messages_come_in_pieces_and_a_last_one_without_its_end_is_none(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = line("checkpoint", path="a", peak_bytes=7), line("checkpoint", path="b", peak_bytes=5)
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, _: read(descriptor, 11))
    child = ended(plan, tmp_path, [one, other, b'{"event": "chec'], 0)
    found = []
    for message in child.messages():
        assert child.observed.checkpoint == message["path"]  # as far as it has been told
        found.append(message["path"])
    assert found == ["a", "b"]
    assert child.observed.peak_bytes == 7
    os.close(child._read)


def test_an_end_without_a_word_is_told_with_the_newest_checkpoint(plan: Plan, tmp_path: Path) -> None:
    lost = "no checkpoint was saved yet, start again with overwrite=True"
    for group in (None, cgroup(0, 0)):
        killed = error(ended(plan, tmp_path, [], -9, group=group))
        assert isinstance(killed, RunError)
        assert str(killed) == f"the training process was ended by SIGKILL; {lost}"
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    failed = error(ended(plan, tmp_path, [], 1, b"Traceback\nImportError: torch\n\n"))
    assert isinstance(failed, RunError)
    assert str(failed) == (
        "the training process ended with status 1: ImportError: torch; "
        f"the last checkpoint is {tmp_path / 'checkpoint-10'}, continue with resume=True"
    )


@pytest.mark.parametrize(("own", "kernels"), [(70, 90), (90, 70)])
@pytest.mark.parametrize("memory", [False, True])
def test_what_the_kernel_ends_at_the_cap_is_told_with_the_most_that_was_seen(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int, kernels: int, memory: bool
) -> None:
    monkeypatch.setattr("tightfit.runtime.supervision.training_process.in_memory", lambda directory: memory)
    told = [line("loaded", spill_bytes=0, peak_bytes=own * MIB)]
    capped = error(ended(plan, tmp_path, told, -9, group=cgroup(1, kernels * MIB)))
    assert isinstance(capped, CapError)
    assert "at its cap of 8192.0 MiB: it had reached 90.0 MiB" in str(capped)
    assert f"by itself {own}.0 MiB when it last told, predicted were " in str(capped)
    assert ("lies in memory (tmpfs)" in str(capped)) == memory


def test_a_cgroup_around_the_training_process_alone_is_told_with_its_own_limit(plan: Plan, tmp_path: Path) -> None:
    child = ended(plan, tmp_path, [], -9, group=cgroup(1, 0))
    child.others_bytes = 92 * MIB
    assert "at its cap of 8100.0 MiB: " in str(error(child))


def test_what_it_says_of_itself_is_said(plan: Plan, tmp_path: Path) -> None:
    for kind, wanted in (("InputError", InputError), ("CapError", CapError), ("RunError", RunError), ("?", RunError)):
        found = error(ended(plan, tmp_path, [line("error", kind=kind, message="why")], 2))
        assert (type(found), str(found)) == (wanted, "why")
    start = error(ended(plan, tmp_path, [line("interrupted", step=0, checkpoint="")], 4))
    assert str(start) == "interrupted before the first step; start again"
    saved = error(ended(plan, tmp_path, [line("interrupted", step=3, checkpoint="c-3")], 4))
    assert str(saved) == "interrupted after step 3; everything is saved in c-3, continue with resume=True"
    done = ended(plan, tmp_path, [line("saved", path="adapter")], 0, group=cgroup(0, 5 * MIB))
    observed = done.end()
    os.close(done._read)
    assert (observed.trained, observed.cgroup_peak_bytes) == ("adapter", 5 * MIB)


@pytest.mark.parametrize("counted", [False, True])
def test_a_start_is_as_light_as_the_plan_counts_on(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    """Plans of before do not count on a file for the start: they run with the cache's disk full, and hold what they
    say.
    """
    floor = plan.device.floor.model_copy(update={"tables_on_disk": counted, "cuda_stubs": counted})
    told = plan.model_copy(update={"device": plan.device.model_copy(update={"floor": floor})})
    monkeypatch.setenv(page_out.VARIABLE, "a library")
    monkeypatch.setenv(cuda_stubs.VARIABLE, "a folder")
    job: Any = SimpleNamespace(write=lambda _: None, header={"steps": 1, "epoch_steps": None})
    order = order_of(told, job, tmp_path, 0, cgroup=False)
    assert order.environment[page_out.VARIABLE] == ("a library" if counted else "")
    assert order.environment[cuda_stubs.VARIABLE] == ("a folder" if counted else "")


def test_the_training_process_has_what_its_supervisor_leaves_of_the_budget(plan: Plan, tmp_path: Path) -> None:
    floor = plan.device.floor.model_copy(update={"supervisor_bytes": 12 * MIB})
    told = plan.model_copy(update={"device": plan.device.model_copy(update={"floor": floor})})
    order = RunOrder(
        directory=str(tmp_path), lock=3, environment={"A": "b"}, planned=planned_figures(told), cgroup=True
    )
    assert order.cap_bytes == plan.budget_bytes - 12 * MIB
    order.write(str(tmp_path / "order"))
    assert RunOrder.read(str(tmp_path / "order")) == order
