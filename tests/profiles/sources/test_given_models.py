"""What programs give in the place of a model, and what a module of one's own may hold: taken, or refused with what to
give.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import CONFIG
from torch import Tensor, nn

import tightfit
from tightfit.profiles.api import profile
from tightfit.profiles.sources.factory import factory_source
from tightfit.profiles.sources.lookup import end_tokens, longest_sequence, names_module, vocabulary
from tightfit.runtime.common.errors import InputError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.layer(x).square().mean()
        return loss


def plain() -> Any:
    return Net(), (torch.ones(2, 4),)


class Counting(Net):
    """Keeps something beside its parameters and buffers."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def counting() -> Any:
    return nn.Sequential(Counting()), (torch.ones(2, 4),)


def wide() -> Any:
    return Net().double(), (torch.ones(2, 4, dtype=torch.float64),)


def wide_buffer() -> Any:
    module = Net()
    module.register_buffer("scale", torch.ones(4, dtype=torch.float64))
    return module, (torch.ones(2, 4),)


def wide_batch() -> Any:
    return Net(), (torch.ones(2, 4, dtype=torch.float64),)


def lazy() -> Any:
    return nn.Sequential(nn.LazyLinear(4), Net()), (torch.ones(2, 3),)


def lazy_but_called() -> Any:
    module, batch = lazy()
    module(*batch)
    return module, batch


NAME = f"{__name__}:plain"
DOORS = (
    lambda given: profile(given, device="phone"),
    lambda given: tightfit.generate(given, "Hello", 1 << 30),
    lambda given: tightfit.train(given, "random", "out", steps=1),
    vocabulary,
    names_module,
    longest_sequence,
    end_tokens,
)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Net(), "^a Net itself was given, .* write a function .* and give its name, such as 'my_file:factory'; a model is"),
        (Net, "^Net itself was given, .* write a function"),
        (plain, f"^<function plain .*> itself was given, .*: give its name, such as '{NAME}'; a model is"),
        (lambda: None, "^<function <lambda> .* give its name, such as 'my_file:factory'"),
        (None, "^None is of type NoneType; give a name or a path; a model is a Hugging Face directory"),
        (plain(), r"^\(Net\(.*is of type tuple; give a name or a path"),
    ],
    ids=["module", "class", "function", "lambda", "nothing", "pair"],
)  # fmt: skip
def test_what_is_no_name_is_refused_with_what_to_give(
    door: Any, given: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"(?s){words}"):
        door(given)


@pytest.mark.slow
def test_a_path_is_as_good_as_its_text(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    made, again = (profile(one, seq=16, device="phone") for one in (path, str(path)))
    assert made.fingerprint == again.fingerprint
    assert (made.seq, made.batch) == (16, 1)
    assert profile(path, device="phone").seq == 256
    with pytest.raises(InputError, match=r"missing/config\.json: no such file or directory"):
        profile(tmp_path / "missing" / "config.json")


@pytest.mark.parametrize("size", [{"seq": 256}, {"batch": 1}])
def test_a_module_s_batch_is_the_factory_s(size: dict[str, int]) -> None:
    """Also where it is the number that a language model has by itself."""
    (name, value) = next(iter(size.items()))
    with pytest.raises(InputError, match=f"{name} {value}: .*plain is a module, whose factory gives the sample batch"):
        profile(NAME, device="phone", **size)  # type: ignore[arg-type]
    assert profile(NAME, device="phone").batch == 2


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (counting, r"state_dict holds 0\._extra_state, no parameter or buffer \(of get_extra_state, for example\)"),
        (wide, r"layer\.weight, layer\.bias are float64, and a step computes in float32; .* return module\.float\(\)"),
        (wide_buffer, "scale are float64"),
        (wide_batch, r"the sample batch: item 0 is float64, .* give tensor\.float\(\)"),
        (lazy, r"0\.weight, 0\.bias have no shape before the module has seen a batch .* call it in the factory once"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(factory: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        factory_source(f"{__name__}:{factory.__name__}")


def test_a_lazy_module_that_was_called_is_a_module() -> None:
    assert factory_source(f"{__name__}:lazy_but_called").entries["0.weight"].shape == (4, 3)
