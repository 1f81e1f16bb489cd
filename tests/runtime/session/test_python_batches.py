"""Batches that a loop gives: what is taken, and what is refused, to the last token, row and tensor."""

from __future__ import annotations

import pytest
import torch
from tiny_plans import CONFIG, decoder_profile, naive_plan

from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Tensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.session.python_batches import as_planned

ROWS, SEQ, WORDS = 2, 24, CONFIG["vocab_size"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return naive_plan(decoder_profile(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def module(decoder: Plan) -> Plan:
    """One that uses the third tensor of its batch, then the first, and no other."""
    used = [
        Tensor(name="batch2", kind="batch", shape=[2], dtype="int64", bytes=16),
        Tensor(name="batch0", kind="batch", shape=[2, 3], dtype="float32", bytes=24),
    ]
    return decoder.model_copy(
        update={"model": decoder.model.model_copy(update={"kind": "module"}), "tensors": used, "seq": None}
    )


def test_every_token_and_every_integer_will_do(decoder: Plan) -> None:
    """The last token of the vocabulary, a label that is token 0, one row of two tokens."""
    ids = torch.tensor([[WORDS - 1, 0]])
    for kind in (torch.int16, torch.int32, torch.int64):
        inputs, labels, positions = as_planned(decoder, (ids.to(kind),), "it")
        assert inputs.dtype == labels.dtype == positions.dtype == torch.int64
        assert positions.tolist() == [list(range(SEQ))] * ROWS
        assert inputs.tolist() == [[WORDS - 1] + [0] * (SEQ - 1), [0] * SEQ]
        assert labels.tolist() == [[0] + [-100] * (SEQ - 1), [-100] * SEQ]
    full = torch.arange(ROWS * SEQ).view(ROWS, SEQ)
    inputs, labels, _ = as_planned(decoder, (full, full), "it")
    assert torch.equal(inputs, full)
    assert labels.tolist() == [[*row[1:], -100] for row in full.tolist()]


def test_one_more_is_too_much(decoder: Plan) -> None:
    ids = torch.ones(ROWS, SEQ, dtype=torch.int64)
    for batch, told in (
        ((torch.ones(ROWS + 1, SEQ, dtype=torch.int64),), "at most 2 rows of 24 tokens"),
        ((torch.ones(ROWS, SEQ + 1, dtype=torch.int64),), "at most 2 rows of 24 tokens"),
        ((torch.full_like(ids, WORDS),), f"input_ids has the token {WORDS}; the model has tokens 0 to {WORDS - 1}"),
        ((ids, torch.full_like(ids, WORDS)), f"labels has the token {WORDS};"),
        ((ids, torch.full_like(ids, -1)), "labels has the token -1;"),
        ((ids[:, :0],), "at most 2 rows of 24 tokens"),
        ((ids[0], ids[0]), "give integers of shape"),
        ((ids.bool(), ids), "give integers of shape"),
        ((ids, ids.to(torch.complex64)), "give integers of shape"),
        ((ids[:, :1], ids[:, :1]), "no label after the first token"),
    ):
        with pytest.raises(InputError, match=f"^it.*{told}"):
            as_planned(decoder, batch, "it")


def test_a_module_gets_what_it_uses_in_the_order_of_its_use(module: Plan) -> None:
    """Contiguous and in float32; what it does not use may be of any shape."""
    first, third = torch.arange(6.0, dtype=torch.bfloat16).view(3, 2).t().requires_grad_(), torch.tensor([4, 5])
    got = as_planned(module, (first, torch.zeros(7), third, torch.zeros(9)), "it")
    assert [tensor.tolist() for tensor in got] == [[4, 5], [[0, 2, 4], [1, 3, 5]]]
    assert [tensor.dtype for tensor in got] == [torch.int64, torch.float32]
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in got)


def test_a_batch_in_float64_is_refused_by_its_item(module: Plan) -> None:
    batch = (torch.zeros(2, 3), torch.zeros(7), torch.tensor([4, 5]))
    for item in range(3):
        wide = [tensor.double() if at == item else tensor for at, tensor in enumerate(batch)]
        with pytest.raises(InputError, match=rf"^it: item {item} is float64, .* give tensor\.float\(\)"):
            as_planned(module, wide, "it")


def test_a_module_that_lacks_a_tensor_says_what_it_was_made_for(module: Plan) -> None:
    first, third = torch.zeros(2, 3), torch.tensor([4, 5])
    for batch in ((), (first,), (first, third), (first, third, third[:1]), (third, third, first)):
        with pytest.raises(InputError, match=r"the plan was made for \[\('float32', \[2, 3\]\), \('int64', \[2\]\)\];"):
            as_planned(module, batch, "it")


def test_a_module_that_uses_no_tensor_needs_none(module: Plan) -> None:
    assert as_planned(module.model_copy(update={"tensors": []}), (), "it") == []
