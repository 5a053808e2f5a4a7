"""Shapes of a family: monotone, in the multiples that were asked for, of any kind of model."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import load_config
from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.flops import count_parameters
from maxlm.scaling.shapes import Family, ShapeConfig
from tests.tiny import BART, BERT, GPT2, LLAMA, T5
from tests.tiny_moe import MIXTRAL

BASES = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT, "t5": T5, "bart": BART, "mixtral": MIXTRAL}


def family(base: dict, **rule) -> Family:
    return Family(ModelConfig.model_validate(base), ShapeConfig(**rule))


@settings(max_examples=60, deadline=None)
@given(
    base=st.sampled_from(sorted(BASES)),
    aspect=st.floats(4, 200),
    head_dim=st.sampled_from([8, 16, 32]),
    heads=st.integers(1, 4),
    ratio=st.floats(0.5, 6),
    multiple=st.integers(1, 64),
)
def test_each_shape_is_wider_or_deeper_than_the_one_before_in_whole_multiples(
    base, aspect, head_dim, heads, ratio, multiple
):
    rule = {"aspect_ratio": aspect, "head_dim": head_dim, "d_ff_ratio": ratio, "d_ff_multiple": multiple}
    if base != "t5":  # whose heads are wider than d_model / n_heads
        rule["d_model_multiple"] = heads * head_dim * family(BASES[base]).group
    shapes = list(itertools.islice(family(BASES[base], **rule), 25))
    for shape in shapes:
        model = shape.model
        assert model.d_ff % multiple == 0
        assert abs(model.d_ff - ratio * model.d_model) <= max(multiple / 2, multiple - ratio * model.d_model)
        assert model.head_width == head_dim
        assert model.d_model % rule.get("d_model_multiple", head_dim) == 0
        assert base == "t5" or model.n_heads * head_dim == model.d_model
        assert model.n_heads == model.kv_heads * family(BASES[base]).group
        assert shape.count == count_parameters(model)
    for a, b in itertools.pairwise(shapes):
        grown = (b.model.d_model > a.model.d_model) + (b.model.n_layers > a.model.n_layers)
        assert grown == 1, "one of width and depth at a time, so that sizes are near each other"
        assert b.model.n_layers >= a.model.n_layers
        assert b.count.total > a.count.total


def test_the_depth_follows_the_aspect_ratio():
    for shape in itertools.islice(family(LLAMA, aspect_ratio=32, head_dim=16), 60):
        # Half a layer of rounding, and the steps in between that have the next width's depth already.
        assert abs(shape.model.n_layers - shape.model.d_model / 32) <= 1 or shape.model.n_layers == 1


def test_a_base_as_it_is_is_a_shape_of_its_own_family():
    model = load_config("llama3-8b").model
    shape = Family(model, ShapeConfig(d_ff_multiple=256)).shape(4096, 32)
    assert shape.model == model


def test_groups_of_query_heads_and_experts_keep_their_proportions():
    llama = family({**LLAMA, "n_heads": 8, "n_kv_heads": 2}, head_dim=8).shape(256, 4).model
    assert (llama.n_heads, llama.kv_heads) == (32, 8)
    mixtral = ModelConfig.model_validate(MIXTRAL)
    wide = family(MIXTRAL).shape(2 * mixtral.d_model, 4).model
    assert mixtral.moe is not None
    assert wide.moe is not None
    assert (wide.moe.d_ff / wide.d_ff, wide.moe.n_experts) == (mixtral.moe.d_ff / mixtral.d_ff, mixtral.moe.n_experts)


@pytest.mark.parametrize(
    "preset", ["deepseek-v3", "gemma2-9b", "qwen3-30b-a3b", "gpt-oss-20b", "t5-base", "bloom-176b"]
)
def test_every_kind_of_preset_can_be_made_small(preset):
    model = load_config(preset).model
    small = next(iter(Family(model, ShapeConfig(d_ff_multiple=8))))
    assert small.count.total < count_parameters(model).total / 4


def test_a_multiple_that_heads_do_not_divide_is_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"shape\.d_model_multiple = 48 .* 32: .*16 wide, in groups of 2.*shape\.head_dim"
    ):
        next(iter(family(LLAMA, d_model_multiple=48)))
