"""What PyTorch users write beside plain layers: it trains as in PyTorch, or is refused with what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from beside_pytorch import beside, compared
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

from tightfit.profiles.sources.factory import build_module, factory_source
from tightfit.runtime.common.errors import InputError


class Spectrogram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(128, 128)
        self.register_buffer("window", torch.hann_window(32))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(self.a(x), 32, 8, window=self.window, return_complex=True)
        return spectrum.abs().square().mean() + (spectrum * spectrum.conj()).imag.mean()


class FourierLayer(nn.Module):
    """The layer of a Fourier neural operator (Li et al. 2021), as it is written everywhere but for its parameters."""

    def __init__(self, channels: int = 4, modes: int = 3) -> None:
        super().__init__()
        self.modes = modes
        self.weights = nn.Parameter(0.1 * torch.randn(2, channels, channels, modes, modes, 2))
        self.skip = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum, modes, weights = torch.fft.rfft2(x), self.modes, torch.view_as_complex(self.weights)
        out = torch.zeros(*spectrum.shape, dtype=torch.cfloat)
        for number, rows in enumerate((slice(None, modes), slice(-modes, None))):
            out[:, :, rows, :modes] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, rows, :modes], weights[number])
        return torch.fft.irfft2(out, s=x.shape[-2:]) + self.skip(x)


class Operator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FourierLayer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.gelu(layer(x))
        return x.square().mean()


class OfOneElement(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).mean(0)


CASES = {
    "spectrogram": (Spectrogram, (4, 128)),
    "Fourier neural operator": (Operator, (2, 4, 12, 12)),
    "a loss of shape [1]": (OfOneElement, (4, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_in_pytorch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, shape = CASES[name]
    assert compared(kind(), (torch.randn(shape),), tmp_path).startswith("loss and gradients are PyTorch's in 3 steps")


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        _, hidden = self.recurrent(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return self.head(hidden[0]).square().mean()


class Padded(Packed):
    """What the message says."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.recurrent(x)
        return self.head(output.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, 8))[:, 0]).square().mean()


class Spoken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 6)

    def forward(self, x: Tensor, labels: Tensor, lengths: Tensor, label_lengths: Tensor) -> Tensor:
        scores = self.a(x).log_softmax(-1).transpose(0, 1)
        return functional.ctc_loss(scores, labels, lengths, label_lengths)


def texts() -> tuple[Tensor, ...]:
    return torch.randn(3, 6, 8), torch.tensor([6, 4, 3])


@pytest.mark.parametrize(
    ("module", "batch", "told"),
    [
        (Packed, texts(), r"give the recurrent layer the whole padded sequences"),
        (
            Spoken,
            (torch.randn(2, 12, 8), torch.randint(1, 6, (2, 4)), torch.tensor([12, 10]), torch.tensor([4, 3])),
            r"write its recursion over time in tensor operations",
        ),
    ],
)
def test_it_is_refused_with_what_to_write_instead(
    module: Callable[[], nn.Module], batch: tuple[Tensor, ...], told: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"test_common_modules\.py:\d+.*{told}"):
        beside(module(), batch, tmp_path)


def test_a_padded_sequence_in_place_of_a_packed_one_is_the_same(tmp_path: Path) -> None:
    packed, padded = Packed(), Padded()
    padded.load_state_dict(packed.state_dict())
    batch = texts()
    torch.testing.assert_close(packed(*batch), padded(*batch))
    assert compared(padded, batch, tmp_path).startswith("loss and gradients are PyTorch's")


COMPILED = """
import torch
from torch import nn

@torch.compile
def squashed(x):
    return torch.tanh(x) * x

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.compile(nn.Linear(8, 8)), nn.Linear(8, 3)
        self.b.compile()

    def forward(self, x):
        return self.b(squashed(self.a(x)))

def whole():
    return torch.compile(Net()), (torch.randn(4, 8), torch.randint(0, 3, (4,))), nn.CrossEntropyLoss()
"""


def test_what_torch_compile_made_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compiled_net.py").write_text(COMPILED)
    monkeypatch.chdir(tmp_path)
    module, batch, _ = build_module("compiled_net:whole")
    assert list(module.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert compared(module, batch, tmp_path).startswith("loss and gradients are PyTorch's in 3 steps")


def test_complex_parameters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "complex_net.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.w = nn.Parameter(torch.randn(4, dtype=torch.cfloat))\n\n"
        "    def forward(self, x):\n        return (self.w * x).abs().mean()\n\n"
        "def net():\n    return Net(), (torch.randn(4),)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"'w' has type torch\.complex64, .* hold it as real and imaginary part"):
        factory_source("complex_net:net")
