"""Recognises in a transformers model the patterns that tightfit has operators for, and puts the operators in their
place.

A pattern is recognised by what it computes, not by its name: a norm, a gated MLP, an embedding or a rotation is run on
random numbers, and replaced if the operator gives the same results (`SAME`). Everything else runs as it is written.

Attention goes through transformers' attention interface. transformers rotates queries and keys before it calls that
interface, and tightfit's attention rotates inside; so each rotation is remembered (`Context`), and attention takes the
tensors from before it with the tables of the angles. The traced rotation, which nothing reads then, is dropped as dead
code.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn import functional as F

from tightfit.profiles.models.decoder import window_mask
from tightfit.profiles.models.decoder_module import Rows
from tightfit.profiles.models.projection import Projection
from tightfit.profiles.tracing.answer_ops import attend
from tightfit.profiles.tracing.torch_ops import attention, gated, rms_norm
from tightfit.runtime.common.errors import InputError

NAME = "tightfit"
"""Under this name our attention and our masks are registered with transformers."""
SAME = 1e-5
"""Largest difference of results, relative to the largest of them, at which an operator replaces a pattern."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
ROTATIONS = ("apply_rotary_pos_emb",)
"""What transformers' modelling files call the function that rotates queries and keys."""
EXPORTING = "is_torchdynamo_exporting"
"""By this function modelling files choose, for targets other than PyTorch, loops over tokens in place of an
operator.
"""
ROWS = 64
"""Rows of a mask, about, that are looked at where there are too many to look at all."""
PROBE = (8, 16)
"""Width and inner width of the small copy of an MLP that is compared."""


class FlatProjection(Projection):
    """`Projection` on hidden states of any number of dimensions [..., inputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(inputs, outputs, bias, dtype)
        self.in_features, self.out_features = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)


class FlatNorm(nn.Module):
    """RMSNorm over the last of any number of dimensions; its weight is a float32 constant."""

    def __init__(self, width: int, eps: float, unit_offset: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32), requires_grad=False)
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, x: Tensor) -> Tensor:
        # Heads in front of tokens [batch, heads, seq, width] are a transposed view, and stay one: rows are independent.
        turned = x.dim() == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
        x = x.transpose(1, 2) if turned else x
        made: Tensor = rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps, self.unit_offset)[0].view(x.shape)
        return made.transpose(1, 2) if turned else made


@dataclass
class Context:
    """What is remembered while the forward of one decoder is traced.

    Tensors are looked up by their storage, since queries and keys may be transposed between rotation and attention.
    """

    seq: int
    widest: int
    """Largest width of a head."""
    tables: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    """Storage of a cosine table -> (the table, cosines and sines float32 [seq, width / 2])."""
    rotated: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict)
    """Storage of a rotated tensor -> (it, the tensor before, cosines, sines)."""
    masks: dict[int, Tensor] = field(default_factory=dict)
    """Sliding window in tokens -> its mask float32 [1, 1, seq, seq]."""
    positions: Tensor | None = None
    """Of each token in its sample, int64 [batch, seq]; None: every row is one sample."""
    attended: int = 0
    """How often our attention was called."""
    others: list[str] = field(default_factory=list)
    """Attention that is not our operator, in words."""
    still: tuple[Tensor, Tensor] | None = None
    """Tables of no rotation, [seq, widest / 2]."""
    answering: int = 0
    """Most tokens of an answer and what came before, where the forward is a step of one, with a cache; 0: it is not."""

    def begin(self, positions: Tensor | None) -> None:
        """Forget an earlier forward, and make what all layers share before the first of them."""
        self.positions, self.attended = positions, 0
        self.others.clear()
        self.tables.clear()
        self.rotated.clear()
        self.masks.clear()
        half = self.widest // 2
        self.still = torch.ones(self.seq, half), torch.zeros(self.seq, half)

    def unturned(self, width: int) -> tuple[Tensor, Tensor]:
        """Tables of no rotation for heads of `width`."""
        half = width // 2
        if self.still is None or self.still[0].shape[1] < half:
            return torch.ones(self.seq, half), torch.zeros(self.seq, half)
        return self.still[0][:, :half], self.still[1][:, :half]

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """(the tensor that `x` was before its rotation, cosines, sines); None if it was not rotated."""
        found = self.rotated.get(_storage(x))
        if found is None:
            return None
        made, source, cos, sin = found
        if _same_window(x, made):
            return source, cos, sin
        return (source.transpose(1, 2), cos, sin) if _same_window(x, made.transpose(1, 2)) else None


_active: list[Context] = []


class Recognition:
    """A context in which a model's forward is traced: its rotations are remembered, and attention looks them up."""

    def __init__(self, model: nn.Module, context: Context) -> None:
        names = sorted({type(module).__module__ for module in model.modules()})
        self.files = [sys.modules[name] for name in names if name.startswith("transformers.models.")]
        self.context = context
        found = [(file, name) for file in self.files for name in ROTATIONS if hasattr(file, name)]
        self.rotations = [(file, name, kind) for file, name in found if (kind := _half_split(getattr(file, name)))]
        """(modelling file, name of its function, "pair" if it rotates queries and keys or "one" if one tensor)."""

    @contextlib.contextmanager
    def active(self, positions: Tensor | None = None) -> Iterator[None]:
        import transformers.masking_utils as masking

        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(masking, "find_packed_sequence_indices", return_value=None))
            for file, name, kind in self.rotations:
                call = _remembering(getattr(file, name), kind, self.context)
                patches.enter_context(mock.patch.object(file, name, call))
            for file in self.files:
                if hasattr(file, EXPORTING):
                    patches.enter_context(mock.patch.object(file, EXPORTING, return_value=False))
            _active.append(self.context)
            try:
                self.context.begin(positions)
                yield
            finally:
                _active.pop()


def register() -> None:
    """Register our attention and our masks with transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any], **_: Any) -> Any:
    """The mask that transformers asks for: None if it is the causal one, else float32 [1, 1, seq, seq] to be added.

    Raises InputError for a mask that is neither causal nor causal with a sliding window.
    """
    if _active[-1].answering:
        return _mask_of_answer(mask_function, q_length)
    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        place, zero = torch.arange(q_length), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        try:
            seen = mask_function(zero, zero, place.view(1, 1, -1, 1), place.view(1, 1, 1, -1))
            seen = torch.as_tensor(seen).expand(1, 1, q_length, q_length)[0, 0]
        except Exception as error:
            raise InputError(
                f"an attention mask of this model is not a function of two positions ({error}); it is not supported"
            ) from error
        distance = place[:, None] - place[None, :]
        window = int(seen[-1].sum())
        causal = bool((seen == (distance >= 0)).all())
        if not causal and not bool((seen == ((distance >= 0) & (distance < window))).all()):
            raise InputError(
                "an attention mask of this model is neither causal nor a sliding window; it is not supported"
            )
    if causal:
        return None
    made = _active[-1].masks
    if window not in made:
        made[window] = window_mask(q_length, window)[None, None]
    return made[window]


def _mask_of_answer(mask_function: Callable[..., Any], count: int) -> Tensor | None:
    """In place of the mask, for a step of an answer: None if it is the causal one, else a tensor that stands for its
    window.

    Raises InputError as `_mask` does.
    """
    context = _active[-1]
    most = context.answering
    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        place, zero = torch.arange(most), torch.zeros(1, 1, 1, 1, dtype=torch.int64)

        def seen(row: int) -> Tensor:
            made = mask_function(zero, zero, torch.full((1, 1, 1, 1), row), place.view(1, 1, 1, -1))
            return torch.as_tensor(made).expand(1, 1, 1, most).reshape(-1)

        try:
            window = int(seen(most - 1).sum())
            rows = {*range(0, most, max(1, most // ROWS)), window - 1, min(window, most - 1), most - 1}
            alike = all(bool((seen(row) == ((place <= row) & (place > row - window))).all()) for row in rows)
        except Exception as error:
            raise InputError(
                f"an attention mask of this model is not a function of two positions ({error}); it is not supported"
            ) from error
        if not alike:
            raise InputError(
                "an attention mask of this model is neither causal nor a sliding window; it is not supported"
            )
    if window == most:
        return None
    if window not in context.masks:
        context.masks[window] = torch.zeros(1, 1, count, count)
    return context.masks[window]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [batch, heads, seq, width], key and value [batch, kv heads, seq, width]
    -> [batch, seq, heads, width].

    What tightfit's operator cannot do (softcap, sinks, values of another width) runs as PyTorch's operators.
    """
    batch, heads, seq, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    context = _active[-1]
    context.attended += 1
    if softcap or s_aux is not None or width % 2 or value.shape[-1] != width or key.shape[2] != seq:
        context.others.append(type(module).__name__)
        return _plain_attention(query, key, value, attention_mask, scale, softcap, s_aux), None
    first, second = context.before(query), context.before(key)
    cos, sin = context.unturned(width)
    if first is not None and second is not None and first[1] is second[1]:
        (query, cos, sin), key = first, second[0]

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch * seq, -1)

    if context.answering:
        own = None if attention_mask is None else _storage(attention_mask)
        window = next((each for each, mask in context.masks.items() if _storage(mask) == own), None)
        if attention_mask is not None and window is None:
            raise InputError("this model changes its attention masks; it is not supported")
        made = attend(flat(query), flat(key), flat(value), cos, sin, key.shape[1], width, window, scale)
        return made.view(batch, seq, heads, width), None
    mask = None if attention_mask is None else attention_mask[0, 0]
    y, *_rest = attention(
        flat(query), flat(key), flat(value), cos, sin, mask, context.positions, heads, key.shape[1], scale
    )
    return y.view(batch, seq, heads, width), None


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in PyTorch's operators, with all scores of a layer in memory; shapes as in `_attend`."""
    groups, seq = query.shape[1] // key.shape[1], query.shape[2]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        place = torch.arange(seq)
        scores = scores.masked_fill(place[None, :] > place[:, None], -math.inf)
    else:
        scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, seq, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous()


def replace_norm(norm: nn.Module) -> FlatNorm | None:
    """Our norm in place of one that computes the same (RMSNorm, with the weight or with 1 + weight); None if it does
    not.
    """
    own = dict(norm.named_parameters(recurse=False))
    eps = next((getattr(norm, key) for key in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, key)), None)
    if "norm" not in type(norm).__name__.lower() or own.keys() != {"weight"} or own["weight"].dim() != 1 or eps is None:
        return None
    if len(inspect.signature(norm.forward).parameters) != 1:  # gated norms of Mamba take a gate as well
        return None
    width = own["weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((2, 3, width), (width,)))
    x = x * 0.01  # so small that a misplaced epsilon would be seen
    probe = bare_copy(norm)
    probe.weight = nn.Parameter(weight)
    made = tried(probe, x)
    for unit_offset in (False, True):
        ours = rms_norm(x.view(-1, width), weight, float(eps), unit_offset)[0].view(x.shape)
        if made is not None and same(ours, made):
            return FlatNorm(width, float(eps), unit_offset)
    return None


def computes_linear(module: nn.Linear) -> bool:
    """Whether a class made of nn.Linear computes what that does."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 3, PROBE[0]), PROBE[::-1], PROBE[1:]))
    own = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
    probe = bare_copy(module)
    probe._parameters.update({name: own[name] for name, held in module._parameters.items() if held is not None})
    exact = F.linear(x, weight, bias if "bias" in dict(module.named_parameters()) else None)
    return same(exact, tried(probe, x))


def replace_embedding(table: nn.Embedding) -> Rows | None:
    """Our embedding in place of one that gathers rows and multiplies them with one number; None if it does more."""
    probe = bare_copy(table)
    probe.weight = nn.Parameter(torch.randn(PROBE, generator=torch.Generator().manual_seed(0)))
    # The probe may have no such row, and in the forward it is a row like any other.
    probe.padding_idx = None  # type: ignore[assignment]
    ids = torch.arange(PROBE[0])[None]
    made = tried(probe, ids)
    if made is None:
        return None
    plain = probe.weight.detach()[None]
    scale = factor_between(made, plain)
    if not same(plain * scale, made):
        return None
    (rows, columns), dtype = table.weight.shape, table.weight.dtype
    return Rows(rows, columns, dtype, float(torch.tensor(scale, dtype=dtype)))


def fuse_gate(mlp: nn.Module) -> None:
    """Let an MLP that computes down(activation(gate(x)) * up(x)) use our operator.

    Gate and up may be one projection. The module's own projections stay, whatever they are called.
    """
    linear = {name: child for name, child in mlp.named_children() if isinstance(child, (nn.Linear, Projection))}
    others = [child for name, child in mlp.named_children() if name not in linear]
    if len(linear) not in (2, 3) or any(any(True for _ in child.parameters()) for child in others):
        return
    if any(True for _ in mlp.parameters(recurse=False)):
        return
    width, inner = PROBE
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    for names in itertools.permutations(linear):
        down_name = names[-1]
        sizes = [(width, inner if len(names) == 3 else 2 * inner)] * (len(names) - 1) + [(inner, width)]
        probe = copy.copy(mlp)
        probe.__dict__ = dict(mlp.__dict__)
        probe._modules = dict(mlp._modules)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = {name: nn.Linear(*size) for name, size in zip(names, sizes)}
        probe._modules.update(small)
        made = tried(probe, x)
        if made is None:
            continue
        with torch.no_grad():
            pair = [small[name](x) for name in names[:-1]] if len(names) == 3 else list(small[names[0]](x).chunk(2, -1))
            for (activation, call), first in itertools.product(ACTIVATIONS.items(), (0, 1)):
                if len(names) == 3 and first == 1:
                    continue  # another permutation
                if same(small[down_name](call(pair[first]) * pair[1 - first]), made):
                    mlp.forward = _gated_forward(mlp, names, first, activation)
                    return


def _gated_forward(mlp: nn.Module, names: tuple[str, ...], first: int, activation: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(names) == 3:
            pair = [getattr(mlp, name)(flat) for name in names[:-1]]
        else:
            pair = list(getattr(mlp, names[0])(flat).chunk(2, dim=-1))
        made: Tensor = getattr(mlp, names[-1])(gated(pair[first], pair[1 - first], activation))
        return made.view(*x.shape[:-1], made.shape[-1])

    return forward


def remember_tables(rotary: nn.Module, context: Context) -> None:
    """Let a module that makes (cosines, sines) compute them in float32, and remember halves of them for attention.

    Those for attention are of the positions from 0 on, from which it takes each token's; nothing else reads them.
    """
    original = rotary.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = original(x.float(), *args, **kwargs)  # x only tells the type and the device
        if not (isinstance(made, tuple) and len(made) == 2 and made[0].dim() == 3):
            return tuple(t.to(x.dtype) for t in made) if isinstance(made, tuple) else made.to(x.dtype)
        cos, sin = (table.to(x.dtype) for table in made)
        if cos is made[0]:  # a storage of its own, so that tables are told apart
            cos, sin = cos.clone(), sin.clone()
        half = made[0].shape[-1] // 2
        if context.positions is not None:
            named = inspect.signature(original).bind(x.float(), *args, **kwargs)
            if isinstance(told := named.arguments.get("position_ids"), Tensor):
                named.arguments["position_ids"] = torch.arange(context.seq).expand(*told.shape[:-2], 1, context.seq)
            made = original(*named.args, **named.kwargs)
        context.tables[_storage(cos)] = cos, *(table[0, :, :half].contiguous() for table in made)
        return cos, sin

    rotary.forward = forward


def _half_split(rotate: Callable[..., Any]) -> str:
    """Whether the function rotates the halves of (q, k), "pair", or of one tensor, "one", as our attention does; else
    "".
    """
    names = list(_signature(rotate).parameters)
    kind = "pair" if names[:4] == ["q", "k", "cos", "sin"] else "one" if names[1:3] == ["cos", "sin"] else ""
    if not kind:
        return ""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 3, 8, generator=generator)
    angles = torch.randn(1, 3, 4, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    made = tried(rotate, x, x, *tables) if kind == "pair" else tried(rotate, x, *tables)
    low, high = x[..., :4], x[..., 4:]
    ours = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    results = made if isinstance(made, tuple) else (made,)
    return kind if all(same(ours, result) for result in results) else ""


def _signature(rotate: Callable[..., Any]) -> inspect.Signature:
    """With the package `kernels`, functions that it could replace are modules in transformers, with a forward."""
    return inspect.signature(rotate.forward if isinstance(rotate, nn.Module) else rotate)


def _remembering(rotate: Callable[..., Any], kind: str, context: Context) -> Callable[..., Any]:
    def remembered(*args: Any, **kwargs: Any) -> Any:
        made = rotate(*args, **kwargs)
        named = _signature(rotate).bind(*args, **kwargs).arguments
        cos = named["cos"]
        table = context.tables.get(_storage(cos))
        if table is not None and _same_window(table[0], cos):
            sources = (named["q"], named["k"]) if kind == "pair" else args[:1]
            for source, result in zip(sources, made if kind == "pair" else (made,)):
                if source.shape[-1] == cos.shape[-1]:
                    context.rotated[_storage(result)] = result, source, *table[1:]
        return made

    return remembered


def bare_copy(module: nn.Module) -> nn.Module:
    """A copy that shares no parameters: its own are to be set."""
    probe = copy.copy(module)
    probe.__dict__ = dict(module.__dict__)
    probe._parameters = dict(module._parameters)
    probe._buffers = {name: None if b is None else b.float() for name, b in module._buffers.items()}
    return probe


def tried(call: Callable[..., Any], *args: Any) -> Any:
    """What the call returns, or None if it fails: a probe that does not fit is no error."""
    try:
        with torch.no_grad():
            return call(*args)
    except Exception:
        return None


def same(one: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or one.shape != other.shape or not bool(other.isfinite().all()):
        return False
    return float((one - other).abs().max()) <= SAME * float(other.abs().max())


def factor_between(made: Tensor, plain: Tensor) -> float:
    """The number that `plain` is to be multiplied with to come nearest to `made`, as a float32."""
    wide = plain.double()
    return float(((made.double() * wide).sum() / wide.square().sum()).float())


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _same_window(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.storage_offset()) == (other.shape, other.stride(), other.storage_offset())
