"""Federated averaging against its formula in plain numpy, ranks that differ, and adapters that are refused."""

import numpy as np
import pytest
from safetensors.numpy import load, save

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.federated.adapter_file import AdapterFile
from tightfit.runtime.federated.aggregate import (
    START_LENGTH,
    DeviceContribution,
    averaged,
    closed,
    opened,
    singular_form,
    started,
)

SHAPES = {
    "layers.0.q.lora_A.weight": (4, 12),
    "layers.0.q.lora_B.weight": (9, 4),
    "layers.1.up.lora_A.weight": (4, 7),
    "layers.1.up.lora_B.weight": (20, 4),
}
NAMES = ("layers.0.q", "layers.1.up")


def drawn(seed, rank=4):
    draw = np.random.default_rng(seed)
    return {
        name: draw.normal(size=(rank, shape[1]) if "lora_A" in name else (shape[0], rank)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def products(tensors):
    return {
        name: tensors[f"{name}.lora_B.weight"].astype(np.float64) @ tensors[f"{name}.lora_A.weight"].astype(np.float64)
        for name in NAMES
    }


def test_the_mean_is_weighted_by_tokens_and_rounded_once():
    adapters, tokens = [drawn(seed) for seed in range(3)], [100, 7, 12345]
    found = averaged([DeviceContribution(tensors=one, tokens=count) for one, count in zip(adapters, tokens)], drawn(9))
    for name in SHAPES:
        total = sum(count * one[name].astype(np.float64) for one, count in zip(adapters, tokens))
        np.testing.assert_array_equal(found[name], (total / sum(tokens)).astype(np.float32))
        assert found[name].dtype == np.float32


def test_the_mean_of_one_is_itself():
    one = drawn(1)
    found = averaged([DeviceContribution(tensors=one, tokens=3)], drawn(2))
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], one[name])


def test_without_tokens_there_is_no_mean():
    with pytest.raises(InputError, match="no device has trained on any token"):
        averaged([DeviceContribution(tensors=drawn(1), tokens=0)], drawn(1))


def test_components_are_averaged_over_those_that_have_them():
    large, small, current = drawn(1), drawn(2, rank=2), drawn(3)
    found = averaged(
        [DeviceContribution(tensors=large, tokens=30), DeviceContribution(tensors=small, tokens=10)], current
    )
    for name in SHAPES:
        whole = found[name] if "lora_A" in name else found[name].T
        one, other = (part[name] if "lora_A" in name else part[name].T for part in (large, small))
        shared = (30 * one[:2].astype(np.float64) + 10 * other.astype(np.float64)) / 40
        np.testing.assert_array_equal(whole[:2], shared.astype(np.float32))
        np.testing.assert_array_equal(whole[2:], one[2:])


def test_components_that_nobody_trained_stay():
    small, current = drawn(2, rank=2), drawn(3)
    found = averaged([DeviceContribution(tensors=small, tokens=10)], current)
    for name in SHAPES:
        turn = (lambda values: values) if "lora_A" in name else np.transpose
        np.testing.assert_array_equal(turn(found[name])[:2], turn(small[name]))
        np.testing.assert_array_equal(turn(found[name])[2:], turn(current[name])[2:])


def test_the_singular_form_is_the_same_adapter():
    tensors = drawn(5)
    form = singular_form(tensors)
    assert {name: values.shape for name, values in form.items()} == SHAPES
    for name, product in products(tensors).items():
        np.testing.assert_allclose(products(form)[name], product, atol=1e-5)
        rows = form[f"{name}.lora_A.weight"].astype(np.float64)
        np.testing.assert_allclose(rows @ rows.T, START_LENGTH**2 * np.eye(4), atol=1e-6)
        lengths = np.linalg.norm(form[f"{name}.lora_B.weight"], axis=0)
        assert list(lengths) == sorted(lengths, reverse=True)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_first_components_are_the_best_approximation(rank):
    tensors = drawn(6)
    cut = load(AdapterFile.read(closed(singular_form(tensors)), "it").cut(rank))
    for name, product in products(tensors).items():
        assert cut[f"{name}.lora_A.weight"].shape[0] == rank
        sizes = np.linalg.svd(product, compute_uv=False)
        error = np.linalg.norm(product - products(cut)[name])
        assert error == pytest.approx(np.sqrt((sizes[rank:] ** 2).sum()), rel=1e-4)


def test_a_new_adapter_keeps_its_gradient_in_singular_form():
    tensors = started(SHAPES, seed=3)
    form = singular_form(tensors)
    for name, product in products(form).items():
        assert not product.any()
        lengths = np.linalg.norm(form[f"{name}.lora_A.weight"], axis=1)
        np.testing.assert_allclose(lengths, START_LENGTH, rtol=1e-5)


def test_the_singular_form_does_not_depend_on_signs():
    tensors = drawn(7)
    turned = {name: -values for name, values in tensors.items()}
    for name, values in singular_form(tensors).items():
        np.testing.assert_allclose(values, singular_form(turned)[name], atol=1e-5)


def test_a_layer_smaller_than_the_rank_stays_as_it_is():
    tensors = {"l.lora_A.weight": np.ones((4, 3), np.float32), "l.lora_B.weight": np.ones((9, 4), np.float32)}
    assert all((singular_form(tensors)[name] == values).all() for name, values in tensors.items())


def test_a_new_adapter_is_the_seeds():
    one, other = started(SHAPES, 1), started(SHAPES, 2)
    for name, shape in SHAPES.items():
        assert one[name].shape == shape
        np.testing.assert_array_equal(one[name], started(SHAPES, 1)[name])
        if "lora_B" in name:
            assert not one[name].any()
        else:
            assert (one[name] != other[name]).any()
            assert np.abs(one[name]).max() <= shape[1] ** -0.5


def test_a_file_is_read_as_it_was_written():
    tensors = drawn(4)
    found = opened(closed(tensors), SHAPES, 4, "it")
    assert list(found) == list(SHAPES)
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], tensors[name])
    assert AdapterFile.read(closed(tensors), "it").cut(4) == closed(tensors)
    assert AdapterFile.read(closed(tensors), "it").cut(9) == closed(tensors)


def _changed(change):
    tensors = drawn(4)
    change(tensors)
    return save({name: np.ascontiguousarray(values) for name, values in tensors.items()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]", "damaged"),
        (closed(drawn(1))[:-4], "cut off"),
        (_changed(lambda one: one.pop("layers.0.q.lora_A.weight")), "other tensors"),
        (_changed(lambda one: one.update(x=np.zeros(1, np.float32))), "other tensors"),
        (closed(drawn(1, rank=3)), r"F32 \[3, 12\], not F32 \[4, 12\]"),
        (_changed(lambda one: one.update({"layers.1.up.lora_B.weight": np.zeros((20, 4), np.float16)})), "F16"),
        (_changed(lambda one: one["layers.1.up.lora_B.weight"].fill(np.nan)), "no finite numbers"),
    ],
)
def test_another_file_is_refused(content, message):
    with pytest.raises(InputError, match=f"it: .*{message}"):
        opened(content, SHAPES, 4, "it")
