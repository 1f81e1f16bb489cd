"""Descriptions of devices other than this machine: the figures that the roofline estimate needs, each with its source.

The known devices are the JSON files in ``profiles/devices``; users can pass a file of their own in the same form. A
profile made for such a device says that it is estimated (`DeviceFigures.measured` is False), and so does every plan
made from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from tightfit.profiles.schema import Channel, DeviceFigures, Floor, FrozenRecord
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import JsonError, read_json

FOLDER = Path(__file__).parent
FIGURES = ("memory_bytes", "flops_per_second", "bytes_per_second", "call_seconds", "floor", "read", "write")
"""Fields for which `sources` must say where the figure comes from."""
KINDS_OF_SOURCE = ("measured: ", "data sheet: ", "derived: ", "assumed: ")


class DeviceDescription(FrozenRecord):
    """One device, with its figures and where they come from.

    On a CPU or other unified memory the budget covers all processes of a run, and `read` and `write` describe the disk.
    On a CUDA card the budget covers device memory, the floor is the CUDA context, and `read` and `write` describe the
    bus to host memory.
    """

    version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="what --device takes")
    label: str = Field(description="in words")
    kind: Literal["cpu", "cuda"]
    threads: int = Field(ge=1, description="compute threads that the figures are for; 1 on a card")
    memory_bytes: int = Field(gt=0, description="all the memory it has, for orientation")
    flops_per_second: dict[str, float] = Field(
        description="torch dtype -> rate that large matrix products reach; types left out run at the rate of float32"
    )
    bytes_per_second: float = Field(
        gt=0, description="bytes read and written by a plain pass over tensors of a layer's size"
    )
    call_seconds: float = Field(ge=0, description="least time of an operator")
    floor: Floor
    read: Channel
    write: Channel
    shared_disk: bool = Field(True, description="reads and writes share the bandwidth")
    sources: dict[str, str] = Field(
        description=(
            f"figure -> where it comes from, opening with one of {', '.join(k.strip() for k in KINDS_OF_SOURCE)}"
        )
    )

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if min(self.flops_per_second.values(), default=0.0) <= 0 or "float32" not in self.flops_per_second:
            raise ValueError("flops_per_second needs float32, and every rate above 0")
        unsaid = [name for name in FIGURES if not self.sources.get(name, "").startswith(KINDS_OF_SOURCE)]
        if unsaid:
            raise ValueError(f"sources does not say where {', '.join(unsaid)} come from")
        return self

    @property
    def narrow(self) -> bool:
        """Whether the device multiplies bfloat16 faster than float32; if not, bfloat16 products are computed in
        float32.
        """
        return self.flops_per_second.get("bfloat16", 0.0) > self.flops_per_second["float32"]

    def device(self) -> DeviceFigures:
        """The `DeviceFigures` record that a profile for this device contains, with `measured` False."""
        return DeviceFigures(
            name=self.name,
            kind=self.kind,
            threads=self.threads,
            measured=False,
            floor=self.floor,
            read=self.read,
            write=self.write,
            shared_disk=self.shared_disk,
        )


ACCELERATORS = ("cuda", "gpu", "hip", "rocm", "mps", "xpu", "tpu")
"""what PyTorch and its users call devices other than the processor"""


def known_devices() -> list[DeviceDescription]:
    """Every device that comes with the package, sorted by name."""
    return [_load(path) for path in sorted(FOLDER.glob("*.json"))]


def find_device(name: str) -> DeviceDescription:
    """The device called `name`, or described in the JSON file `name`.

    Raises InputError for any other name, listing the known ones, and for a file that is not a valid description, naming
    the field at fault.
    """
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    if name in names:
        return _load(FOLDER / f"{name}.json")
    if name.endswith(".json"):
        return _load(Path(name))
    kind = name.partition(":")[0].lower()
    if kind in ACCELERATORS:
        raise InputError(
            f"nothing runs on {name!r} yet: tightfit trains on this machine's cores (cpu); for a GPU it only plans,"
            f" with estimated times: choose one of {', '.join(names)}, or a JSON file that describes a device"
        )
    raise InputError(
        f"no device is called {name!r}; choose cpu (this machine, measured), one of {', '.join(names)} (estimated), or"
        " a JSON file that describes a device"
    )


def _load(path: Path) -> DeviceDescription:
    try:
        return DeviceDescription.model_validate(read_json(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a file that describes a device, or a known device") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {f'field {field}: ' if field else ''}{first['msg']}; correct it") from error
    except JsonError as error:
        raise InputError(f"{path}: not JSON ({error}); write it like those in {FOLDER}") from error
