"""RoPE and its scalings: by formulas, and against the frequencies that `transformers` makes where it is installed."""

import numpy as np
import pytest
from pydantic import ValidationError

from maxlm.models.config import ModelConfig
from maxlm.models.positions import rope_angles, rope_frequencies, rotate
from tests import tiny

LLAMA31 = {
    "kind": "llama3", "factor": 8.0, "original_max_seq_len": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0
}  # fmt: skip
YARN = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 32768}


def frequencies(scaling=None, **keys):
    """Frequencies and factor of a model whose heads are 64 wide, unless `keys` say otherwise."""
    return rope_frequencies(ModelConfig(**{**tiny.LLAMA, "head_dim": 64, "rope_scaling": scaling, **keys}))


def test_frequencies_are_powers_of_the_base():
    found, factor = frequencies(rope_theta=5e5)
    np.testing.assert_allclose(found, 5e5 ** -(np.arange(32) / 32), rtol=1e-6)
    assert (found.dtype, factor) == (np.float32, 1.0)


@pytest.mark.parametrize("scaling", [LLAMA31, YARN, {"kind": "linear"}, {"kind": "ntk"}], ids=lambda s: s["kind"])
def test_scaling_by_one_changes_nothing(scaling):
    found, factor = frequencies({**scaling, "factor": 1.0}, rope_theta=5e5)
    np.testing.assert_allclose(found, frequencies(rope_theta=5e5)[0], rtol=2e-7)
    assert factor == 1.0


def test_linear_scaling_is_positions_divided():
    positions = np.arange(24, dtype=np.int32)[None]
    plain = ModelConfig(**tiny.LLAMA)
    scaled = ModelConfig(**tiny.LLAMA, rope_scaling={"kind": "linear", "factor": 4.0})
    for found, expected in zip(rope_angles(4 * positions, scaled), rope_angles(positions, plain), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_ntk_keeps_the_shortest_wavelength_and_stretches_the_longest_by_the_factor():
    found, plain = frequencies({"kind": "ntk", "factor": 6.0})[0], frequencies()[0]
    assert found[0] == plain[0] == 1
    assert plain[-1] / found[-1] == pytest.approx(6.0, rel=1e-5)
    assert (np.diff(plain / found) > 0).all()


def test_llama3_stretches_long_wavelengths_keeps_short_ones_and_goes_over_smoothly():
    found, plain = frequencies(LLAMA31, rope_theta=5e5, head_dim=128)[0], frequencies(rope_theta=5e5, head_dim=128)[0]
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(found[turns < 1], plain[turns < 1] / 8)
    np.testing.assert_array_equal(found[turns > 4], plain[turns > 4])
    stretch = plain / found
    assert (np.diff(stretch) >= 0).all()
    assert ((turns > 1) & (turns < 4)).sum() == sum((stretch > 1.001) & (stretch < 7.999)) > 3


def test_yarn_stretches_what_turns_seldom_keeps_what_turns_often_and_warms_attention():
    (found, factor), (plain, _) = frequencies(YARN, rope_theta=1e6), frequencies(rope_theta=1e6)
    turns = 32768 * plain / (2 * np.pi)
    np.testing.assert_allclose(plain[turns < 0.6] / found[turns < 0.6], 4, rtol=1e-6)
    np.testing.assert_array_equal(found[turns > 50], plain[turns > 50])
    assert factor == pytest.approx(0.1 * np.log(4) + 1)
    assert frequencies({**YARN, "attention_factor": 1.25})[1] == 1.25
    config = ModelConfig(**tiny.LLAMA, rope_scaling=YARN)
    cos, sin = rope_angles(np.arange(9)[None], config)
    np.testing.assert_allclose(np.sqrt(cos**2 + sin**2), factor, rtol=1e-6)


def test_a_part_of_a_head_turns_as_a_head_of_that_width_and_the_rest_passes():
    config = ModelConfig(**tiny.LLAMA, rope_fraction=0.25)  # of 16 channels
    narrow = ModelConfig(**{**tiny.LLAMA, "head_dim": 4})
    rng, positions = np.random.default_rng(0), np.arange(6, dtype=np.int32)[None]
    x = rng.standard_normal((1, 6, 2, 16)).astype(np.float32)
    found = np.asarray(rotate(x, *rope_angles(positions, config)))
    np.testing.assert_array_equal(found[..., :4], rotate(x[..., :4], *rope_angles(positions, narrow)))
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])


@pytest.mark.parametrize("keys", [{}, {"rope_fraction": 0.5}, {"rope_scaling": LLAMA31}, {"rope_scaling": YARN}])
def test_scores_depend_on_how_far_apart_positions_are_alone(keys):
    config = ModelConfig(**tiny.LLAMA, **keys)
    q, k = np.random.default_rng(1).standard_normal((2, 16)).astype(np.float32)
    turned = [
        np.asarray(rotate(np.tile(x, (1, 40, 1, 1)), *rope_angles(np.arange(40)[None], config)))[0, :, 0]
        for x in (q, k)
    ]
    scores = turned[0] @ turned[1].T
    for apart in (0, 1, 7, 20):
        np.testing.assert_allclose(np.diagonal(scores, -apart), scores[apart, 0], atol=2e-5)


# What is refused: the keys of a model, and what the message says.
REFUSED = {
    "a key of another kind": ({"rope_scaling": {"kind": "linear", "factor": 2.0, "beta_fast": 8.0}}, "beta_fast is"),
    "a key that is missing": ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "'yarn' needs original_max_seq_len"),
    "no factor": ({"rope_scaling": {"kind": "linear"}}, "factor"),
    "a factor below one": ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "factor"),
    "bands that cross": ({"rope_scaling": {**LLAMA31, "low_freq_factor": 4.0}}, "must be less than high_freq_factor"),
    "a ramp that falls": ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_slow = 1 must be less than beta_fast"),
    "scaling of learned positions": (
        {"positions": "learned", "rope_scaling": LLAMA31}, "rope_scaling is given, and positions = 'learned'"
    ),
    "a part of learned positions": ({"positions": "learned", "rope_fraction": 0.5}, "rope_fraction is given"),
    "a part that is odd": ({"rope_fraction": 0.2}, "rope_fraction = 0.2 of head_dim = 16 is 3 channels"),
    "a part that is nothing": ({"rope_fraction": 0.05}, "is 0 channels"),
    "one wavelength by another base": (
        {"rope_fraction": 0.125, "rope_scaling": {"kind": "ntk", "factor": 2.0}}, "2 channels have one"
    ),
    "a base without a logarithm": ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta = 1 must be over 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_rope_that_cannot_be_is_refused_by_name(case):
    keys, message = REFUSED[case]
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**{**tiny.LLAMA, **keys})
    assert message in str(caught.value)


def test_frequencies_and_factors_are_those_of_transformers():
    """Two hundred generated models of each kind. Static NTK is their dynamic one for a row of that length."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    transformers.logging.set_verbosity_error()
    rng = np.random.default_rng(20261121)

    def one(*options):
        return options[rng.integers(len(options))]

    for _ in range(200):
        theta, width = one(1e4, 5e5, 1e6, 12345.0), one(8, 16, 24, 64, 80, 96, 128, 256)
        fraction, length = one(1.0, 1.0, 0.5, 0.25), one(64, 2048, 8192, 40960)
        factor = float(one(1.0, 2.0, 3.5, 8.0, 40.0))
        low = float(one(1.0, 2.0))
        theirs = {
            "linear": {},
            "yarn": {"original_max_position_embeddings": length} | one(
                {}, {"beta_fast": 24.0, "beta_slow": 1.5}, {"attention_factor": 1.125}
            ),
            "llama3": {
                "original_max_position_embeddings": length, "low_freq_factor": low, "high_freq_factor": 4 * low
            },
            "dynamic": {},
        }  # fmt: skip
        for kind, numbers in theirs.items():
            ours = {name.replace("position_embeddings", "seq_len"): x for name, x in numbers.items()}
            scaling = {"kind": "ntk" if kind == "dynamic" else kind, "factor": factor, **ours}
            if kind == "dynamic" and width * fraction < 4:
                continue
            sizes = {"head_dim": int(width), "rope_fraction": float(fraction), "rope_theta": float(theta)}
            found, found_factor = frequencies(scaling, **sizes)
            config = transformers.LlamaConfig(
                hidden_size=512, num_attention_heads=4, head_dim=int(width), max_position_embeddings=100,
                rope_parameters={"rope_type": kind, "rope_theta": float(theta), "factor": factor,
                                 "partial_rotary_factor": float(fraction), **numbers},
            )  # fmt: skip
            # Their factor for a row of n times the longest is n factor - (factor - 1); twice theirs is 1 + factor.
            longest = 100 if kind != "dynamic" else None
            if kind == "dynamic":
                config.rope_parameters["factor"], longest = factor - 1, 200
            expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=longest)
            expected, plain = expected.numpy(), frequencies(**sizes)[0]
            # Where Llama 3's bands begin, what is added to the stretched frequency is a small difference of large ones.
            bound = 1e-6 * expected + (1e-7 * plain if kind == "llama3" else 0)
            assert (np.abs(found - expected) <= bound).all(), (scaling, width, fraction)
            assert found_factor == pytest.approx(expected_factor, rel=1e-6)
