"""Any dense decoder that transformers has, as one plain `nn.Module` of the kind of `profiles.models.decoder.Decoder`.

transformers builds the model from its config, without memory for its weights. Its linear layers become projections with
LoRA pairs, its embeddings gathered rows, and what `profiles.models.transformers_kernels` recognises our operators; the
rest runs as transformers has it. The loss head is ours, in slices of the vocabulary.

Names are transformers', but the prefix of the body is always ``model.``: GPT-2's ``transformer.h.0`` is
``model.h.0``, and the config field ``adapter_body`` says what adapters and checkpoints call it.

transformers is imported by the process that profiles, and by no other.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tightfit.profiles.models.decoder_facts import DecoderFacts, FrozenTensor, buffer_value
from tightfit.profiles.models.decoder_module import DecoderModule
from tightfit.profiles.models.family import families
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.models.router_loss import RouterSums, sums_of_batch
from tightfit.profiles.models.saved_modules import PART, SavedModule
from tightfit.profiles.models.transformers_config import (
    encoder_decoder,
    experts,
    not_installed,
    refuse_by_config,
    refuse_by_name,
    refused_in_its_words,
    settings_of,
)
from tightfit.profiles.models.transformers_experts import (
    GATE_UP,
    names_of_experts,
    parts_of,
    replace_experts,
    router_loss_of,
    routers_of,
    turned_by,
)
from tightfit.profiles.models.transformers_kernels import (
    NAME,
    SAME,
    Context,
    FlatProjection,
    Recognition,
    computes_linear,
    factor_between,
    fuse_gate,
    register,
    remember_tables,
    replace_embedding,
    replace_norm,
)
from tightfit.profiles.schema import POSITIONS, Preference
from tightfit.profiles.tracing.torch_ops import MOST_CAP
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import BODY, peft_name

NOT_OURS = ("adapter_body", "adapter_base", "model_type", "wrapper_type")
"""Fields of a source's config that are not the model's own settings."""
MOST_BUFFER_BYTES = 1 << 20
"""Larger buffers are masks and tables that transformers keeps from earlier versions, and are not stored."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RECURRENT = "DeltaNet|Mamba|ShortConv|Recurrent|Retention|Rwkv"
"""What is in the names of transformers' classes that carry a state from token to token."""
NO_PAIRS = (("falcon_h1", "out_proj"), ("nemotron_h", "out_proj"))
"""(model_type, name of linear layers) that PEFT takes no pairs for: a kernel of Mamba reads their weights beside it"""
LONG = "long_inv_freq"
"""Name of the buffer with the frequencies that longrope uses for sequences longer than the model was first trained
for."""


class AnyDecoder(DecoderModule):
    """A model whose samples cannot share rows takes no positions (`rows_apart`). Dropout of the base model is off. The
    parameters have no values: use it under `torch._subclasses.FakeTensorMode`, after `without_values`. Without `lora`
    nothing is trained. `longest` is the length of sequences for which rotary frequencies are chosen, where it is not
    `seq`: an answer's steps have those of the whole answer.

    Raises InputError for a config that transformers does not take, and for models that are refused.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        seq: int,
        lora: LoraConfig | None,
        preference: Preference | None = None,
        longest: int | None = None,
        matrix_rows: int | None = None,
    ) -> None:
        super().__init__()
        with refused_in_its_words(config.get("model_type")):
            theirs = _built(config, dtype)
            self.cap, self.scale = _head(theirs)
            _choose_frequencies(theirs, longest or seq)
        body = getattr(theirs, theirs.base_model_prefix)
        self.model = body
        head = theirs.get_output_embeddings()
        tied = head.weight is theirs.get_input_embeddings().weight
        self.head_name = "" if tied else next(name for name, child in theirs.named_modules() if child is head)
        sizes = [getattr(child, key, None) for child in body.modules() for key in ("head_dim", "head_size")]
        self.context = Context(seq=seq, widest=max((size for size in sizes if isinstance(size, int)), default=2))
        self.recognition = Recognition(body, self.context)
        body_name = config.get("adapter_body", BODY)
        savable, padding = _savable(theirs, body_name), theirs.get_input_embeddings().padding_idx
        modules = [
            peft_name(_our_name(name, theirs.base_model_prefix), body_name) for name, _ in theirs.named_modules()
        ]
        _replace(body, dtype, self.context)
        self.router_loss = router_loss_of(theirs)
        self._sums: RouterSums | None = None
        """of the forward that runs"""
        for router, output in routers_of(theirs) if self.router_loss else ():
            router.register_forward_hook(functools.partial(self._routed, output))
        # Our operators for a head in slices have no bias.
        self.whole_head = head.bias is not None or (self.cap or 0.0) > MOST_CAP
        if not tied or head.bias is not None:
            rows, width = head.weight.shape
            with torch.device("meta"):
                ours = FlatProjection(width, rows, head.bias is not None, dtype)
            ours.adaptable = False
            if tied:
                ours.weight = self.embedding.weight
            self.head_name = next(name for name, child in theirs.named_modules() if child is head)
            setattr(self, self.head_name, ours)
        self.mixing = _mixing(body)
        self.preference = preference
        with torch.device("meta"):
            self._train(
                lora,
                savable,
                model=f"the {config.get('model_type')} model",
                body=body_name,
                matrix_rows=matrix_rows,
                padding=padding,
                modules=modules,
            )
        self.eval()
        for parameter_name, parameter in self.named_parameters():
            parameter.requires_grad_(".lora_" in parameter_name or f".{PART}." in parameter_name)

    @property
    def embedding(self) -> Any:
        return self.model.get_input_embeddings()

    def ended(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale if self.scale != 1.0 else hidden

    def learn_rows(self, sample: Mapping[str, Tensor]) -> None:
        """Find out whether samples can share rows, from a forward on `sample`, under a FakeTensorMode."""
        takes = "position_ids" in inspect.signature(self.model.forward).parameters
        try:
            with torch.no_grad():
                self(*(tensor for name, tensor in sample.items() if takes or name != POSITIONS))
        except Exception as error:
            self.rows_apart = f"its code fails when it is given positions ({(str(error).splitlines() or [''])[0]})"
            return
        layers = self.model.config.num_hidden_layers
        if self.mixing:
            self.rows_apart = f"its {self.mixing} mixes neighbouring tokens"
        elif self.context.others:
            self.rows_apart = f"its {self.context.others[0]} computes more than tightfit's attention"
        elif not takes:
            self.rows_apart = "its code takes no positions"
        elif self.context.attended != layers:
            self.rows_apart = f"attention is recognised in {self.context.attended} of its {layers} layers"

    def through_layers(
        self, input_ids: Tensor, positions: Tensor | None, labels: Tensor
    ) -> tuple[list[Tensor], RouterSums | None]:
        given = {} if positions is None else {"position_ids": positions}
        self._sums = sums_of_batch(self.router_loss, labels)
        with self.recognition.active(positions):
            outputs = self.model(input_ids=input_ids, use_cache=False, **given)
        return [outputs[0].reshape(-1, outputs[0].shape[-1])], self._sums

    def _routed(self, output: int, router: nn.Module, given: Any, made: Any) -> None:
        """Sum up the scores that a router has made."""
        if self._sums is not None:
            scores = made[output] if isinstance(made, tuple) else made
            self._sums.add(scores.reshape(len(self._sums.counted), -1))


def _mixing(body: nn.Module) -> str:
    """The class of a module that mixes neighbouring tokens in another way than attention; "" if there is none."""
    for child in body.modules():
        name = type(child).__name__
        if isinstance(child, CONVOLUTIONS) or re.search(RECURRENT, name):
            return name
    return ""


@functools.lru_cache(maxsize=8)
def _facts(text: str) -> tuple[DecoderFacts, Callable[[str], str]]:
    """What a config's decoder consists of, and how transformers renames the tensors of its checkpoints."""
    config = json.loads(text)  # noqa: TID251  written by `json.dumps`
    made = _built(config, torch.float32)
    _head(made)
    _choose_frequencies(made, 1)
    prefix = made.base_model_prefix
    embedding, head = made.get_input_embeddings().weight, made.get_output_embeddings().weight
    linear, offsets, rows = {}, {}, {}
    stacked: dict[int, int] = {}
    in_turn: set[int] = set()
    for child in made.modules():
        if _is_linear(child):
            linear[id(child.weight)] = not isinstance(child, nn.Linear)
        elif isinstance(child, nn.Embedding):
            rows[id(child.weight)] = child.weight.shape[0] == embedding.shape[0]
        elif (norm := replace_norm(child)) is not None:
            offsets[id(child.weight)] = 0.0 if norm.unit_offset else 1.0
        elif "Experts" in type(child).__name__:
            stacked |= {id(tensor): len(tensor) for tensor in child.parameters() if tensor.dim() == 3}
            if turned_by(child):
                linear |= {id(tensor): True for tensor in child.parameters() if tensor.dim() == 3}
                in_turn |= {id(tensor) for name, tensor in child.named_parameters() if name.startswith(GATE_UP)}
    conversions = _conversions(made)
    tensors, met = [], set()
    keys = set(made.state_dict())
    for key, tensor in (*made.named_parameters(), *made.named_buffers()):
        if id(tensor) in met or (not tensor.is_meta and tensor.nbytes > MOST_BUFFER_BYTES):
            continue
        met.add(id(tensor))
        transposed = linear.get(id(tensor), False)
        role = "matrix" if id(tensor) in linear or id(tensor) in stacked else "other"
        shape = tuple(tensor.mT.shape if transposed else tensor.shape)
        if id(tensor) in stacked:  # the matrices of experts stand below one another
            shape = (shape[0] * shape[1], shape[2])
        if tensor is embedding or tensor is head or rows.get(id(tensor)):
            role = "embedding"
        tensors.append(
            FrozenTensor(
                name=_our_name(key, prefix),
                key=key,
                shape=shape,
                role=role,
                transposed=transposed,
                experts=stacked.get(id(tensor), 0),
                in_turn=id(tensor) in in_turn,
                parts=parts_of(key, conversions) if id(tensor) in stacked else (),
                mean=offsets.get(id(tensor), 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0),
                value=None if tensor.is_meta else buffer_value(tensor),
                persistent=key in keys,
            )
        )
    theirs = made.config
    known: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": head.shape[1],
        "num_hidden_layers": theirs.num_hidden_layers,
        "max_position_embeddings": getattr(theirs, "max_position_embeddings", None),
    }
    wrapper = _causal_class(config.get("wrapper_type"))
    if f"{prefix}." != BODY or (wrapper and not wrapper.endswith("ForConditionalGeneration")):
        known["adapter_body"] = f"{prefix}."
    unexpected = getattr(made, "_keys_to_ignore_on_load_unexpected", None) or ()
    names = {id(child): _our_name(name, prefix) for name, child in made.named_modules()}
    found = DecoderFacts(
        tensors=tuple(tensors),
        config={key: value for key, value in known.items() if value},
        prefix=prefix,
        embedding=f"{names[id(made.get_input_embeddings())]}.weight",
        head=f"{names[id(made.get_output_embeddings())]}.weight",
        unexpected=tuple(sorted(unexpected)),
    )
    return found, _renaming(made)


def _renaming(made: Any) -> Callable[[str], str]:
    """As transformers renames the tensors of a checkpoint when it loads one."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [one for one in _conversions(made) if isinstance(one, WeightRenaming)]
    keys = made.state_dict()

    def rename(key: str) -> str:
        return str(rename_source_key(key, renamings, [], made.base_model_prefix, keys)[0])

    return rename


def _conversions(made: Any) -> list[Any]:
    """What transformers does with the tensors of a checkpoint when it loads one."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(made) or ())


def _causal_class(model_type: Any) -> str:
    """The class that AutoModelForCausalLM takes for a config of this type, "" if there is none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    return str(KNOWN.get(model_type) or "") if isinstance(model_type, str) else ""


def facts(config: Mapping[str, Any], stored: Iterable[str] = ()) -> DecoderFacts:
    """What a config's decoder consists of, with the names of `stored`, tensors of a checkpoint, as it has them now.
    Raises InputError as `AnyDecoder` does.
    """
    with refused_in_its_words(config.get("model_type")):
        found, rename = _facts(json.dumps(dict(config), sort_keys=True))
        renamed = {name: rename(name) for name in sorted(stored)}
    differing = {name: new for name, new in renamed.items() if new != name}
    return found.model_copy(update={"renamed": differing})


def _built(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model of a config; parameters are on the meta device, buffers have their values."""
    name = config.get("model_type")
    refuse_by_config(config)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as TWO_SEQUENCES
    except ImportError as error:
        raise not_installed(name) from error
    refuse_by_name(name, KNOWN, TWO_SEQUENCES, transformers.__version__)
    register()
    settings = settings_of({key: value for key, value in config.items() if key not in NOT_OURS})
    with _quietly():
        theirs = transformers.AutoConfig.for_model(str(name), **settings)
        if getattr(theirs, "is_encoder_decoder", False):
            raise encoder_decoder(name)
        if (text := theirs.get_text_config()) is not theirs and "text_config" not in config:
            raise InputError(
                f"model_type {name!r} is a wrapper around a {text.model_type!r} model, and the config has no"
                " 'text_config' that describes it; download the config.json again"
            )
        with _weightless():
            made = _from_config(transformers, theirs, dtype)
    made.eval()
    made.tie_weights()
    _refuse_by_modules(made, name)
    return made


def _from_config(transformers: Any, theirs: Any, dtype: torch.dtype) -> Any:
    """The model with our attention, or with PyTorch's if its code does not ask for another's."""
    failure: Exception | None = None
    for implementation in (NAME, "sdpa", "eager"):
        try:
            made = transformers.AutoModelForCausalLM.from_config(
                copy.deepcopy(theirs), attn_implementation=implementation, dtype=dtype
            )
        except Exception as error:
            failure = failure or error
            continue
        if implementation != NAME or hasattr(sys.modules[type(made).__module__], "ALL_ATTENTION_FUNCTIONS"):
            return made
    assert failure is not None
    raise failure


def _refuse_by_modules(made: Any, name: Any) -> None:
    for child in made.modules():
        inside = getattr(child, "experts", None)
        is_list = isinstance(inside, nn.Module) and not any(True for _ in inside.parameters(recurse=False))
        if is_list or ("Experts" in type(child).__name__ and replace_experts(child) is None):
            raise experts(name, type(child).__name__)
    kinds = {type(child).__name__ for child in made.modules()}
    if not any("attention" in kind.lower() and not re.search(RECURRENT, kind) for kind in kinds):
        raise InputError(
            f"model_type {name!r} is not supported; supported: {', '.join(families())}, and decoders of transformers"
            " that have attention layers"
        )


@contextlib.contextmanager
def _weightless() -> Iterator[None]:
    """Within this context parameters of modules are on the meta device; buffers are made as usual."""
    original = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        original(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", without_memory):
        yield


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Within this context transformers neither warns nor logs."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is x @ W.T (+ bias) and nothing else: nn.Linear, or GPT-2's Conv1D with W transposed."""
    from transformers.pytorch_utils import Conv1D

    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    return isinstance(module, nn.Linear) and computes_linear(module)


def _replace(body: nn.Module, dtype: torch.dtype, context: Context) -> None:
    """Put our projections, embeddings, norms and gates in place of transformers' in a decoder's body."""
    names = dict(body.named_modules())
    inside = {name for name in names if re.search(r"\.\d+\.", f".{name}.")}
    kind = getattr(body.config, "model_type", None)
    outside = {name.rpartition(".")[2] for name, child in names.items() if name not in inside and _is_linear(child)}
    experts_own = names_of_experts(str(kind))
    for child in names.values():
        fuse_gate(child)
        if hasattr(child, "inv_freq") or type(child).__name__.endswith("RotaryEmbedding"):
            remember_tables(child, context)
    for name, child in names.items():
        parent_name, _, last = name.rpartition(".")
        if not name:
            continue
        ours: nn.Module | None
        if _is_linear(child):
            weight: Any = child.weight
            outputs, inputs = weight.shape if isinstance(child, nn.Linear) else weight.t().shape
            with torch.device("meta"):
                projection = FlatProjection(inputs, outputs, child.bias is not None, dtype)
            projection.adaptable = name in inside and last not in outside | experts_own and (kind, last) not in NO_PAIRS
            ours = projection
        elif isinstance(child, nn.Embedding):
            ours = replace_embedding(child)
        elif "Experts" in type(child).__name__:
            ours = replace_experts(child)
        else:
            ours = replace_norm(child)
        if ours is not None:
            setattr(names[parent_name], last, ours.to("meta"))


def _savable(made: Any, body: str) -> tuple[SavedModule, SavedModule]:
    """Embedding and head of transformers' model, as modules that may be trained in full."""
    embedding, head = made.get_input_embeddings(), made.get_output_embeddings()
    names = {id(child): _our_name(name, made.base_model_prefix) for name, child in made.named_modules()}
    plain = isinstance(embedding, nn.Embedding) and replace_embedding(embedding) is not None
    starts = embedding if head.weight is embedding.weight else head

    def saved(module: nn.Module, start: nn.Module, refusal: str) -> SavedModule:
        name = names[id(module)]
        return SavedModule(
            name=name, called=peft_name(name, body), weight=f"{names[id(start)]}.weight", refusal=refusal
        )

    return (
        saved(embedding, embedding, "" if plain else "it does more than to gather rows"),
        saved(head, starts, "" if head.bias is None else "it has a bias, which is not trained here"),
    )


def _our_name(key: str, prefix: str) -> str:
    return f"{BODY}{key.removeprefix(f'{prefix}.')}" if key.startswith(f"{prefix}.") else key


def _head(made: Any) -> tuple[float | None, float]:
    """(soft cap of the logits or None, factor of the logits), found by running the head on random numbers.

    Raises InputError for a head that computes something else.
    """
    head = made.get_output_embeddings()
    if head is None or not hasattr(made, made.base_model_prefix):
        raise InputError(f"{type(made).__name__} has no head over a vocabulary; it is not supported")
    name = next(name for name, child in made.named_modules() if child is head)
    width = head.weight.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden, small = torch.randn(1, 3, width), nn.Linear(width, 5, bias=head.bias is not None)
    probe = copy.copy(made)
    probe.__dict__ = dict(made.__dict__)
    probe._modules = dict(made._modules) | {
        made.base_model_prefix: _Given(hidden, getattr(made, made.base_model_prefix)),
        name: small,
    }
    try:
        with torch.no_grad(), _quietly():
            logits = probe(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False).logits
            plain = small(hidden)
    except Exception as error:
        raise InputError(
            f"the head of {type(made).__name__} cannot be run by itself ({error}); it is not supported"
        ) from error
    scale = factor_between(logits, plain)
    if _near(plain * scale, logits) and (scale == 1.0 or head.bias is None):
        return None, scale
    cap = getattr(made.config, "final_logit_softcapping", None)
    if cap and _near(torch.tanh(plain / cap) * cap, logits):
        return float(cap), 1.0
    raise InputError(
        f"the logits of {type(made).__name__} are not the product of hidden states and head, scaled or soft-capped; it"
        " is not supported"
    )


class _Given(nn.Module):
    """Stands for a decoder's body, whose other attributes it has, and returns given hidden states."""

    def __init__(self, hidden: Tensor, body: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.__dict__["body"] = body
        self.__dict__["decoder"] = self  # OPT calls its body by this name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["body"], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Hidden((self.hidden,))


class _Hidden(tuple[Tensor]):
    """The output of a decoder's body, with nothing but the hidden states in it."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def _near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= SAME * float(other.abs().max())


def _choose_frequencies(made: nn.Module, seq: int) -> None:
    """Fix the rotary frequencies for sequences of `seq` tokens where transformers chooses them while it runs."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary: Any
    for rotary in made.modules():
        kinds = getattr(rotary, "rope_type", None)
        if isinstance(kinds, str):
            places: dict[str | None, str] = {None: kinds}
        elif isinstance(kinds, dict):
            places = dict(kinds)
        else:
            continue
        for layer_type, kind in places.items():
            prefix = f"{layer_type}_" if layer_type else ""
            if kind == "longrope":
                parameters = rotary.config.rope_parameters
                original = (parameters[layer_type] if layer_type else parameters)["original_max_position_embeddings"]
                told = {"layer_type": layer_type} if layer_type else {}
                long, _ = ROPE_INIT_FUNCTIONS[kind](rotary.config, torch.device("cpu"), seq_len=original + 1, **told)
                rotary.register_buffer(f"{prefix}{LONG}", long, persistent=False)
                if seq > original:
                    del rotary._buffers[f"{prefix}inv_freq"]
                    chosen = property(functools.partial(_read, f"{prefix}{LONG}"))
                    rotary.__class__ = type(type(rotary).__name__, (type(rotary),), {f"{prefix}inv_freq": chosen})
            # Of "dynamic" only the part up to max_position_embeddings is needed, where it changes nothing.
            places[layer_type] = "default" if kind == "longrope" or "dynamic" in kind else kind
        rotary.rope_type = places[None] if isinstance(kinds, str) else places


def _read(name: str, module: nn.Module) -> Any:
    return getattr(module, name)
