"""Weights of others on a mesh of several processes: out of their files, and out of the run that an import made."""

from __future__ import annotations

import pytest

from maxlm.interop.huggingface import import_model
from tests.interop import public
from tests.processes import run_processes

MANY = """
import json, sys
from pathlib import Path
from maxlm.parallel import distributed
distributed.initialize(distributed.DistributedConfig(timeout_seconds=60))
import jax
import numpy as np
from maxlm.checkpoint import restore_params
from maxlm.interop.files import TensorFiles
from maxlm.interop.placing import leaf, read_params
from maxlm.models.config import PrecisionConfig
from maxlm.models.families import family_of
from maxlm.models.transformer import Model
from maxlm.parallel.mesh import MeshConfig, make_mesh

theirs, run_dir = map(Path, sys.argv[1:])
assert jax.process_count() == 2 and len(jax.local_devices()) == 2
files, config_json = TensorFiles(theirs), json.loads((theirs / "config.json").read_text())
family = family_of(config_json, "config.json")
config = family.from_hf_config(config_json, "config.json")
mesh, whole = make_mesh(MeshConfig(fsdp=2, tensor=2)), {}
with jax.set_mesh(mesh):
    abstract = Model(config, PrecisionConfig(compute="float32")).abstract_params(mesh)
    found = read_params(files.read, family, config, abstract)
    restored = restore_params(run_dir / "checkpoints", abstract)[0]
for tensor in family.tensors(config).values():
    for path, array in zip(tensor.ours, tensor.weight.read(files.read(tensor.name), config), strict=True):
        target = whole.setdefault(path, np.zeros(leaf(abstract, path).shape, np.float32))[tensor.index]
        target[tuple(slice(size) for size in array.shape)] = array
cut = 0
for params in (found, restored):
    for path, expected in whole.items():
        array = leaf(params, path)
        assert array.sharding == leaf(abstract, path).sharding, path
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index], err_msg=path)
        cut += array.addressable_shards[0].data.size < array.size
    assert len(jax.tree.leaves(params)) == len(whole)
print("cut", cut)
"""


@pytest.mark.processes
def test_two_processes_get_their_parts_of_the_files_and_of_an_imported_run(tmp_path):
    theirs = public.write_folder(tmp_path / "theirs", public.CASES["llama"])
    import_model(theirs, tmp_path / "run")
    for result in run_processes(2, ["-c", MANY, theirs, tmp_path / "run"], devices_per_process=2, timeout=240):
        # All but the scales of norms, of both.
        assert int(result.stdout.split()[-1]) >= 16
