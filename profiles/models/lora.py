"""Which linear layers get a LoRA pair, and of what rank and scale: PEFT's settings, and what they choose in a model.

Names of layers are those that PEFT knows, such as ``model.layers.0.self_attn.q_proj``. Sources: Hu et al. 2021, "LoRA";
Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA"; Liu et al. 2024, "DoRA".
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.limits import processor_time
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import JsonError, read_json
from tightfit.runtime.engine.training.adapter import BODY, CONFIG

ALL_LINEAR, ATTENTION = "all-linear", "attention"
NEUTRAL: Mapping[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "use_qalora": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "ensure_weight_tying": False,
    "exclude_modules": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
"""Fields of PEFT's adapter_config.json that change what is computed, and the values at which they do not."""
STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of PEFT's `init_lora_weights` at which the base stays as it is, so that the adapter's tensors are all of
it.
"""
BASE_CHANGED = re.compile(r"pissa.*|olora|corda.*|loftq|lora_ga")
"""Values at which the first pairs are taken out of the base's weights, whose values then differ from those of its
files.
"""
READ = (
    *("peft_type", "r", "lora_alpha", "target_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "lora_dropout", "use_rslora", "use_dora", "modules_to_save", "init_lora_weights"),
    "target_parameters",
)
"""Fields that `from_peft` reads."""
OF_EXPERTS = ("gate_up_proj", "down_proj")
"""Parameters of a module with all experts of a layer that pairs are for, in the order in which PEFT nests them."""
MATCHING_SECONDS = 5.0
"""of the processor, for all matches of patterns with names of layers: nested repeats, such as ``(a+)+``, take for
ever
"""
WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
"""Fields that change nothing by themselves: names, `fan_in_fan_out`, which PEFT sets as the kind of layer needs it, and
the settings of what other fields turn on.
"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A layer's LoRA pair: y += scale * x @ A.T @ B.T, with A [rank, inputs] and B [outputs, rank]."""

    rank: int
    scale: float
    dropout: float = 0.0
    """Probability that an element of the pair's input is left out."""
    dora: bool = False


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """How an adapter is made. Raises InputError for values that cannot be used."""

    rank: int = 8
    alpha: float | None = None
    """Scale of a pair is alpha / its rank; None: twice `rank`."""
    targets: str = ALL_LINEAR
    """`ALL_LINEAR`, `ATTENTION` (linear layers inside attention), names separated by commas, or a regular expression
    that is to match a layer's whole name.
    """
    layers: tuple[int, ...] | None = None
    """Numbers of the layers of the model whose linear layers may get pairs; None: all."""
    layers_pattern: tuple[str, ...] = ()
    """What the list of layers that are numbered is called, as a regular expression; none: the first numbers in a name
    count.
    """
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of layers whose name ends with, or matches, a regular expression; the first that does counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    rslora: bool = False
    """Scale is alpha / sqrt(rank)."""
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    """Last names of modules that are trained in full: the embedding, the head."""
    experts: bool = False
    """Whether the experts of mixtures get pairs too, each for its two matrices."""

    def __post_init__(self) -> None:
        for name, rank in (
            (spelled("lora_rank"), self.rank),
            *((f"{spelled('rank_pattern')} {p}", r) for p, r in self.rank_pattern.items()),
        ):
            if rank < 1:
                raise InputError(f"{name} must be at least 1, not {rank}")
        alphas = [(spelled("lora_alpha"), self.scaled_alpha)]
        for name, alpha in (*alphas, *((f"{spelled('alpha_pattern')} {p}", a) for p, a in self.alpha_pattern.items())):
            if not 0 < alpha < math.inf:
                raise InputError(f"{name} {alpha}: give a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"{spelled('lora_dropout')} {self.dropout}: give a number from 0 to below 1")
        if not self.targets.strip():
            raise InputError(
                f"{spelled('lora_targets')} is empty: give {ALL_LINEAR}, {ATTENTION}, names of linear layers, or a"
                " pattern"
            )
        targets = [self.targets] if self.is_pattern else []
        for pattern in (*targets, *self.layers_pattern, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{pattern!r} is no regular expression: {error}; check its brackets") from error

    @property
    def scaled_alpha(self) -> float:
        """`alpha`, or its default."""
        return float(2 * self.rank if self.alpha is None else self.alpha)

    @property
    def is_pattern(self) -> bool:
        """Whether `targets` is a regular expression."""
        return re.search(r"[\\^$*+?()\[\]{}|]", self.targets) is not None

    @property
    def names(self) -> list[str]:
        """The names in `targets`, where it is a list of them."""
        if self.targets in (ALL_LINEAR, ATTENTION) or self.is_pattern:
            return []
        return [name.strip() for name in self.targets.split(",") if name.strip()]

    def pair(self, layer: str) -> Pair:
        """The pair of a chosen layer."""
        rank = int(_of_pattern(self.rank_pattern, layer, self.rank))
        alpha = float(_of_pattern(self.alpha_pattern, layer, self.scaled_alpha))
        scale = alpha / (math.sqrt(rank) if self.rslora else rank)
        return Pair(rank=rank, scale=scale, dropout=self.dropout, dora=self.dora)

    def chosen(self, layers: Sequence[str], model: str, others: Sequence[str] = ()) -> dict[str, Pair]:
        """The pairs of those of a model's linear `layers` that are chosen. Patterns of ranks and alphas may be for
        `others`.

        Raises InputError for a name, pattern or layer number that chooses nothing, and for a pattern that takes for
        ever.
        """
        with self._matching():
            return self._chosen(layers, model, others)

    def _matching(self) -> AbstractContextManager[None]:
        """Bounds the time of what is done inside, if it matches patterns."""
        patterns = [*([self.targets] if self.is_pattern else ()), *self.rank_pattern, *self.alpha_pattern]
        patterns += self.layers_pattern
        if not patterns:
            return nullcontext()
        message = (
            f"matching {' and '.join(map(repr, patterns))} with names of layers takes more than {MATCHING_SECONDS:g} s:"
            " write the pattern without repeats of repeats"
        )
        return processor_time(MATCHING_SECONDS, InputError(message))

    def _chosen(self, layers: Sequence[str], model: str, others: Sequence[str]) -> dict[str, Pair]:
        short = sorted({_last(name) for name in layers})
        for wanted in self.names:
            if not any(_called(name, wanted) for name in layers):
                raise InputError(
                    f"{spelled('lora_targets')} {wanted!r}: no linear layer in the layers of {model} is called"
                    f" so{_nearest(wanted, short)}; there are {', '.join(short)}"
                )
        numbers = sorted({number for name in layers if (number := self._number(name)) is not None})
        for number in self.layers or ():
            if number not in numbers:
                there = f"layers {numbers[0]} to {numbers[-1]}" if numbers else f"none in {self.layers_pattern}"
                raise InputError(f"{spelled('lora_layers')} {number}: {model} has {there}; give numbers among these")
        found = [name for name in layers if self._selects(name)]
        if not found:
            raise InputError(
                f"{spelled('lora_targets')} {self.targets!r} match no linear layer of {model}; a pattern has to match a"
                f" whole name such as {layers[0]}"
            )
        for option, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                if not any(_matches(pattern, name) for name in (*found, *others)):
                    raise InputError(
                        f"{spelled(option)} {pattern!r} matches none of the chosen layers of {model}; they are called"
                        f" {', '.join(sorted({_last(name) for name in found}))}"
                    )
        return {name: self.pair(name) for name in found}

    def chosen_experts(self, modules: Sequence[str], model: str) -> dict[str, Pair]:
        """The pairs of the experts in `modules`, each those of a layer, that are chosen.

        Raises InputError where experts are asked for and there are none, or what pairs of experts have no form of.
        """
        if not self.experts:
            return {}
        asked = spelled("lora_experts")
        if not modules:
            raise InputError(f"{asked}: {model} has no experts that pairs can be for; leave it out")
        for option, value in (("lora_dropout", self.dropout), ("dora", self.dora)):
            if value:
                raise InputError(
                    f"{asked}: pairs of experts have no {spelled(option)}, as in PEFT; leave one of them out"
                )
        with self._matching():
            return self._chosen_experts(modules)

    def _chosen_experts(self, modules: Sequence[str]) -> dict[str, Pair]:
        asked, found = spelled("lora_experts"), {}
        for name in modules:
            if self.layers is None or self._number(name) in self.layers:
                up, down = (self.pair(f"{name}.{parameter}") for parameter in OF_EXPERTS)
                if up != down:
                    raise InputError(
                        f"{asked}: the pairs of {name} have ranks {up.rank} and {down.rank} and scales {up.scale:g} and"
                        f" {down.scale:g}; give both matrices of experts the same in {spelled('rank_pattern')} and"
                        f" {spelled('alpha_pattern')}"
                    )
                found[name] = up
        return found

    def _number(self, name: str) -> int | None:
        return layer_number(name, self.layers_pattern)

    def _selects(self, name: str) -> bool:
        if self.layers is not None and self._number(name) not in self.layers:
            return False
        if self.targets == ALL_LINEAR:
            return True
        if self.targets == ATTENTION:
            return any("attn" in part or "attention" in part for part in name.lower().split(".")[:-1])
        if self.is_pattern:
            return re.fullmatch(self.targets, name) is not None
        return any(_called(name, wanted) for wanted in self.names)

    def as_json(
        self, layers: Sequence[str], chosen: Sequence[str], body: str = BODY, experts: Sequence[str] = ()
    ) -> dict[str, Any]:
        """What a profile says of the adapter: rank, alpha, and the fields of PEFT's adapter_config.json that are not at
        their defaults. `layers` are all names that could be chosen, `experts` the modules whose experts have pairs.
        """
        said: dict[str, Any] = {"rank": self.rank, "alpha": self.scaled_alpha}
        said |= _peft_targets(self, layers, chosen, body)
        optional = {
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "modules_to_save": list(self.modules_to_save),
            "target_parameters": [f"{name}.{parameter}" for name in experts for parameter in OF_EXPERTS],
        }
        return said | {name: value for name, value in optional.items() if value}


def _peft_targets(config: LoraConfig, layers: Sequence[str], chosen: Sequence[str], body: str) -> dict[str, Any]:
    """``target_modules`` (and ``layers_to_transform``), by which PEFT chooses the same layers."""
    if config.is_pattern and config.layers is None:
        return {"target_modules": config.targets}
    short = sorted({_last(name) for name in chosen})
    numbers = None if config.layers is None else sorted(config.layers)
    by_short = [name for name in layers if _last(name) in short and (numbers is None or layer_number(name) in numbers)]
    if sorted(by_short) != sorted(chosen) or any(
        name.isdigit() for name in short
    ):  # a number is a whole layer's name as well
        return {"target_modules": sorted(chosen)}
    if body == BODY:
        return {"target_modules": short} | ({} if numbers is None else {"layers_to_transform": numbers})
    if numbers is None:
        # Given bare names, PEFT would adapt the wrapper's vision tower as well.
        return {"target_modules": f"{re.escape(body)}.*\\.({'|'.join(short)})"}
    return {"target_modules": sorted(chosen)}


def layer_number(name: str, lists: Sequence[str] = ()) -> int | None:
    """The number of the layer that a name is in, as PEFT reads it, in one of `lists` of layers if they are named; None:
    in none.
    """
    patterns = [rf"(?:^|.*?\.)(?:{one})\.(?P<number>\d+)\." for one in lists] or [r".*?\.[^.]*\.(?P<number>\d+)\."]
    found = next(filter(None, (re.match(pattern, name) for pattern in patterns)), None)
    return int(found["number"]) if found else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _of_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if _matches(pattern, name)), otherwise)


def _nearest(wanted: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(wanted, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


# --- what people write ------------------------------------------------------------------------------------------------


def layer_numbers(text: str) -> tuple[int, ...]:
    """The numbers that "0-3,8" stands for. Raises InputError for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])) or len(part) > 16:
            raise InputError(
                f"{spelled('lora_layers')} {text!r}: give numbers and ranges from low to high, such as 0-3,8"
            )
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def from_peft(place: Path) -> LoraConfig:
    """The settings of the adapter in a folder, or of its adapter_config.json: what every command that takes an adapter
    reads.

    Raises InputError for a file that is missing or no such file, and for settings that tightfit does not have: an
    adapter whose tensors alone do not say what it adds to its base.
    """
    path = place / CONFIG if place.is_dir() else place
    try:
        said = read_json(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the folder of an adapter") from error
    except JsonError as error:
        raise InputError(f"{path}: no JSON ({error}); copy the adapter again") from error
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        kind = said.get("peft_type") if isinstance(said, dict) else None
        raise InputError(f"{path}: peft_type is {kind!r} and not 'LORA'; tightfit trains LoRA adapters")
    _refuse_unlike(path, said)
    _check_parameters(path, said.get("target_parameters"))
    try:
        return _settings(said)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: damaged, or no adapter_config.json of PEFT ({error}); copy the adapter again"
        ) from error


def _refuse_unlike(path: Path, said: Mapping[str, Any]) -> None:
    """Raise InputError for a setting of PEFT's that tightfit does not have, or does not know."""
    for name, value in said.items():
        if name in (*READ, *WITHOUT_EFFECT) or value in (NEUTRAL.get(name), None, False, [], {}):
            continue
        raise InputError(f"{path}: {name} is {value!r}, which tightfit does not have; train without it")
    start = said.get("init_lora_weights", True)
    named = start.lower() if isinstance(start, str) else start
    if named is None or named in STARTS:
        return
    if isinstance(named, str) and BASE_CHANGED.fullmatch(named):
        raise InputError(
            f"{path}: init_lora_weights is {start!r}, a start that changes the base's weights, and the adapter fits no"
            " other values. Have PEFT write it as an ordinary one: save_pretrained(...,"
            " path_initial_model_for_weight_conversion=...). Or save the changed base as a model of its own, name that"
            " as the base, and set init_lora_weights to true"
        )
    raise InputError(f"{path}: init_lora_weights is {start!r}, a start that tightfit does not have; train with another")


def _check_parameters(path: Path, targets: Any) -> None:
    """Raise InputError for `target_parameters` other than both matrices of experts."""
    names = targets if isinstance(targets, list) else [targets] if targets else []
    modules: dict[str, set[str]] = {}
    for name in map(str, names):
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, set()).add(parameter)
    for module, parameters in modules.items():
        if parameters != set(OF_EXPERTS):
            raise InputError(
                f"{path}: target_parameters has {', '.join(sorted(parameters))} of {module or 'a module'}, and tightfit"
                f" has pairs for {' and '.join(OF_EXPERTS)} of experts, both or none; train without them"
            )


def _settings(said: Mapping[str, Any]) -> LoraConfig:
    """The settings that the fields of an adapter_config.json stand for."""
    targets, layers = said.get("target_modules"), said.get("layers_to_transform")
    lists = said.get("layers_pattern") or ()
    return LoraConfig(
        rank=said.get("r", 8),
        alpha=float(said.get("lora_alpha", 8)),
        targets=targets if isinstance(targets, str) else ",".join(targets or ()),
        layers=None if layers in (None, []) else tuple([layers] if isinstance(layers, int) else layers),
        layers_pattern=(lists,) if isinstance(lists, str) else tuple(lists),
        rank_pattern=said.get("rank_pattern") or {},
        alpha_pattern=said.get("alpha_pattern") or {},
        dropout=said.get("lora_dropout", 0.0),
        rslora=bool(said.get("use_rslora")),
        dora=bool(said.get("use_dora")),
        modules_to_save=tuple(said.get("modules_to_save") or ()),
        experts=bool(said.get("target_parameters")),
    )


def check_planned(place: Path, planned: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Raise InputError unless the adapter in the folder `place` is one that tightfit has, whose pairs in `layers`, by
    PEFT's names, are what `planned`, a profile's `Model.lora`, says. A folder without adapter_config.json, as the
    rounds of a fleet hand it on, says nothing against it.
    """
    if not (place / CONFIG).exists():
        return
    theirs = from_peft(place)
    usual = {"target_modules": ALL_LINEAR, "r": planned["rank"], "lora_alpha": planned["alpha"]}
    ours = _settings({**usual, **planned})
    for layer in layers:
        one, other = theirs.pair(layer), ours.pair(layer)
        for what, value, wanted in (("scale", one.scale, other.scale), ("use_dora", one.dora, other.dora)):
            if not math.isclose(value, wanted, rel_tol=1e-6):
                raise InputError(
                    f"{place / CONFIG}: the {what} of the pair of {layer} is {value:g} and the plan's is {wanted:g};"
                    f" profile with {spelled('adapter', str(place))}, which takes its settings"
                )


OF_LORA = ("rank", "alpha", "targets", "layers", "dropout", "experts")
"""fields of `LoraConfig` whose options' names say that they are of LoRA"""


def given(place: str | Path | None, options: Mapping[str, Any]) -> LoraConfig:
    """The settings that a caller gives: those of the adapter at `place`, or `options` by the names of `LoraConfig`'s
    fields, of which None stands for the default.

    Raises InputError where both are given.
    """
    said = {
        name: value for name, value in options.items() if not (value is None or value is False or value in ((), {}))
    }
    if place is None:
        return LoraConfig(**said)
    if said:
        named = [spelled(f"lora_{name}" if name in OF_LORA else name) for name in said]
        raise InputError(
            f"{spelled('adapter')} {place}: its settings count, and {', '.join(named)} cannot be given as well; leave"
            " one of them out"
        )
    return from_peft(Path(place))
