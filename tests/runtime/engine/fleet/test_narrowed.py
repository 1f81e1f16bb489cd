"""What the members' exchange leaves in a process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tightfit.runtime.engine.training import loop
from tightfit.runtime.engine.training.loop import _Run


def test_the_code_of_an_exchange_is_narrowed_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stayed with its neighbours in the files, 2 MiB, beside the workspace of the next micro-batch."""
    done: list[str] = []
    for name in ("narrow_file_mappings", "release_file_pages"):
        monkeypatch.setattr(loop, name, lambda name=name: done.append(name))
    one: Any = object.__new__(_Run)
    one.done, one.peaks = 0, {}
    made = SimpleNamespace(losses=[1.0], labels=2.0, stop=False, exchange_seconds=0.0, update_seconds=0.0)
    one.role = SimpleNamespace(share=SimpleNamespace(micro_batches=4), finish=lambda step, *, stop: made)
    one.narrowed, one.updated, one.untold = False, 0.0, []
    one.updates = SimpleNamespace(add=lambda **_: None)
    one.training = SimpleNamespace(meter=SimpleNamespace(check_peak=lambda: 1))
    one.send = lambda *_, **__: None
    for _ in range(2):
        assert one._finish_step(stop=False) == (4, False)
    assert done == ["narrow_file_mappings", "release_file_pages"]
