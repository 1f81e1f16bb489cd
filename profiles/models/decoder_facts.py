"""What there is to know of a decoder that transformers builds without building it: names, shapes and roles of its
tensors, and what its checkpoint calls them. Imports neither transformers nor PyTorch: a device has it from where the
decoder was built.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tightfit.profiles.schema import FrozenRecord

if TYPE_CHECKING:
    from torch import Tensor


class BufferValue(FrozenRecord):
    """The value of a buffer, to the bit."""

    dtype: str = Field(pattern="^[a-z]+[0-9]*$")
    content: str
    """its bytes, row by row, in base64"""

    @property
    def floating(self) -> bool:
        return self.dtype.startswith(("float", "bfloat"))

    def matrix(self, rows: int) -> Tensor:
        """The value with so many rows. Raises ValueError, or what PyTorch raises, where it does not have them."""
        import torch

        content = bytearray(base64.b64decode(self.content, validate=True))
        kind = getattr(torch, self.dtype)
        return (torch.frombuffer(content, dtype=kind) if content else torch.empty(0, dtype=kind)).reshape(rows, -1)


def buffer_value(tensor: Tensor) -> BufferValue:
    import torch

    plain = tensor.detach().contiguous().reshape(-1)
    content = bytes(plain.view(torch.uint8).tolist())
    return BufferValue(dtype=str(tensor.dtype).removeprefix("torch."), content=base64.b64encode(content).decode())


class FrozenTensor(FrozenRecord):
    """A frozen tensor of the decoder, as it is packed."""

    name: str
    """Our name."""
    key: str
    """Name in transformers' state_dict."""
    shape: tuple[int, ...]
    role: Literal["matrix", "embedding", "other"]
    """matrix (of a linear layer), embedding (rows by token), or other."""
    transposed: bool = False
    """Whether the checkpoint has rows and columns the other way round."""
    experts: int = 0
    """Experts of a mixture whose matrices stand below one another in it; 0: it is none of these."""
    in_turn: bool = False
    """Whether the gate of each number stands beside its up where the tensor comes from; here gates stand before ups."""
    parts: tuple[str, ...] = ()
    """Names in transformers' state_dict, with * for the number of an expert, of tensors whose rows, expert by expert,
    checkpoints may hold in its place.
    """
    mean: float = 0.0
    """What random values vary around."""
    value: BufferValue | None = None
    """A buffer's value; checkpoints hold another if it is `persistent`."""
    persistent: bool = True


class DecoderFacts(FrozenRecord):
    """What a decoder consists of."""

    tensors: tuple[FrozenTensor, ...]
    config: dict[str, Any]
    """Fields for a source's config, under the names that tightfit reads: vocab_size, max_position_embeddings,
    hidden_size, num_hidden_layers, adapter_body."""
    prefix: str
    """transformers' name of the body."""
    embedding: str
    """Our name of the embedding's weight."""
    head: str
    """That of the head's, which is the embedding's own where they are tied and then not among `tensors`."""
    renamed: dict[str, str] = {}
    """From a name in the checkpoint, of whatever version, to that in transformers' state_dict, where they differ."""
    unexpected: tuple[str, ...]
    """Regular expressions for tensors that checkpoints hold and the model does not use."""

    def rename(self, name: str) -> str:
        return self.renamed.get(name, name)
