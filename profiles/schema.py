"""The profile's data model: everything that is known about one training step before anything is decided.

A model is a list of `Layer`s in forward order. Equal layers share one `Program`: the forward and backward of the layer
as a flat list of operators over *storages*. Views do not exist here: an operand names a storage and, where it is not
the storage's own contiguous shape, the strided window it reads (`Operand`), so that the planner sees bytes and
lifetimes only.

Forward runs the layers in order; backward runs them in reverse. Where no backward follows, a layer with operators of
phase `inference` runs those instead of its forward: they give the same results to the bit, without the tensors that
only a backward reads, and in a module of the user's own what it computes in eval mode. A layer's local values become
global tensors through its `bindings`; a value without a binding is private to its layer and is called
``layer_name/value_name``.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from tightfit.profiles.options import MOST_ACCUMULATED
from tightfit.runtime.engine.kernels.optimizer import FACTORED

PROFILE_VERSION = 13
"""Raised with every change of the file's form, and of what operators compute or how they are measured. A run that was
started under another version is not resumed."""

MODULE_OPERATORS = 2
"""Raised, in place of the above, with every change of what operators compute that only modules have."""

EXCHANGE = "exchange"
"""the optimizer's name in a member's plan of a fleet: an update hands the gradient over, and the fleet makes the update
after its last micro-batch, so that no state is part of the plan"""
MOBILLM = "mobillm"
"""the optimizer's name in the plan of a device that trains nothing: a server trains a side network from what its
forward sends
"""
OPTIMIZER_STATES: dict[str, tuple[str, ...]] = {
    "adamw": ("adam_m", "adam_v"),
    "adam": ("adam_m", "adam_v"),
    "sgd": (),
    "momentum": ("momentum",),
    "lion": ("lion_m",),
    "adafactor": (FACTORED,),
}
"""optimizer -> what its float32 states of a trainable are called; `state_shape` says how large each is"""
POSITIONS = "positions"
"""name of a decoder's input that says which samples share a row: the position of each token in its sample; profiles of
models whose samples cannot share rows have none
"""
PREFERENCE = "preference"
"""key in a model's config of what its loss is where it learns from pairs of answers (`Preference`)"""
ANSWERS = "answers"
"""name of a decoder's last input where it learns from pairs, float64 [1 or 2, rows, seq]: the number of the answer at
each place, and with DPO that answer's log-probability in the reference model
"""
ANSWER_PLANES = {"dpo": 2, "orpo": 1}
"""loss of pairs -> numbers that this input has of a place"""
NOT_COMPARED = "not compared with autograd"
"""How `Model.compared` begins if the gradients were not compared."""


def adamw(accumulate: int = 1) -> dict[str, Any]:
    """The `optimizer` field of a profile for AdamW: two states per trainable (its moments), and with `accumulate` > 1
    steps per update a third, the sum of gradients so far.
    """
    moments = {"name": "adamw", "state_tensors": 2}
    return moments if accumulate == 1 else {**moments, "state_tensors": 3, "accumulate": accumulate}


def _checked_optimizer(optimizer: dict[str, Any]) -> dict[str, Any]:
    steps = optimizer.get("accumulate", 1)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_ACCUMULATED:
        raise ValueError(f"accumulate is {steps!r}; it is a whole number of steps from 1 to {MOST_ACCUMULATED}")
    limit = optimizer.get("max_grad_norm")
    if limit is not None and not (type(limit) in {int, float} and 0 < limit < math.inf):
        raise ValueError(f"max_grad_norm is {limit!r}; it is a finite number above 0")
    keeps_sum = steps > 1 or limit is not None
    names = OPTIMIZER_STATES.get(optimizer.get("name", "adamw"), OPTIMIZER_STATES["adamw"])
    states, expected = optimizer.get("state_tensors", 2), len(names) + keeps_sum
    if (
        isinstance(states, bool)
        or not isinstance(states, int)
        or not 0 <= states <= expected
        or (keeps_sum and states < expected and optimizer.get("name") not in {EXCHANGE, MOBILLM})
    ):
        clipped = "" if limit is None else f" and max_grad_norm {limit}"
        raise ValueError(f"state_tensors is {states!r}; with accumulate {steps}{clipped} it is {expected}")
    return optimizer


Optimizer = Annotated[dict[str, Any], AfterValidator(_checked_optimizer)]
"""Keys: `name`; `state_tensors`, the number of float32 states per trainable; `accumulate`, steps per update (default
1); in a plan that clips gradients, `max_grad_norm`, the norm to which all of them together are scaled down."""


T = TypeVar("T")
Many = Annotated[list[T], FailFast()]
"""A list that may be long: validation stops at its first fault, so that a wrong list does not fill memory with
errors."""


class FrozenRecord(BaseModel):
    """Base of all parts of a profile: immutable, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


TensorKind = Literal[
    "weight",  # frozen, lies packed in the weight store
    "constant",  # small and no parameter that is trained (norm weights, biases, running statistics): always resident
    "trainable",  # float32 parameter with a gradient and optimizer state
    "batch",  # input of the step: tokens, labels, images
    "activation",  # made by a forward operator
    "gradient",  # made by a backward operator
]


class Tensor(FrozenRecord):
    """A tensor that more than one layer uses, or that outlives the step."""

    name: str
    kind: TensorKind
    shape: list[int]
    dtype: str = Field(description="torch dtype without the prefix: bfloat16, float32, int64, ...")
    bytes: int = Field(ge=0, description="bytes when resident and unpacked")
    packed_bytes: int = Field(0, ge=0, description="weights: bytes of the packed form on disk and in memory")
    packed_format: str = Field(
        "",
        description="weights: format of the packed form (`tightfit.runtime.engine.weights.layout`); empty: not stated",
    )
    unpack_seconds: float = Field(0.0, ge=0, description="weights: seconds to unpack, compute cores busy")
    update_seconds: float = Field(
        0.0,
        ge=0,
        description="trainables: seconds of one optimizer update; of several steps that make one, the mean over them",
    )
    perturb_seconds: float = Field(
        0.0, ge=0, description="trainables: seconds to draw noise of its shape and add it; 0: not measured"
    )
    accumulate_seconds: float = Field(
        0.0,
        ge=0,
        description=(
            "trainables whose gradients are clipped: seconds to add one to the update's sum, and in the last of several"
            " steps to square the sum, the mean over the steps; 0: not measured"
        ),
    )
    clipped_seconds: float = Field(
        0.0, ge=0, description="trainables: seconds of one update from a sum that is scaled down; 0: not measured"
    )
    adafactor_seconds: float = Field(
        0.0,
        ge=0,
        description="trainables: seconds of one update by Adafactor, which depend on the shape; 0: not measured",
    )
    movable: bool = Field(
        False, description="trainables: whether the plan may keep its values on disk while no operator reads them"
    )


class Operand(FrozenRecord):
    """A tensor argument: a storage, read through a strided window.

    `size`, `stride` and `offset` count elements, not bytes.
    """

    value: str
    size: list[int]
    stride: list[int]
    offset: int = 0


class Value(FrozenRecord):
    """A storage inside a program."""

    name: str
    shape: list[int]
    stride: list[int]
    dtype: str
    bytes: int = Field(ge=0)
    kind: TensorKind


class Operator(FrozenRecord):
    """One call of an operator.

    `args` and `kwargs` are JSON; what JSON lacks is written as an object of one key: ``{"operand": {...}}``,
    ``{"dtype": "float32"}``, ``{"device": "cpu"}``, ``{"layout": "strided"}``, ``{"memory_format":
    "contiguous_format"}``, ``{"float": "-inf"}``. A list may hold any of these.
    """

    target: str = Field(description="aten.mm.default, tightfit.rms_norm, ...")
    phase: Literal["forward", "inference", "backward"]
    args: list[Any]
    kwargs: dict[str, Any] = {}
    inputs: list[str] = Field(description="storages read, each once, in order of first use")
    outputs: list[str | None] = Field(description="storages made, by position; None where the result is unused")
    seconds: float = Field(0.0, ge=0)
    workspace_bytes: int = Field(0, ge=0, description="transient heap bytes beyond inputs and outputs")
    recomputable: bool = Field(True, description="False for random operators: their outputs are kept or offloaded")
    copied: bool = Field(
        False,
        description=(
            "run by its functional form, whose result is copied into its place: its out variant writes beside its"
            " output, or something else"
        ),
    )
    gathers: list[str] = Field([], description="inputs of which only rows are read from disk, inside the operator")
    flops: float = Field(0.0, ge=0)


class Program(FrozenRecord):
    name: str
    values: Many[Value]
    operators: Many[Operator] = Field(
        description="forward operators first, then those for inference, then backward, each in execution order"
    )
    tiles: int = Field(
        1,
        ge=1,
        description=(
            "equal runs with which the forward operators begin, one for each part of the batch: a plan decides for all"
            " alike"
        ),
    )
    tile_operators: int = Field(0, ge=0, description="forward operators of one of them, where there are several")

    @model_serializer(mode="wrap")
    def _without_tiles(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A program in one piece is written as before there were tiles, so that checksums of older files still hold."""
        fields: dict[str, Any] = serialize(self)
        if self.tiles == 1:
            del fields["tiles"], fields["tile_operators"]
        return fields

    @property
    def inference(self) -> list[int]:
        """Positions of the operators that run if no backward follows: those of phase inference, or if there are none
        the forward's.
        """
        phase = "inference" if any(operator.phase == "inference" for operator in self.operators) else "forward"
        return [position for position, operator in enumerate(self.operators) if operator.phase == phase]


class Layer(FrozenRecord):
    name: str
    program: str
    bindings: dict[str, str] = Field(description="program value name -> global tensor name")


class Channel(FrozenRecord):
    """One direction between memory and disk, measured with transfers like the runtime's while operators compute."""

    bytes_per_second: float = Field(gt=0)
    latency_seconds: float = Field(ge=0)
    compute_seconds_per_byte: float = Field(
        0.0, ge=0, description="compute time lost per byte while both run (measured)"
    )
    compute_seconds_per_transfer: float = Field(
        0.0, ge=0, description="compute time lost per transfer, beside its bytes"
    )
    doubt: str | None = Field(
        None,
        description="in files of older versions: why the bandwidth is not the measured one, in words; None: it is",
    )


class Floor(FrozenRecord):
    """Memory that a run takes before any model is loaded: its training process, and the supervisor that starts it and
    shows progress.
    """

    import_peak_bytes: int = Field(description="VmHWM of the training process after its imports")
    resident_bytes: int = Field(
        description="resident set of the training process once kernels are warm and clean file pages are released"
    )
    supervisor_bytes: int = Field(
        0, description="VmHWM of the process that starts the training process, shows its progress and reports"
    )
    instruction_bytes: int = Field(description="resident bytes per schedule instruction in the runtime")
    inference_resident_bytes: int | None = Field(
        None, description="`resident_bytes` of a process that runs no backward; None: not measured"
    )
    exchange_bytes: int | None = Field(
        None, description="resident bytes that talking to a fleet's other members adds; None: not measured"
    )
    tables_on_disk: bool = Field(
        False, description="whether what PyTorch's start leaves lies in a file of the cache while the process runs"
    )
    cuda_stubs: bool = Field(
        False, description="whether stubs are loaded in the place of the CUDA libraries of a PyTorch built for CUDA"
    )

    @property
    def transport_bytes(self) -> int:
        """`exchange_bytes`, or 4 MiB where it was not measured: what gloo took, through which members talked before."""
        return (4 << 20) if self.exchange_bytes is None else self.exchange_bytes

    @property
    def start_peak_bytes(self) -> int:
        """Peak bytes of a run before any model is loaded; no budget below it is feasible."""
        return self.import_peak_bytes + self.supervisor_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that a run holds in addition to its arena from the first step on."""
        return self.resident_bytes + self.supervisor_bytes

    @property
    def inference(self) -> Floor:
        """The floor of a process that runs no backward."""
        return self.model_copy(update={"resident_bytes": self.inference_resident_bytes or self.resident_bytes})


class DeviceFigures(FrozenRecord):
    name: str
    kind: Literal["cpu", "cuda"]
    threads: int
    measured: bool = Field(True, description="False: times are estimated from FLOPs and bytes")
    busy_cores: float = Field(
        0.0,
        ge=0,
        description="cores that other programs took from this while it was measured, which makes its times longer",
    )
    quota_cores: float | None = Field(
        None, gt=0, description="cores that a CPU quota left this process, which makes its times longer; None: no quota"
    )
    floor: Floor
    read: Channel
    write: Channel
    shared_disk: bool = Field(True, description="reads and writes share the bandwidth")
    torch_version: str | None = Field(None, description="the torch that was measured; the runtime refuses another")


class Preference(FrozenRecord):
    """The loss of a step whose samples are pairs of answers, one of them chosen, the other rejected. A batch has two
    rows for each pair without packing (`tightfit.runtime.engine.cpu.preference`).
    """

    loss: Literal["dpo", "orpo"]
    beta: float = Field(gt=0, allow_inf_nan=False, description="how much the comparison of the two weighs")


class Model(FrozenRecord):
    name: str
    source: str = Field(description="what the user named: a directory, GGUF file, config.json or module:factory")
    kind: Literal["decoder", "module", "graph"] = Field(
        description="graph: bare operators from elsewhere (`tightfit.profiles.graph_input`), to plan and not to run"
    )
    config: dict[str, Any] = Field({}, description="what is needed to build the model again")
    lora: dict[str, Any] | None = None
    tables: dict[str, str] = Field(
        {},
        description="modules trained in full beside the LoRA pairs, and the tensors in the store that they start from",
    )
    store: str | None = Field(
        None, description="path of the packed weight store; None: random weights, made at run time"
    )
    store_fingerprint: str | None = None
    rows_apart: str | None = Field(
        None, description="decoders: in words, why samples cannot share a row of a batch; None: they can"
    )
    compared: str | None = Field(
        None,
        description=(
            "modules: in words, how loss and gradients of the programs on the sample batch came out beside autograd's,"
            " or why they were not compared"
        ),
    )
    ignored_state: list[str] = Field(
        default_factory=list,
        description="modules: names of what the forward changes in Python and was let through; a step leaves it out",
    )
    other_evaluation: str | None = Field(
        None,
        description="modules: why an evaluation is not what the module computes in eval mode, and refused; None: it is",
    )
    base: str | None = Field(None, description="precision asked for matrices: 4bit, 8bit or 16bit; None: the default")
    embeddings: str | None = Field(None, description="the same for the embedding and the head; None: as `base`")
    rounding: str | None = Field(None, description="in words: what packing did to the values of the frozen weights")

    @model_validator(mode="after")
    def _knows_its_loss(self) -> Model:
        if self.config.get(PREFERENCE) is not None:
            Preference.model_validate(self.config[PREFERENCE])
        return self

    @property
    def is_bare_graph(self) -> bool:
        """Whether operators say how long they take and not what they compute: it is planned and not run."""
        return self.kind == "graph"

    @property
    def preference(self) -> Preference | None:
        """The loss where samples are pairs of answers; None: the mean over the labelled tokens, or a module's own."""
        preference = self.config.get(PREFERENCE) if self.kind == "decoder" else None
        return None if preference is None else Preference.model_validate(preference)

    @property
    def rows_of_sample(self) -> int:
        """Rows of a batch that a sample takes."""
        return 1 if self.preference is None else 2


class TracedStep(FrozenRecord):
    """A training step of a model before anything of it is measured: times and workspace are 0. It needs no weights and
    is the same on every machine.
    """

    model: Model
    batch: int
    seq: int | None = None
    compute_dtype: str
    optimizer: Optimizer = Field(default_factory=adamw)
    tensors: Many[Tensor]
    programs: Many[Program]
    layers: Many[Layer]
    loss: str = Field(description="global tensor name of the scalar loss")
    token_losses: str | None = Field(
        None, description="decoders: float32 [tokens] negative log-likelihoods, 0 where unlabelled"
    )

    @property
    def accumulate(self) -> int:
        """Steps whose gradients make one update."""
        return int(self.optimizer.get("accumulate", 1))

    @property
    def max_grad_norm(self) -> float | None:
        """The norm to which all gradients of an update together are scaled down; None: they are not clipped."""
        return self.optimizer.get("max_grad_norm")


class Profile(TracedStep):
    """A step with its figures on a device, measured or estimated."""

    version: int = PROFILE_VERSION
    fingerprint: str = Field(description="sha256 of model, shapes, programs, torch version and device")
    device: DeviceFigures
