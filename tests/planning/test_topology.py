"""Clusters by name, against the tables of docs.cloud.google.com/tpu/docs (a page a chip)."""

import math

import pytest

from maxlm.errors import ConfigError
from maxlm.planning.topology import Topology, parse_topology, shapes

# Accelerator type, topology, chips, JAX devices, hosts, wraparound.
PUBLISHED = [
    ("v4-8", "v4:2x2x1", 4, 4, 1, (False, False, False)),
    ("v4-128", "v4:4x4x4", 64, 64, 16, (True, True, True)),
    ("v5p-8", "v5p:2x2x1", 4, 4, 1, (False, False, False)),
    ("v5p-16", "v5p:2x2x2", 8, 8, 2, (False, False, False)),
    ("v5p-64", "v5p:2x4x4", 32, 32, 8, (False, False, False)),
    ("v5p-128", "v5p:4x4x4", 64, 64, 16, (True, True, True)),
    ("v5p-256", "v5p:4x4x8", 128, 128, 32, (True, True, True)),
    ("v5p-512", "v5p:4x8x8", 256, 256, 64, (True, True, True)),
    ("v5p-1024", "v5p:8x8x8", 512, 512, 128, (True, True, True)),
    ("v5p-2048", "v5p:8x8x16", 1024, 1024, 256, (True, True, True)),
    ("v5p-4096", "v5p:8x16x16", 2048, 2048, 512, (True, True, True)),
    ("v5p-8192", "v5p:16x16x16", 4096, 4096, 1024, (True, True, True)),
    ("v5p-12288", "v5p:16x16x24", 6144, 6144, 1536, (True, True, True)),
    ("v5e-1", "v5e:1x1", 1, 1, 1, (False, False)),
    ("v5e-8", "v5e:2x4", 8, 8, 1, (False, False)),
    ("v5e-16", "v5e:4x4", 16, 16, 4, (False, False)),
    ("v5e-32", "v5e:4x8", 32, 32, 8, (False, False)),
    ("v5e-128", "v5e:8x16", 128, 128, 32, (False, True)),
    ("v5e-256", "v5e:16x16", 256, 256, 64, (True, True)),
    ("v6e-64", "v6e:8x8", 64, 64, 16, (False, False)),
    ("v6e-256", "v6e:16x16", 256, 256, 64, (True, True)),
    ("tpu7x-8", "tpu7x:2x2x1", 4, 8, 1, (False, False, False)),
    ("tpu7x-128", "tpu7x:4x4x4", 64, 128, 16, (True, True, True)),
    ("tpu7x-512", "tpu7x:4x8x8", 256, 512, 64, (True, True, True)),
    ("h100-8", "h100:1x8", 8, 8, 1, ()),
    ("h100-128", "h100:16x8", 128, 128, 16, ()),
    ("b200-64", "b200:8x8", 64, 64, 8, ()),
]


@pytest.mark.parametrize(("accelerator", "name", "chips", "devices", "hosts", "wrap"), PUBLISHED)
def test_both_names_are_the_published_cluster(accelerator, name, chips, devices, hosts, wrap):
    found = parse_topology(accelerator)
    assert found == parse_topology(name.upper())
    assert (found.accelerator, found.name) == (accelerator, name)
    assert (found.n_chips, found.n_devices, found.hosts, found.wrap) == (chips, devices, hosts, wrap)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_every_shape_has_a_name_that_leads_back_to_as_many_chips(chip):
    a_chip = parse_topology(f"{chip}:{'x'.join(['4'] * (2 if chip in ('v5e', 'v6e') else 3))}").chip
    assert len(shapes(a_chip)) >= 8
    for shape in shapes(a_chip):
        one = Topology(a_chip, shape)
        assert parse_topology(one.name) == one
        again = parse_topology(one.accelerator)
        assert again.n_chips == one.n_chips == math.prod(shape)
        assert sum(again.shape) <= sum(shape)  # the default is the most cubic


def test_other_spellings():
    assert parse_topology(" v5litepod-16 ") == parse_topology("v5e:4x4")
    assert parse_topology("a100-64").name == "a100-80gb:8x8"
    assert parse_topology("a100-40gb:2x8").accelerator == "a100-40gb-16"


def test_slices_multiply_chips_devices_and_hosts_and_not_the_name():
    two = parse_topology("v6e-256", slices=2)
    assert (two.n_chips, two.n_devices, two.hosts, two.devices_per_slice) == (512, 512, 128, 256)
    assert (two.name, two.accelerator) == ("v6e:16x16", "v6e-256")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5q-128", ["no chip 'v5q'", "did you mean v5p or v5e?"]),
        ("v5p", ["names no shape and no number", "v5p:"]),
        ("", ["names no shape", "CHIP:SHAPE"]),
        ("v5p-100", ["counts TensorCores, 2 a chip", "v5p:2x4x4 (v5p-64)", "v5p:4x4x4 (v5p-128)"]),
        ("tpu7x-100", ["counts JAX devices, 2 a chip", "tpu7x:2x4x4 (tpu7x-64)"]),
        ("v5e-12", ["counts chips", "v5e:2x4 (v5e-8)", "v5e:4x4 (v5e-16)"]),
        ("v5e:16x32", ["square, or twice that", "v5e:16x16"]),
        ("v5e:4x4x4", ["a torus of 2 axes"]),
        ("v5p:8x4x4", ["ascending order", "v5p:4x4x8"]),
        ("v5p:4x4x6", ["multiples of 4", "v5p:4x4x8"]),
        ("v5p:16x16x32", ["up to 16x16x24", "v5p:16x16x24"]),
        ("v5p:4x4xhalf", ["'4x4xhalf' is no shape"]),
        ("h100-12", ["not whole hosts of 8", "h100-8 or h100-16"]),
        ("h100:2x16", ["HOSTS x GPUS with up to 8"]),
        ("h100:0x8", ["HOSTS x GPUS"]),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_is_near(text, words):
    with pytest.raises(ConfigError) as error:
        parse_topology(text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "slices", "word"),
    [("v5p-128", 0, "give 1 or more"), ("h100-16", 2, "give all hosts"), ("v4-128", 2, "is not published")],
)
def test_slices_that_cannot_be_are_refused(text, slices, word):
    with pytest.raises(ConfigError, match=word):
        parse_topology(text, slices)


def test_rates_are_a_devices():
    tpu7x, v5p, h100 = (parse_topology(text) for text in ("tpu7x-128", "v5p-128", "h100-8"))
    assert tpu7x.peak_flops_per_device("bfloat16") == 2307e12 / 2
    assert tpu7x.peak_flops_per_device("float8") == 4614e12 / 2
    assert tpu7x.dcn_bytes_per_s_per_device == 100e9 / 8 / 2
    assert v5p.peak_flops_per_device("float32") == 459e12  # one pass of bfloat16
    assert h100.peak_flops_per_device("float32") == 494.7e12  # TF32
    with pytest.raises(ConfigError, match="float8 peak of v5e is not published"):
        parse_topology("v5e-16").peak_flops_per_device("float8")
