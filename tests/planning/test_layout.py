"""Networks and times of collectives, against the scaling book's worked figures and JAX's own layout of meshes."""

import math

import numpy as np
import pytest
from jax._src import mesh_utils

from maxlm.errors import ConfigError
from maxlm.parallel.mesh import AXES
from maxlm.planning.candidates import factorizations
from maxlm.planning.layout import _on_torus, collective_cost, collective_seconds, network_of
from maxlm.planning.topology import parse_topology


def mesh(**sizes: int) -> dict[str, int]:
    return {axis: sizes.get(axis, 1) for axis in AXES}


@pytest.mark.parametrize(
    "physical", [(4, 4, 4), (4, 4, 8), (2, 4, 4), (8, 8, 16), (16, 16, 1), (4, 8, 1), (4, 4, 4, 2), (4, 8, 8, 2)]
)
def test_mesh_axes_lie_on_the_torus_as_jax_lays_them(physical):
    n = math.prod(physical)
    for data, fsdp, tensor in factorizations(n, 3):
        sizes = (1, data, fsdp, 1, 1, tensor)
        _, theirs = mesh_utils._create_device_mesh_for_nd_torus(
            np.arange(n).reshape(physical), sizes, allow_split_physical_axes=True
        )
        assert np.array_equal(_on_torus(sizes, physical), theirs), sizes


def test_rates_are_those_of_the_scaling_book():
    """Its table has 9e10 B/s for a link of v5p and 4.5e10 of v5e, one way; a ring of an axis uses two of a chip."""
    assert network_of(mesh(fsdp=64), parse_topology("v5p:4x4x4"))["fsdp"].bytes_per_s == pytest.approx(3 * 1.8e11)
    assert network_of(mesh(fsdp=256), parse_topology("v5e:16x16"))["fsdp"].bytes_per_s == pytest.approx(2 * 9e10)
    halves = network_of(mesh(fsdp=16, tensor=4), parse_topology("v5p:4x4x4"))
    assert (halves["fsdp"].bytes_per_s, halves["tensor"].bytes_per_s) == pytest.approx((2 * 1.8e11, 1.8e11))
    assert halves["fsdp"].kind == "ici"


def test_a_line_without_wraparound_receives_over_one_link():
    seconds = collective_seconds("all-gather", 4e9, ["fsdp"], mesh(data=4, fsdp=4), parse_topology("v5e:4x4"))
    assert seconds == pytest.approx(4e9 * 3 / 4 / 4.5e10)


def test_without_wraparound_or_on_part_of_an_axis_the_rate_is_half():
    whole = collective_seconds("all-gather", 1e9, ["tensor"], mesh(fsdp=16, tensor=16), parse_topology("v5e:16x16"))
    part = collective_seconds("all-gather", 1e9, ["tensor"], mesh(fsdp=32, tensor=8), parse_topology("v5e:16x16"))
    small = collective_seconds("all-gather", 1e9, ["tensor"], mesh(fsdp=8, tensor=8), parse_topology("v5e:8x8"))
    assert part / whole == pytest.approx(2 * (7 / 8) / (15 / 16))
    assert part == small


def test_an_all_reduce_is_a_scatter_and_a_gather():
    topology, sizes = parse_topology("v5p:4x4x4"), mesh(data=4, fsdp=16)
    scatter, gather, both = (
        collective_cost(kind, 3e8, ["data", "fsdp"], sizes, topology)
        for kind in ("reduce-scatter", "all-gather", "all-reduce")
    )
    assert both == scatter + gather == scatter * 2
    assert gather.ici_bytes == pytest.approx(3e8 * 63 / 64)


def test_an_all_to_all_on_a_ring_takes_a_quarter_of_the_gather():
    """The scaling book, part 3: of an array of V bytes, V / (4 W) on a bidirectional ring."""
    topology, sizes, whole = parse_topology("v5e:16x16"), mesh(data=16, fsdp=16), 16e8
    gather = collective_seconds("all-gather", whole, ["fsdp"], sizes, topology)
    exchange = collective_seconds("all-to-all", whole / 16, ["fsdp"], sizes, topology)
    assert exchange == pytest.approx(gather / 4 * 16 / 15)


def test_a_permute_goes_over_one_link():
    topology = parse_topology("v5p:4x4x4")
    assert collective_seconds("collective-permute", 9e9, ["fsdp"], mesh(fsdp=64), topology) == pytest.approx(0.1)


def test_little_bytes_take_a_microsecond_a_hop():
    topology = parse_topology("v5e:16x16")
    assert collective_seconds("all-gather", 64, ["fsdp"], mesh(data=16, fsdp=16), topology) == pytest.approx(8e-6)


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"])
def test_axes_of_one_device_take_no_time(kind):
    assert collective_seconds(kind, 1e9, ["tensor"], mesh(fsdp=64), parse_topology("v5p:4x4x4")) == 0
    assert collective_seconds(kind, 1e9, [], mesh(fsdp=64), parse_topology("v5p:4x4x4")) == 0


def test_slices_are_taken_by_the_first_axis_that_they_divide():
    two = parse_topology("v6e:16x16", slices=2)
    networks = network_of(mesh(data=2, fsdp=256), two)
    assert networks["data"].kind == "dcn"
    assert networks["data"].bytes_per_s == 12.5e9
    assert networks["fsdp"].kind == "ici"
    mixed = network_of(mesh(fsdp=512), two)["fsdp"]
    assert mixed.kind == "mixed"
    # Each device fetches its 512th over DCN, and 255 / 256 over ICI.
    assert mixed.bytes_per_s == pytest.approx((511 / 512) / (1 / 512 / 12.5e9 + 255 / 256 / 3.6e11))
    cost = collective_cost("all-gather", 512e6, ["fsdp"], mesh(fsdp=512), two)
    assert (cost.dcn_bytes, cost.ici_bytes) == (1e6, 510e6)


def test_gpus_have_nvlink_in_a_host_and_the_network_between_hosts():
    h100 = parse_topology("h100:16x8")
    networks = network_of(mesh(data=16, fsdp=8), h100)
    assert (networks["fsdp"].kind, networks["data"].kind) == ("nvlink", "dcn")
    assert networks["fsdp"].bytes_per_s == pytest.approx(370e9, rel=0.01)
    assert networks["data"].bytes_per_s == 50e9
    assert network_of(mesh(fsdp=128), h100)["fsdp"].kind == "mixed"


def test_two_devices_of_a_chip_share_its_links():
    """A group with both dies has the chip's links to itself; one with a single die shares them; both dies alone are
    joined six times as fast as a link."""
    topology = parse_topology("tpu7x:4x4x4")
    assert network_of(mesh(fsdp=128), topology)["fsdp"].bytes_per_s == pytest.approx(3 * 1.8e11)
    split = network_of(mesh(fsdp=64, tensor=2), topology)
    assert split["fsdp"].bytes_per_s == pytest.approx(3 * 1.8e11 / 2)
    assert split["tensor"].bytes_per_s == pytest.approx(6 * 9e10)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="is of 32 devices and 1 x v5p:4x4x4 has 64"):
        network_of(mesh(fsdp=32), parse_topology("v5p:4x4x4"))
    with pytest.raises(ConfigError, match=r"mesh\.fsdp is a multiple of 2; set mesh\.data=2"):
        network_of(mesh(tensor=512), parse_topology("v6e:16x16", slices=2))
    with pytest.raises(ValueError, match="'all-shuffle' is not one of"):
        collective_seconds("all-shuffle", 1, ["fsdp"], mesh(fsdp=64), parse_topology("v5p:4x4x4"))
