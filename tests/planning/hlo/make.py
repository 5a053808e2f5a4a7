"""Makes the compiled programs that the planner's tests read: `python tests/planning/hlo/make.py [NAME ...]`.

Each is the train step of a tiny model, compiled by libtpu (or by XLA's CUDA plugin, where the topology is of GPUs) for
chips that are not there. Kept are the compiler's text, packed, without the bodies of Pallas kernels and the folders of
this machine; and in fixtures.json what the compiler said of memory, with the size of its heap from its log.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MODEL = (
    "model.n_layers=2 model.d_model=256 model.n_heads=4 model.n_kv_heads=2 model.head_dim=128 model.d_ff=512 "
    "model.vocab_size=1024 train.seq_len=512"
)
REMAT = "model.remat.policy=full"
FIXTURES = {
    "fsdp-2-layers": ("v5e:2x2", f"mesh.fsdp=4 train.global_batch_tokens=8192 {REMAT}"),
    "fsdp-4-layers": ("v5e:2x2", f"mesh.fsdp=4 train.global_batch_tokens=8192 {REMAT} model.n_layers=4"),
    "fsdp-large-batch": ("v5e:2x2", f"mesh.fsdp=4 train.global_batch_tokens=65536 {REMAT}"),
    "fsdp-13-gib": ("v5e:2x2", "mesh.fsdp=4 train.global_batch_tokens=393216 model.d_ff=4096"),
    "tensor": ("v5e:2x2", "mesh.fsdp=2 mesh.tensor=2 train.global_batch_tokens=8192"),
    "fsdp-tensor": ("v5e:4x4", "mesh.fsdp=8 mesh.tensor=2 train.global_batch_tokens=131072"),
    "fsdp-tensor-v5p": (
        "v5p:2x2x2",
        f"mesh.fsdp=4 mesh.tensor=2 train.global_batch_tokens=65536 {REMAT} model.n_layers=3",
    ),
    "accumulation": (
        "v5e:2x2",
        f"mesh.fsdp=4 train.global_batch_tokens=16384 {REMAT} train.accumulation=2 model.n_layers=3",
    ),
    # Without its wraparound, as the topology should not be described: every gather becomes a padded all-reduce.
    "padded": (
        "v5p:4x4x4",
        f"mesh.fsdp=64 train.global_batch_tokens=32768 {REMAT} model.d_model=1024 model.n_heads=8 model.d_ff=2048",
    ),
    "two-slices": ("2*v5e:2x2", f"mesh.data=2 mesh.fsdp=4 train.global_batch_tokens=16384 {REMAT} model.n_layers=3"),
    "gpu": (
        "h100:2x8",
        "mesh.data=2 mesh.fsdp=8 train.global_batch_tokens=16384 model.n_layers=4 model.d_model=512 model.n_heads=8 "
        "model.n_kv_heads=4 model.head_dim=64 model.d_ff=1024",
    ),
}
# The fields of a target that XLA's CUDA compiler asks for, of an H100 SXM.
H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
  platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3" """
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "0",
    "TPU_MIN_LOG_LEVEL": "0",
}


def pack(text: str) -> bytes:
    """The text without kernels' code and this machine's folders, compressed the same way each time."""
    text = re.sub(r'"body":"[^"]*"', '"body":""', text)
    text = re.sub(r'^(\d+) "[^"]*/(site-packages|maxlm)/', r'\1 "/\2/', text, flags=re.M)
    text = re.sub(r'^(\d+) "/(?!site-packages/|maxlm/)[^"]*/', r'\1 "/', text, flags=re.M)
    return gzip.compress(text.encode(), 9, mtime=0)


def heap_of(log: str) -> int | None:
    """What libtpu set aside in HBM for temporaries, fragmentation included: "HLO temp 138.88M" of its log."""
    sizes = re.findall(r"HLO temp\s+([\d.]+)([KMG]?)B? ", log.partition("hbm requirement")[2])
    return round(float(sizes[0][0]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[sizes[0][1]]) if sizes else None


def describe(topology: str, settings: str, memory: dict, mesh: dict, log: str) -> dict:
    """A fixture's entry in fixtures.json."""
    return {"topology": topology, "settings": settings, "mesh": mesh, "memory": memory, "heap": heap_of(log)}


def compile_one(name: str, out: str) -> None:
    """In a process of its own, as libtpu logs to its stderr."""
    from jax import set_mesh
    from jax.experimental import topologies

    from maxlm.config import load_config
    from maxlm.parallel.mesh import make_mesh
    from maxlm.training.program import Program

    topology, settings = FIXTURES[name]
    if topology.startswith("h100"):
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="H100", target_config=H100, topology=topology.replace("h100:", "1x")
        )
    else:
        slices, _, topology = topology.rpartition("*")
        extra = {"chips_per_host_bounds": (2, 2, 1), "num_slices": int(slices or 1)}
        extra |= {"chip_config_name": "megacore"} if topology.startswith("v5p") else {}
        extra = extra if slices or topology.startswith("v5p") else {}
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra)
    config = load_config("llama-20m", f"{MODEL} {settings}".split())
    program = Program(config, make_mesh(config.mesh, described.devices))
    with set_mesh(program.mesh):
        compiled = program.train_step().lower(program.abstract_state, program.abstract_batch).compile()
    stats = compiled.memory_analysis()
    memory = {key: getattr(stats, key) for key in dir(stats) if key.endswith("_in_bytes") and getattr(stats, key)}
    Path(out).write_text(json.dumps({"text": compiled.as_text(), "memory": memory, "mesh": dict(program.mesh.shape)}))


def main(names: list[str]) -> None:
    """Makes the named fixtures, or all."""
    index = HERE / "fixtures.json"
    for name in names or FIXTURES:
        out = HERE / f"{name}.tmp"
        command = [sys.executable, __file__, "--compile", name, str(out)]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        log = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=True).stderr
        found = json.loads(out.read_text())
        out.unlink()
        (HERE / f"{name}.hlo.gz").write_bytes(pack(found["text"]))
        known = json.loads(index.read_text()) if index.exists() else {}
        known[name] = describe(*FIXTURES[name], found["memory"], found["mesh"], log)
        index.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")  # axes in the mesh's order


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_one(*sys.argv[2:4])
    else:
        main(sys.argv[1:])
