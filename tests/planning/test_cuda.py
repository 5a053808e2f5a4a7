"""GPUs that are not here: what the compiler is told of them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from maxlm.errors import ConfigError
from maxlm.planning.cuda import TARGETS, target_config
from maxlm.planning.hardware import CHIPS
from maxlm.planning.topology import parse_topology

GPUS = [chip for chip in CHIPS if chip.platform == "gpu"]


def field(text: str, name: str) -> float:
    return float(re.search(rf"\b{name}: ([\d.]+)", text).group(1))


@pytest.mark.parametrize("chip", GPUS, ids=lambda chip: chip.name)
def test_every_gpu_of_the_hardware_table_is_described_and_its_figures_are_near_the_data_sheets(chip):
    text = target_config(parse_topology(f"{chip.name}:1x8"))
    # The data sheet rounds the bandwidth (8 TB/s for 7.67); memory is 80 or 141 "GB" of up to 2^30 bytes.
    assert field(text, "memory_bandwidth") == pytest.approx(chip.hbm_bytes_per_s, rel=0.05)
    assert 1.0 <= field(text, "device_memory_size") / chip.hbm_bytes <= 2**30 / 10**9
    assert f'device_description_str: "{chip.device_kinds[0]}"' in text


@pytest.mark.parametrize("chip", GPUS, ids=lambda chip: chip.name)
def test_lanes_and_clock_give_the_published_float32_rate(chip):
    target = TARGETS[chip.name]
    rate = 2 * target.cores * target.lanes_per_core * target.clock_ghz * 1e9
    # The B200's sheet gives 80 TFLOP/s for a GPU of the 1 kW board, 7% above what its clock limit makes.
    assert rate == pytest.approx(chip.peak_flops["float32"], rel=0.08)


def test_nvlinks_give_the_published_rate_both_ways():
    bytes_per_s = {8: 50e9, 9: 50e9, 10: 100e9}  # a link of NVLink 3, 4 and 5, both directions
    for chip in GPUS:
        target = TARGETS[chip.name]
        assert target.links * bytes_per_s[target.capability] == chip.ici_bytes_per_s


def test_a_tpu_is_not_described_and_the_error_names_what_is():
    with pytest.raises(ConfigError, match=r"no description of v5p.*H100, H200, B200"):
        target_config(parse_topology("v5p:2x2x2"))


COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from maxlm.planning.cuda import cuda_topology_devices
from maxlm.planning.hardware import chip_of
from maxlm.planning.topology import parse_topology

devices = cuda_topology_devices(parse_topology(sys.argv[1]))
mesh = jax.sharding.Mesh(np.array(devices), ("a",))
x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("a")))
compiled = jax.jit(lambda x: jnp.tanh(x.T @ x)).lower(x).compile()
print(json.dumps({
    "chip": chip_of(devices[0]).name,
    "capability": devices[0].compute_capability,
    "hosts": [device.process_index for device in devices],
    "arguments": compiled.memory_analysis().argument_size_in_bytes,
    "text": compiled.as_text(),
}))
"""


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the cuda12 extra")
@pytest.mark.parametrize(
    ("name", "chip", "capability"),
    [("h100:2x8", "H100", "9.0"), ("h200:2x8", "H200", "9.0"), ("b200:2x8", "B200", "10.0")],
)
def test_a_program_compiles_for_gpus_that_are_not_here(name, chip, capability):
    # In a process of its own whose JAX has not been told its platforms, as under `maxlm plan`.
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, name], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["chip"], told["capability"]) == (chip, capability)
    assert told["hosts"] == [0] * 8 + [1] * 8
    assert told["arguments"] == 1024 * 512 * 2 // 16
    assert "all-reduce-start(" in told["text"]
