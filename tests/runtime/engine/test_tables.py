"""Slices of trained embeddings and heads beside PyTorch's autograd on whole tables, their bits, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from reference import relative_error
from torch import Tensor
from torch.nn import functional

from tightfit.profiles.tracing.table_ops import table_head, table_rows
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu import tables

ROWS, WIDTH, SLICE = 50, 12, 16
"""of a table, which has three whole slices and a shorter one"""
TOKENS = 37


def slices(table: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(start, values) of each slice, with a gradient of its own."""
    for start in range(0, len(table), SLICE):
        yield start, table[start : start + SLICE].detach().clone().requires_grad_()


def based(start: int) -> tuple[Tensor, int]:
    """A first row as a tensor and an offset."""
    return torch.tensor(start - start % 3), start % 3


@pytest.mark.parametrize(("padding", "scale"), [(-1, 1.0), (7, 2.5)])
def test_slices_of_an_embedding_give_its_rows_and_gradient(
    padding: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BLOCK_ELEMENTS", 5 * WIDTH)  # several blocks of tokens
    torch.manual_seed(0)
    table, ids = torch.randn(ROWS, WIDTH), torch.randint(0, ROWS, (4, TOKENS))
    ids[0, :9] = 7  # a row that many tokens share
    dy = torch.randn(ids.numel(), WIDTH)
    parts = list(slices(table))
    made = torch.zeros(ids.numel(), WIDTH)
    for start, values in parts:
        made = table_rows(made, values, ids, *based(start), ROWS, scale, padding)
    made.backward(dy)
    exact = table.clone().requires_grad_()
    expected = functional.embedding(ids.view(-1), exact, padding_idx=padding if padding >= 0 else None) * scale
    assert torch.equal(made, expected)
    expected.backward(dy)
    torch.testing.assert_close(torch.cat([values.grad for _, values in parts]), exact.grad, rtol=1e-6, atol=1e-6)


def test_a_row_is_rounded_and_then_scaled_as_a_frozen_one_is() -> None:
    torch.manual_seed(0)
    table, ids = torch.randn(ROWS, WIDTH), torch.randint(0, ROWS, (TOKENS,))
    made = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16)
    for start, values in slices(table):
        made = table_rows(made, values.detach(), ids, *based(start), ROWS, 1.7, -1)
    assert torch.equal(made, table.bfloat16()[ids] * 1.7)


@pytest.mark.parametrize(
    ("id_", "message"), [(-1, r"hold -1, and no token is below 0"), (ROWS, r"hold 50, .* has 50 rows")]
)
def test_ids_outside_the_table_are_refused(id_: int, message: str) -> None:
    ids = torch.tensor([3, id_])
    with pytest.raises(InputError, match=message):
        table_rows(torch.zeros(2, WIDTH), torch.zeros(SLICE, WIDTH), ids, torch.tensor(0), 0, ROWS, 1.0, -1)


def head(
    table: Tensor, hidden: Tensor, labels: Tensor, cap: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(mean loss, gradient of hidden states, of each slice) of a head in slices."""
    wide = hidden.detach().float().requires_grad_()
    parts = list(slices(table))
    flat = labels.view(-1)
    lse, own = torch.full((len(flat),), -torch.inf), torch.zeros(len(flat))
    for start, values in parts:
        lse, own, *_ = table_head(lse, own, wide, values, labels, *based(start), cap, dtype, dtype is not torch.float32)
    labelled = flat >= 0
    loss = torch.where(labelled, lse - own, 0.0).sum() / labelled.sum()
    loss.backward()
    assert wide.grad is not None
    return loss.detach(), wide.grad, [values.grad for _, values in parts if values.grad is not None]


def exact_head(table: Tensor, hidden: Tensor, labels: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same in double precision by autograd."""
    weight, states = table.double().requires_grad_(), hidden.double().requires_grad_()
    logits = states @ weight.t()
    logits = cap * torch.tanh(logits / cap) if cap else logits
    loss = functional.cross_entropy(logits, labels.view(-1), ignore_index=-100)
    loss.backward()
    assert weight.grad is not None
    assert states.grad is not None
    return loss.detach(), states.grad, weight.grad


def labelled(tokens: int) -> Tensor:
    labels = torch.randint(0, ROWS, (1, tokens))
    labels[0, ::4] = -100
    return labels


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("at_once", [256, 8])
def test_slices_of_a_head_give_its_loss_and_gradients(
    cap: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "HEAD_ROWS", at_once)
    torch.manual_seed(0)
    table, hidden, labels = torch.randn(ROWS, WIDTH), torch.randn(TOKENS, WIDTH), labelled(TOKENS)
    loss, dhidden, parts = head(table, hidden, labels, cap, torch.float32)
    exact_loss, exact_dhidden, exact_rows = exact_head(table, hidden, labels, cap)
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-6)
    assert relative_error(dhidden, exact_dhidden) < 1e-6
    assert relative_error(torch.cat(parts), exact_rows) < 1e-6
    assert not dhidden[labels[0] < 0].any()


@pytest.mark.parametrize("instructions", [True, False])
def test_a_head_in_bfloat16_is_as_exact_as_its_type(instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processor's own products of bfloat16, and with those in float32 that stand in for them."""
    monkeypatch.setattr(tables, "narrow", lambda dtype: dtype is torch.float32 or instructions)
    monkeypatch.setattr(tables, "HEAD_ROWS", 16)
    torch.manual_seed(0)
    table, hidden = torch.randn(ROWS, WIDTH), torch.randn(TOKENS, WIDTH).bfloat16()
    labels = labelled(TOKENS)
    loss, dhidden, parts = head(table, hidden, labels, 0.0, torch.bfloat16)
    exact_loss, exact_dhidden, exact_rows = exact_head(table.bfloat16(), hidden, labels, 0.0)
    assert float(loss) == pytest.approx(float(exact_loss), rel=3e-3)
    assert relative_error(dhidden, exact_dhidden) < 1e-2
    assert relative_error(torch.cat(parts), exact_rows) < 1e-2


def test_gradients_are_the_same_to_the_bit_whatever_the_threads() -> None:
    torch.manual_seed(0)
    tokens = 1000
    table, ids = torch.randn(300, 64), torch.randint(0, 300, (tokens,))
    ids[:500] = 3
    dy, hidden, labels = torch.randn(tokens, 64), torch.randn(tokens, 64), torch.randint(0, 300, (1, tokens))
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            rows = torch.empty(300, 64)
            tables.table_rows_backward(dy, table, ids, torch.tensor(0), 0, 1.5, -1, out=(rows,))
            made.append(rows)
    finally:
        torch.set_num_threads(before)
    in_order = torch.zeros(300, 64)
    for token in range(tokens):
        in_order[ids[token]] += 1.5 * dy[token]
    assert torch.equal(made[0], made[1])
    torch.testing.assert_close(made[0], in_order, rtol=0.0, atol=1e-4)
    assert (
        relative_error(head(table, hidden, labels, 0.0, torch.float32)[1], exact_head(table, hidden, labels, 0.0)[1])
        < 1e-5
    )
