"""What all steps that can be profiled have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.schema import Model, Tensor, TracedStep, adamw
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.engine.weights.layout import Entry, find_extent

if TYPE_CHECKING:  # these import PyTorch
    from tightfit.profiles.tracing.comparison import GradientComparison
    from tightfit.profiles.tracing.traced import Trace

DTYPES = ("bfloat16", "float32")
LORA = (
    "lora_rank", "lora_alpha", "lora_targets", "lora_layers", "lora_experts", "rank_pattern", "alpha_pattern",
    "lora_dropout", "rslora", "dora", "adapter",
)  # fmt: skip
"""options of an adapter's pairs"""


class ProfiledStep(ABC):
    """A training step of a source, with the options of profiling. Raises InputError for options that it does not
    take.
    """

    kind: Literal["decoder", "module", "graph"]
    """`Model.kind` in its profiles"""
    default_dtype: ClassVar[str] = "bfloat16"
    phrase: ClassVar[str]
    """what a message calls it; ``{name}`` stands for the source's"""
    worth_a_process: ClassVar[bool] = True
    """whether it is traced in a process of its own where PyTorch is not loaded yet"""
    refused: ClassVar[Mapping[tuple[str, ...], str]] = {}
    """options that it does not take -> why, as the end of a sentence that begins with `phrase`"""

    def __init__(self, source: Source, options: ProfileOptions) -> None:
        self.source, self.options = source, options
        for names, why in self.refused.items():
            for name in names:
                value = getattr(options, name)
                if value != ProfileOptions.model_fields[name].default and value not in ((), {}):
                    text = ", ".join(value) if isinstance(value, list | tuple) else value
                    raise InputError(f"{spelled(name)} {text}: {self.phrase.format(name=source.name)}{why}")
        if options.ignore_state and self.kind != "module":
            raise InputError(
                f"{spelled('ignore_state')} {', '.join(options.ignore_state)}: {self.phrase.format(name=source.name)},"
                " whose step is traced from its configuration and changes nothing in Python; leave the option out"
            )
        self.dtype = options.dtype or self.default_dtype
        self.batch: Any = options.batch
        """samples of the step, once it is traced"""
        self.seq: Any = options.seq
        """tokens of each; None where it has no tokens"""

    def traced(self, report: Progress) -> TracedStep:
        """The step as a profile has it, before anything is measured."""
        traced, source = self.trace(report), self.source
        return TracedStep(
            model=Model(
                name=source.name,
                source=source.path,
                kind=self.kind,
                **self.model_fields(),
                base=source.base,
                embeddings=source.embeddings,
                rounding=source.note or None,
            ),
            batch=self.batch,
            seq=self.seq,
            compute_dtype=self.dtype,
            optimizer=adamw(self.options.accumulate),
            tensors=[_packed(tensor, source.entries) for tensor in traced.tensors],
            programs=traced.programs,
            layers=traced.layers,
            loss=traced.loss,
            token_losses=traced.token_losses,
        )

    @abstractmethod
    def trace(self, report: Progress) -> Trace: ...

    @abstractmethod
    def settings(self, report: Progress) -> list[Any]:
        """What a traced step depends on beside its source and the code that traces it."""

    def comparison(self) -> GradientComparison | None:
        """What compares the traced step with the module as PyTorch trains it."""
        return None

    def model_fields(self) -> dict[str, Any]:
        """Fields of the profile's `Model` that the traced step decides."""
        return {"config": self.source.config}


def of_source(step: TracedStep, source: Source, accumulate: int) -> TracedStep:
    """A step that was traced from a description of the source's model, as if it had been traced of the source
    itself.
    """
    added = {name: value for name, value in step.model.config.items() if name not in source.config}
    fields = {
        "name": source.name,
        "source": source.path,
        "config": source.config | added,
        "base": source.base,
        "embeddings": source.embeddings,
        "rounding": source.note or None,
    }
    return step.model_copy(
        update={
            "model": step.model.model_copy(update=fields),
            "optimizer": adamw(accumulate),
            "tensors": [_packed(tensor, source.entries) for tensor in step.tensors],
        }
    )


def _packed(tensor: Tensor, entries: Mapping[str, Entry]) -> Tensor:
    if tensor.kind != "weight":
        return tensor
    extent = find_extent(entries, tensor.name)
    return tensor.model_copy(update={"packed_bytes": extent.bytes, "packed_format": extent.entry.format})
