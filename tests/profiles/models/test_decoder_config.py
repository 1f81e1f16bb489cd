"""Whatever a config.json holds, it is understood or refused by the field that is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference import CONFIGS, MIXTURE

from tightfit.profiles.models.decoder_config import LARGEST, DecoderShape, decoder_shape, initial_deviation, text_config
from tightfit.runtime.common.errors import InputError

FIELDS = sorted(
    {
        *(field for config in CONFIGS.values() for field in config),
        *LARGEST,
        *("initializer_range", "layer_types", "sliding_window", "rope_scaling", "rope_parameters", "rope_theta"),
    }
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(-(10**400), 10**400),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.sampled_from([*FIELDS, "type", "factor"]), some),
    max_leaves=5,
)


@given(st.sampled_from(sorted(CONFIGS)), st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2))
@example("llama", {"hidden_size": 10**12})
@example("llama", {"rms_norm_eps": 10**400})
@example("llama", {"hidden_act": ["silu"]})
@example("llama", {"rope_scaling": {"type": ["linear"]}})
@example("llama", {"initializer_range": "wide"})
def test_any_value_of_a_field_is_understood_or_refused(family, changed):
    try:
        config = text_config(CONFIGS[family] | changed)
        assert isinstance(decoder_shape(config), DecoderShape)
        assert 0 < initial_deviation(config) < 60_000
    except InputError as error:
        assert str(error)


@pytest.mark.parametrize("field", LARGEST)
def test_a_size_beyond_what_is_supported_is_refused_with_the_field_and_the_bound(field):
    """With sizes of a trillion PyTorch ends in an overflow, or describing the layers in a lack of memory."""
    config = MIXTURE if field in MIXTURE else CONFIGS["llama"] | {"head_dim": 16}
    with pytest.raises(InputError) as caught:
        decoder_shape(config | {field: 10**12})
    words = str(caught.value)
    assert words == f"config field {field!r} is {10**12}; at most {LARGEST[field]} is supported, check the config.json"


def test_what_is_no_models_config_is_none():
    for read in (None, [1], {}, {"architectures": ["x"]}, json.loads('"llama"')):
        assert text_config(read) is None


def test_the_loss_of_routers_is_that_which_the_config_asks_for():
    asked = MIXTURE | {"output_router_logits": True}
    assert decoder_shape(MIXTURE).router_loss is None
    assert decoder_shape(asked).router_loss == 0.001
    assert decoder_shape(asked | {"router_aux_loss_coef": 0.02}).router_loss == 0.02
    assert decoder_shape(asked | {"router_aux_loss_coef": 0.0}).router_loss is None
    assert decoder_shape(CONFIGS["llama"] | {"output_router_logits": True}).router_loss is None
    with pytest.raises(InputError, match="'router_aux_loss_coef' must be a positive number, not 'much'"):
        decoder_shape(asked | {"router_aux_loss_coef": "much"})
