"""Attention over rows that devices share by position, by a ring and by positions exchanged for heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.kernels import attention as module
from maxlm.kernels.attention import attention
from maxlm.kernels.attention_exchange import repeats
from maxlm.kernels.attention_extras import Layout
from maxlm.kernels.masks import Mask
from maxlm.kernels.ring_plan import Plan, Ring, Tiling, zigzag
from maxlm.parallel.mesh import MeshConfig
from tests.kernels import truth
from tests.kernels.test_attention_extras import Case, expected_of, inputs, output_and_gradients

PLAIN = Case(
    shape=(2, 48, 48, 8, 8), heads=(4, 2), mask=Mask(), segments=False, prefix=False, sinks=False, bias=None,
    relative=None, softcap=None, dtype="float32", implementation="auto", seed=0,
)  # fmt: skip
TWO, FOUR = MeshConfig(data=2, fsdp=1, context=2, tensor=2), MeshConfig(fsdp=2, context=4)
EIGHT = MeshConfig(fsdp=1, context=8)
# Chunks have 12 positions on two devices, 6 on four and 3 on eight; tiles 8 at the most.
RING = {
    "causal, GQA": (TWO, replace(PLAIN, seed=1)),
    "causal, latent widths, padded tiles": (FOUR, replace(PLAIN, shape=(2, 80, 80, 12, 5), heads=(2, 2), seed=2)),
    "causal, one key head, eight devices": (EIGHT, replace(PLAIN, heads=(3, 1), seed=3)),
    "both ways": (FOUR, replace(PLAIN, mask=Mask(causal=False), seed=4)),
    "segments, softcap": (TWO, replace(PLAIN, segments=True, softcap=3.0, seed=5)),
    "window within a chunk, sinks": (FOUR, replace(PLAIN, mask=Mask(window=5), sinks=True, seed=6)),
    "window of several chunks, segments": (FOUR, replace(PLAIN, mask=Mask(window=17), segments=True, seed=7)),
    "window both ways": (FOUR, replace(PLAIN, mask=Mask(causal=False, window=4), seed=8)),
    "chunks across pieces, sinks": (TWO, replace(PLAIN, mask=Mask(chunk=7), sinks=True, seed=9)),
    "chunks within pieces": (TWO, replace(PLAIN, mask=Mask(chunk=6), seed=10)),
    "prefix, segments, ALiBi": (FOUR, replace(PLAIN, prefix=True, segments=True, bias="alibi", seed=11)),
    "prefix within a window": (FOUR, replace(PLAIN, prefix=True, mask=Mask(window=7), seed=12)),
    "global tokens": (FOUR, replace(PLAIN, mask=Mask(window=5, global_tokens=9), sinks=True, seed=13)),
    "relative bias both ways": (TWO, replace(PLAIN, mask=Mask(causal=False), bias="both", seed=14)),
    "relative bias, softcap, window": (TWO, replace(PLAIN, mask=Mask(window=9), bias="past", softcap=2.0, seed=15)),
    "distances of Transformer-XL": (FOUR, replace(PLAIN, heads=(2, 2), relative="past", seed=16)),
    "keys of other rows": (
        FOUR, replace(PLAIN, shape=(2, 48, 80, 8, 8), mask=Mask(causal=False), segments=True, seed=17)
    ),
    "bfloat16": (TWO, replace(PLAIN, dtype="bfloat16", segments=True, seed=18)),
}  # fmt: skip
ALL_TO_ALL = {
    "key heads repeated, segments, sinks": (FOUR, replace(PLAIN, segments=True, sinks=True, seed=21)),
    "one key head, window, softcap": (FOUR, replace(PLAIN, heads=(8, 1), mask=Mask(window=5), softcap=3.0, seed=22)),
    "latent widths, tensor, prefix, ALiBi": (
        TWO, replace(PLAIN, shape=(2, 48, 48, 12, 5), heads=(4, 4), prefix=True, bias="alibi", seed=23)
    ),
    "distances and relative bias": (TWO, replace(PLAIN, heads=(4, 4), relative="both", bias="both", seed=24)),
    "the reference, keys of other rows": (
        TWO,
        replace(PLAIN, shape=(2, 48, 80, 8, 8), mask=Mask(causal=False), implementation="reference", seed=25),
    ),
}  # fmt: skip


def on_the_mesh(case: Case, context: str, devices: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Output and gradients of a case with rows shared by position, as one device has them; and the truth."""
    arrays, extras = inputs(case)
    expected = expected_of(case, arrays, extras)
    order = {length: zigzag(length, devices) if context == "ring" else np.arange(length) for length in case.shape[1:3]}

    def laid_out(x, spec):
        return truth.put(np.asarray(x)[:, order[x.shape[1]]], spec)

    layout = Layout()
    q, k, v, do = (
        laid_out(x, spec)
        for x, spec in zip(arrays, (layout.queries, layout.keys, layout.keys, layout.queries), strict=True)
    )
    for name in ("segments_BT", "kv_segments_BS", "prefix_BS"):
        if name in extras:
            extras[name] = laid_out(extras[name], layout.rows)
    if case.relative is not None:
        relative = extras["relative"]
        extras["relative"] = replace(relative, q_BTHK=laid_out(relative.q_BTHK, layout.queries))
    got = output_and_gradients(
        (q, k, v, do),
        extras,
        mask=case.mask,
        softcap=case.softcap,
        implementation=case.implementation,
        context=context,
    )
    in_rows = [x.ndim == 4 for x in got]
    return tuple(
        np.asarray(x)[:, np.argsort(order[x.shape[1]])] if rows else np.asarray(x)
        for x, rows in zip(got, in_rows, strict=True)
    ), expected


def hold_to_the_truth(mesh: MeshConfig, case: Case, context: str) -> None:
    with jax.set_mesh(truth.mesh_of(mesh)):
        got, expected = on_the_mesh(case, context, mesh.context)
    assert len(got) == len(expected)
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        # As in `test_attention_extras.py`.
        size = max(case.shape[1:3]) if i >= 4 and case.bias == "alibi" else 1.0
        truth.assert_close(x, y, truth.tolerance(jnp.dtype(case.dtype)), f"result {i}", least_scale=size)


@pytest.mark.parametrize("name", RING)
def test_a_ring_gives_the_output_and_gradients_of_the_float64_truth(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CPU_TILE", 8)
    hold_to_the_truth(*RING[name], "ring")


@pytest.mark.parametrize("name", ALL_TO_ALL)
def test_heads_exchanged_for_positions_give_the_output_and_gradients_of_the_float64_truth(name, monkeypatch):
    monkeypatch.setattr(module, "CPU_TILE", 16)
    hold_to_the_truth(*ALL_TO_ALL[name], "all_to_all")


def travelled(jaxpr: Any, times: int = 1) -> tuple[int, int]:
    """How many arrays a program passes on between devices, and the bytes that each device sends."""
    count = size = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            aval = equation.outvars[0].aval
            count, size = count + times, size + times * aval.size * aval.dtype.itemsize
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found = travelled(part, inner)
                count, size = count + found[0], size + found[1]
    return count, size


def sent(mask: Mask, devices: int, length: int = 512, *, backward: bool) -> tuple[int, int]:
    with jax.set_mesh(truth.mesh_of(MeshConfig(fsdp=8 // devices, context=devices))):
        x = jnp.zeros((8 // devices, length, 2, 4), out_sharding=Layout().queries)

        def forward(q, k, v):
            return attention(q, k, v, mask=mask)

        def both(q, k, v):
            o, pull_back = jax.vjp(forward, q, k, v)
            return pull_back(o)

        return travelled(jax.make_jaxpr(both if backward else forward)(x, x, x).jaxpr)


KEYS_AND_VALUES = 2


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_whole_ring_sends_keys_one_step_less_than_there_are_devices_and_their_gradients_home(devices: int):
    share = 512 // devices * 2 * 4 * 4  # positions, heads, width, bytes
    forward = sent(Mask(), devices, backward=False)
    assert forward == (KEYS_AND_VALUES * (devices - 1), KEYS_AND_VALUES * (devices - 1) * share)
    steps = (devices - 1) + (devices - 1) + devices
    assert sent(Mask(), devices, backward=True) == (KEYS_AND_VALUES * steps, KEYS_AND_VALUES * steps * share)


@pytest.mark.parametrize("devices", [4, 8])
def test_of_a_window_within_a_chunk_only_half_of_each_neighbours_keys_travels(devices: int):
    window, share = Mask(window=512 // devices // 2), 512 // devices * 2 * 4 * 4
    # From the neighbour on either side, half of its keys each.
    assert sent(window, devices, backward=False) == (KEYS_AND_VALUES * 2, KEYS_AND_VALUES * share)
    assert sent(window, devices, backward=True) == (3 * KEYS_AND_VALUES * 2, 3 * KEYS_AND_VALUES * share)


def test_nothing_travels_where_no_chunk_of_attention_reaches_beyond_a_piece():
    assert sent(Mask(chunk=64), 4, backward=True) == (0, 0)


def plan(mask: Mask, devices: int, length: int, tile: int = 16) -> Plan:
    tiling = Tiling(length // devices // tile, tile, length // devices)
    return Ring(devices, tiling, tiling, mask).plan


def test_zigzag_gives_each_device_a_chunk_from_either_end():
    assert zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    for devices in (1, 3, 4):
        chunks = zigzag(24, devices).reshape(devices, 2, -1) // (24 // (2 * devices))
        assert chunks.min(axis=2).tolist() == [[i, 2 * devices - 1 - i] for i in range(devices)]
    with pytest.raises(ValueError, match="12 positions is not a multiple of 2 x 4"):
        zigzag(12, 4)


@pytest.mark.parametrize("devices", [2, 4, 16])
def test_under_a_causal_mask_every_device_does_equally_much_in_every_step(devices: int):
    n = 4  # tiles of a chunk
    found = plan(Mask(), devices, devices * 2 * n * 16)
    assert found.whole
    assert [step.counts for step in found.steps] == [(n * n + n * (n - 1), 2 * n), (2 * n * n, 0)]


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_steps_of_a_window_are_those_that_some_device_needs(chunks: int):
    devices, chunk = 16, 32
    # A query sees its own chunk and so many before it.
    found = plan(Mask(window=(chunks - 1) * chunk + 2), devices, devices * 2 * chunk)
    assert [step.shift for step in found.steps] == [*range(chunks + 1), *range(devices - chunks, devices)]
    assert plan(Mask(window=15 * chunk), devices, devices * 2 * chunk).whole


@pytest.mark.parametrize(
    ("heads", "n"), [((8, 8, 4), 1), ((8, 2, 4), 2), ((8, 1, 4), 4), ((12, 6, 4), 2), ((6, 2, 2), 1)]
)
def test_key_heads_are_repeated_as_little_as_devices_need(heads, n):
    assert repeats(*heads) == n


@pytest.mark.parametrize(
    ("keywords", "heads", "message"),
    [
        ({"context": "tree"}, 4, "'tree' is not one of ring, all_to_all"),
        ({"implementation": "reference"}, 4, "'reference' does not go with a ring"),
        ({"context": "all_to_all"}, 6, "6 query heads of a device are not a multiple of 4"),
        ({"q_offset_B": jnp.zeros(2, jnp.int32)}, 4, "cached decoding keeps rows whole"),
    ],
)
def test_what_does_not_go_over_shared_rows_is_refused_by_name(keywords, heads, message):
    x = jnp.zeros((2, 16, heads, 4))
    with jax.set_mesh(truth.mesh_of(FOUR)), pytest.raises(ValueError, match=message):
        attention(x, x, x, mask=Mask(), **keywords)
