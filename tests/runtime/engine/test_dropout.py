"""Dropout's masks against SplitMix64 in plain integers, and its operators against float64 and PyTorch autograd; all of
it in compiled C and in PyTorch alone.
"""

import math
import shutil
import subprocess

import pytest
import torch
from largest_storage import LargestStorage
from reference import relative_error

from tightfit.profiles.models.lora import Pair
from tightfit.profiles.models.projection import dropped
from tightfit.profiles.tracing.dropout_ops import dropout_lora_linear
from tightfit.profiles.tracing.torch_ops import frozen_linear
from tightfit.runtime.engine.cpu import dropout as kernels
from tightfit.runtime.engine.cpu import native_dropout
from tightfit.runtime.engine.cpu.operators import lora_down
from tightfit.runtime.engine.device.draws import Draws
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.start.process import child_environment
from tightfit.runtime.engine.weights import native

P, SITE, SCALE = 0.3, 5, 2.0
SHAPES = [(5, 7), (96, 64), (90, 1030)]
"""tokens and columns: fewer than a word's elements are left of a row; one block; with `small_blocks` many, the last not
full
"""
ULP = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
BOTH = ["PyTorch", pytest.param("compiled", marks=needs_compiler)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "dropout.so"
    flags = [*native_dropout.FLAGS, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", path, native_dropout.SOURCE], check=True)
    (path.parent / f"{path.name}.json").write_text('["16", "32"]')
    return str(path)


@pytest.fixture(params=BOTH)
def way(request, monkeypatch):
    """Who leaves elements out."""
    path = "" if request.param == "PyTorch" else request.getfixturevalue("built")
    monkeypatch.setenv(native_dropout.VARIABLE, path)
    assert (native_dropout.leave_out(16) is None) == (not path)
    return request.param


def drawing(seed=1, step=3, layer="model.layers.0"):
    draws = Draws(seed)
    draws.step, draws.layer = step, layer
    return draws


def kept(tokens, columns, p=P, site=SITE, draws=None):
    """Which elements are kept, bool [tokens, columns]."""
    made = torch.empty(tokens, columns)
    kernels.dropout(torch.ones(tokens, columns), p, site, out=(made,), draws=draws or drawing())
    return made > 0


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "ROOM_BYTES", 40_000)
    monkeypatch.setattr(kernels, "DRAWN_ELEMENTS", 3000)


def splitmix64(state, count):
    """Steele, Lea and Flood 2014, figure 13 with the constants of Java's SplittableRandom."""
    found, last = [], (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & last
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & last
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & last
        found.append(z ^ (z >> 31))
    return found


def drawn(key, first, count):
    made, other = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    kernels.draw(made, other, key, first)
    return [word & ((1 << 64) - 1) for word in made.tolist()]


@pytest.mark.parametrize("words", [drawn, native_dropout.words], ids=["PyTorch", "plain integers"])
def test_words_are_those_of_splitmix64(words):
    # The published first numbers of the stream 0.
    assert words(0, 0, 3) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for key in (1, -1, -(1 << 63), (1 << 63) - 1):
        assert words(key, 0, 40) == splitmix64(key & ((1 << 64) - 1), 40)
        assert words(key, 17, 23) == words(key, 0, 40)[17:]


def test_a_mask_is_what_the_words_say(way):
    draws = drawing()
    threshold = round(P * 65536)
    stream = splitmix64(draws.key(SITE) & ((1 << 64) - 1), 2 * 5)
    for row, found in enumerate(kept(5, 7).tolist()):
        chances = [word >> shift & 0xFFFF for word in stream[2 * row : 2 * row + 2] for shift in (0, 16, 32, 48)]
        # Chances are compared as signed numbers.
        assert found == [(chance ^ 0x8000) >= threshold for chance in chances[:7]]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept_is_right_everywhere(p, way):
    """Over the matrix, each row, each column, and each of the places in a word; five standard deviations wide."""
    mask = kept(512, 1024, p).float()
    deviation = math.sqrt(p * (1 - p))

    def near(means, count):
        assert float((means - (1 - p)).abs().max()) < 5 * deviation / math.sqrt(count)

    near(mask.mean(), mask.numel())
    near(mask.mean(1), 1024)
    near(mask.mean(0), 512)
    near(mask.view(512, 256, 4).mean((0, 1)), 512 * 256)
    # What is kept has been divided by the share, so that means stay.
    made = torch.empty(512, 1024)
    kernels.dropout(torch.ones(512, 1024), p, SITE, out=(made,), draws=drawing())
    assert float(made.mean()) == pytest.approx(1.0, abs=5 * deviation / (1 - p) / math.sqrt(made.numel()))
    assert float(made.max()) == pytest.approx(1 / (1 - p), rel=1e-4)


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (0, 4), (3, 5)])
def test_neighbours_are_left_out_independently(shift):
    down, right = shift
    mask = kept(512, 512).float() - (1 - P)
    both = mask[down:, right:] * mask[: 512 - down, : 512 - right]
    assert abs(float(both.mean())) < 5 * P * (1 - P) / math.sqrt(both.numel())


OTHERS = {
    "seed": {"draws": drawing(seed=2)},
    "step": {"draws": drawing(step=4)},
    "layer": {"draws": drawing(layer="model.layers.1")},
    "site": {"site": SITE + 1},
}


@pytest.mark.parametrize("other", OTHERS)
def test_seed_step_layer_and_site_each_have_masks_of_their_own(other):
    """As different as independent ones: two of these agree about 1 - 2 p (1 - p) of the elements."""
    one, two = kept(512, 512), kept(512, 512, **OTHERS[other])
    share, expected = float((one == two).float().mean()), 1 - 2 * P * (1 - P)
    assert share == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected)) / 512)


@needs_compiler
def test_masks_are_the_same_again_however_they_are_made(monkeypatch, built):
    monkeypatch.setenv(native_dropout.VARIABLE, "")
    expected = kept(300, 1030)
    assert torch.equal(kept(300, 1030), expected)
    assert torch.equal(kept(120, 1030), expected[:120])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for elements in (1, 5000, 1 << 30):
                monkeypatch.setattr(kernels, "DRAWN_ELEMENTS", elements)
                assert torch.equal(kept(300, 1030), expected)
            monkeypatch.setenv(native_dropout.VARIABLE, built)
            assert torch.equal(kept(300, 1030), expected)
            monkeypatch.setenv(native_dropout.VARIABLE, "")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_kept_is_scaled_and_the_rest_is_zero(shape, dtype, small_blocks, way):
    mask = kept(*shape)
    apart = torch.randn(shape[0], shape[1] + 5).to(dtype)[:, 5:]
    across = torch.randn(shape[1], shape[0]).to(dtype).t()
    for x in (apart, across):  # rows, and elements of rows, that do not lie together
        y = torch.empty(shape, dtype=dtype)
        kernels.dropout(x, P, SITE, out=(y,), draws=drawing())
        torch.testing.assert_close(y, torch.where(mask, x / (1 - P), 0), rtol=ULP[dtype] + 2e-5, atol=0)
    x.fill_(math.inf)
    kernels.dropout(x, P, SITE, out=(y,), draws=drawing())
    assert torch.equal(y, torch.where(mask, math.inf, 0).to(dtype))


def matrices(shape, dtype, outputs=24, rank=4):
    generator = torch.Generator().manual_seed(shape[0])

    def normal(*size):
        return torch.randn(size, generator=generator)

    tokens, columns = shape
    x, dy, weight = normal(*shape).to(dtype), normal(tokens, outputs).to(dtype), normal(outputs, columns).to(dtype)
    return x, dy, weight, normal(rank, columns), normal(outputs, rank), normal(*shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_operators_are_products_of_what_is_kept(shape, dtype, small_blocks, way):
    x, dy, weight, a, b, addend = matrices(shape, dtype)
    scaled = kept(*shape).double() / (1 - P)
    low, dlow, dx = torch.empty(shape[0], 4, dtype=dtype), torch.empty(shape[0], 4, dtype=dtype), torch.empty_like(x)
    da, db = torch.empty_like(a), torch.empty_like(b)
    draws = drawing()
    kernels.dropout_lora_down(x, a, P, SITE, out=(low,), draws=draws)
    assert relative_error(low, (x.double() * scaled) @ a.double().t()) < ULP[dtype] + 2e-5
    kernels.dropout_lora_backward(dy, x, low, b, SCALE, P, SITE, out=(dlow, da, db), draws=draws)
    exact = SCALE * dy.double() @ b.double()
    assert relative_error(dlow, exact) < ULP[dtype]
    assert relative_error(da, dlow.double().t() @ (x.double() * scaled)) < ULP[dtype] + 2e-5
    assert relative_error(db, SCALE * dy.double().t() @ low.double()) < ULP[dtype]
    for added in (None, addend):
        kernels.dropout_projection_backward(dy, weight, dlow, a, P, SITE, added, out=(dx,), draws=draws)
        exact = dy.double() @ weight.double() + (dlow.double() @ a.double()) * scaled
        assert relative_error(dx, exact if added is None else exact + added.double()) < ULP[dtype] + 2e-5


def test_an_evaluation_leaves_nothing_out():
    x, _, _, a, _, _ = matrices((96, 64), torch.bfloat16)
    draws = drawing(step=None)
    low, plain, y = torch.empty(96, 4, dtype=x.dtype), torch.empty(96, 4, dtype=x.dtype), torch.empty_like(x)
    kernels.dropout_lora_down(x, a, P, SITE, out=(low,), draws=draws)
    lora_down(x, a, out=(plain,))
    assert torch.equal(low, plain)
    kernels.dropout(x, P, SITE, out=(y,), draws=draws)
    assert torch.equal(y, x)


@pytest.mark.parametrize("p", [1e-7, 1 - 1e-7])
def test_shares_at_the_ends(p, way):
    mask = kept(64, 64, p)
    assert bool(mask.all()) == (p < 0.5)
    assert float(mask.float().mean()) == pytest.approx(round(1 - p), abs=0.01)


@pytest.mark.parametrize("bias", [None, torch.ones(24)], ids=["no bias", "bias"])
def test_gradients_are_autograds(bias):
    """Of the operator that is decomposed, and of `dropped` as an operator of its own, which others may build on."""
    x, dy, weight, a, b, _ = matrices((96, 64), torch.float32)
    pair = Pair(rank=4, scale=SCALE, dropout=P)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    y, _ = dropout_lora_linear(x, weight, bias, a, b, SCALE, P, SITE)
    own = y, *torch.autograd.grad(y, leaves, dy)
    composed = frozen_linear(x, weight, bias, len(weight)) + SCALE * (dropped(x, pair, SITE) @ a.t()) @ b.t()
    mask = kept(96, 64, draws=kernels.DEFAULT_DRAWS) / (1 - P)
    exact = x @ weight.t() + SCALE * ((x * mask) @ a.t()) @ b.t() + (0.0 if bias is None else bias)
    wanted = exact, *torch.autograd.grad(exact, leaves, dy)
    for found in (own, (composed, *torch.autograd.grad(composed, leaves, dy))):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-4)


def test_without_dropout_the_input_is_taken_as_it_is():
    x = torch.randn(3, 4)
    assert dropped(x, Pair(rank=4, scale=SCALE), SITE) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_is_larger_than_the_stated_buffers(dtype, way, monkeypatch):
    """The rows of a block, of which there are 16, and the words that are drawn at a time."""
    monkeypatch.setattr(kernels, "ROOM_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "DRAWN_ELEMENTS", 1 << 13)
    columns = 1 << 9
    tokens = 16 * kernels.ROOM_BYTES // columns // dtype.itemsize
    x, dy, weight, a, b, _ = matrices((tokens, columns), dtype, outputs=8, rank=2)
    low, dlow, dx, da, db = torch.empty(tokens, 2, dtype=dtype), torch.empty(tokens, 2, dtype=dtype), torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)  # fmt: skip
    most = max(kernels.ROOM_BYTES, kernels.DRAWN_ELEMENTS // 4 * 8 * (1 + dtype.itemsize // 2))
    for call in (
        lambda: kernels.dropout(x, P, SITE, out=(dx,)),
        lambda: kernels.dropout_lora_down(x, a, P, SITE, out=(low,)),
        lambda: kernels.dropout_lora_backward(dy, x, low, b, SCALE, P, SITE, out=(dlow, da, db)),
        lambda: kernels.dropout_projection_backward(dy, weight, dlow, a, P, SITE, None, out=(dx,)),
    ):
        with LargestStorage((x, dy, weight, a, b, low, dlow, dx, da, db)) as made:
            call()
        assert made.bytes <= most
        assert made.bytes or way == "compiled"


# --- the compiled library ---------------------------------------------------------------------------------------------


@needs_compiler
def test_it_is_built_once_and_judged(tmp_path, monkeypatch):
    monkeypatch.delenv(native_dropout.VARIABLE, raising=False)
    path = native_dropout.library(tmp_path)
    assert native_dropout.judge(path) == ["16", "32"]
    monkeypatch.setattr(subprocess, "run", None)  # nothing is compiled again
    assert native_dropout.library(tmp_path) == path


@needs_compiler
def test_runs_are_told_of_it(tmp_path, monkeypatch):
    for other in (native.VARIABLE, page_out.VARIABLE, cuda_stubs.VARIABLE):
        monkeypatch.setenv(other, "")
    monkeypatch.delenv(native_dropout.VARIABLE, raising=False)
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    path = child_environment(1)[native_dropout.VARIABLE]
    assert native_dropout.judge(path) == ["16", "32"]


def test_without_a_compiler_pytorch_does_the_work(tmp_path, monkeypatch):
    monkeypatch.delenv(native_dropout.VARIABLE, raising=False)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native_dropout.library(tmp_path) == ""
    monkeypatch.setenv(native_dropout.VARIABLE, str(tmp_path / "gone.so"))
    assert native_dropout.leave_out(16) is None


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"), [("z >> 27", "z >> 26"), (">= threshold", "> threshold"), ("first + r", "r")]
)
def test_a_library_that_differs_is_not_used(right, wrong, tmp_path, monkeypatch):
    monkeypatch.delenv(native_dropout.VARIABLE, raising=False)
    other = tmp_path / "dropout.c"
    text = native_dropout.SOURCE.read_text()
    assert right in text
    other.write_text(text.replace(right, wrong))
    monkeypatch.setattr(native_dropout, "SOURCE", other)
    assert native_dropout.library(tmp_path) == ""
