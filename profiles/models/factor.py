"""The factors of LoRA pairs."""

import torch
from torch import Tensor, nn


class Factor(nn.Module):
    """One LoRA factor, float32."""

    weight: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float32))


class FactorPair(nn.Module):
    """Both of a pair, as a module of their own."""

    def __init__(self, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lora_A, self.lora_B = Factor(rank, inputs), Factor(outputs, rank)
