"""Large models through small hosts: what import and export hold beside the parameters, and where these end up."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from maxlm.interop import placing
from maxlm.interop.files import SINGLE, TensorSpec, write_safetensors
from maxlm.interop.placing import leaf, read_params
from maxlm.models.config import PrecisionConfig
from maxlm.models.families import family_of
from maxlm.models.transformer import Model
from maxlm.parallel.mesh import MeshConfig, make_mesh
from tests.interop import public

# Tensors of 4 MiB, 24 of them stacked in one of our arrays: 97 MiB.
LARGE = {
    **public.LLAMA_CONFIG, "hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 24, "head_dim": 64,
    "vocab_size": 4096, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
TENSOR = 4 * 256 * 4096

# Runs in a process of its own: the most memory that reading and writing hold beyond what was there before, in bytes.
# Pages of a mapped file count while they are mapped, as everything else; what is freed goes back at once.
MEASURE = """
import gc, json, sys
from pathlib import Path
import jax
from maxlm.inference.load import inference_mesh
from maxlm.interop.files import TensorFiles
from maxlm.interop.huggingface import export_params, import_model
from maxlm.interop.placing import read_params
from maxlm.models.config import PrecisionConfig
from maxlm.models.families import family_of
from maxlm.models.transformer import Model
from maxlm.parallel.mesh import MeshConfig, make_mesh
from maxlm.models.transformer import Model

def memory(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024

def growth(run):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory("VmRSS:")
    result = run()
    return result, memory("VmHWM:") - before

folder, out = map(Path, sys.argv[1:])
theirs = json.loads((folder / "config.json").read_text())
family = family_of(theirs, "config.json")
config = family.from_hf_config(theirs, "config.json")
mesh = inference_mesh(config)
precision = PrecisionConfig(parameters="float32", compute="float32")
with jax.set_mesh(mesh):
    abstract = Model(config, precision).abstract_params(mesh)
    files = TensorFiles(folder)
    read = lambda: jax.block_until_ready(read_params(files.read, family, config, abstract))
    export = lambda: export_params(config, params, out, None, "bfloat16")
    read()  # compiles what it needs
    params, reading = growth(read)
    _, writing = growth(export)
parameters = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"parameters": parameters, "reading": reading, "writing": writing}))
"""


@pytest.mark.processes
def test_beside_the_parameters_import_and_export_hold_a_few_tensors_and_not_a_stack_of_them(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(LARGE))
    family = family_of(LARGE, "config.json")
    config = family.from_hf_config(LARGE, "config.json")
    specs = [
        TensorSpec(name, shape, "float32", lambda shape=shape: np.full(shape, 0.5, np.float32))
        for name, shape in ((name, tensor.weight.shape(config)) for name, tensor in family.tensors(config).items())
    ]
    write_safetensors(theirs / SINGLE, specs)
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, theirs, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "XLA_FLAGS": "", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["parameters"] > 70 * TENSOR
    # A tensor of the file, the part of it for the device, and it there; a stack is 24 tensors.
    assert found["reading"] < found["parameters"] + 6 * TENSOR, found
    assert found["writing"] < 8 * TENSOR, found


MESHES = {
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor 2 x fsdp 4": {"tensor": 2, "fsdp": 4},
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", ["llama", "gpt_neox", "gpt2"])
def test_each_device_gets_its_part(mesh, model, tmp_path):
    theirs = (
        {**public.CASES[model], "num_attention_heads": 4, "rotary_pct": 0.5}
        if model == "gpt_neox"
        else public.CASES[model]
    )
    family = family_of(theirs, "config.json")
    config = family.from_hf_config(theirs, "config.json")
    rng, tensors = np.random.default_rng(0), family.tensors(config)
    shapes = {name: tensor.weight.shape(config) for name, tensor in tensors.items()}
    stored = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    here = make_mesh(MeshConfig(**MESHES[mesh]), jax.devices())
    with jax.set_mesh(here):
        abstract = Model(config, PrecisionConfig(compute="float32")).abstract_params(here)
        params = read_params(stored.__getitem__, family, config, abstract)
    for tensor in tensors.values():
        for number, path in enumerate(tensor.ours):
            whole, target = tensor.weight.read(stored[tensor.name], config)[number], leaf(abstract, path)
            found = leaf(params, path)
            assert found.sharding == target.sharding
            assert (found.shape, found.dtype) == (target.shape, target.dtype)
            found = np.asarray(found)[tensor.index]
            np.testing.assert_array_equal(found[: len(whole)], whole)
            assert not found[len(whole) :].any()  # the vocabulary's padding


def test_of_a_tensor_only_the_devices_own_rows_and_columns_are_asked_for():
    theirs = public.CASES["llama"]
    family = family_of(theirs, "config.json")
    config = family.from_hf_config(theirs, "config.json")
    tensors = [t for t in family.tensors(config).values() if t.name.endswith("mlp.gate_proj.weight")]
    asked = []

    class File:
        def __getitem__(self, box):
            asked.append(box)
            return np.ones([axis.stop - axis.start for axis in box], np.float32)

    # The quarter of the second layer's gate that a device of fsdp 2 x tensor 2 holds.
    bounds = ((24, 48), (0, 40))
    part = placing._part(lambda tensor: File(), tensors[1:2], 1, (48, 80), np.dtype(np.float32), bounds)
    assert asked == [(slice(24, 48), slice(0, 40))]
    assert part.shape == (24, 40)
    assert part.all()
