"""Watches the memory that PyTorch's operators take for what they make."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestStorage(TorchDispatchMode):
    """While it is entered: the largest storage that operators make beside those of `known`, in bytes and in
    elements.
    """

    def __init__(self, known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.bytes = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                size = x.untyped_storage().nbytes()
                self.bytes = max(self.bytes, size)
                self.elements = max(self.elements, size // x.element_size())
        return made
