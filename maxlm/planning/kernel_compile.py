"""One Pallas kernel compiled for a TPU that is not here, in a process of its own: `kernel_report` starts it.

The compiler reads where to dump its schedules once, when it is loaded; hence the process. It prints one line of JSON:
the kernels of the compiled program, or what was wrong with the request.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from maxlm.planning.topology import parse_topology

_KERNEL = re.compile(r'^\s*(?:ROOT )?%(\S+) = .*custom_call_target="tpu_custom_call"', re.MULTILINE)


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles what is asked for: `kernel`, `topology` and the shape's fields. `{"error": ...}` where it cannot be."""
    from maxlm.planning.compile import topology_devices

    devices = topology_devices(parse_topology(request["topology"]))
    import jax
    import jax.numpy as jnp

    from maxlm.kernels.attention import attention
    from maxlm.kernels.masks import Mask
    from maxlm.parallel.axes import activation_spec
    from maxlm.parallel.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(fsdp=1), devices[:1])

    def array(dtype: str, shape: tuple[int, ...], *logical: str | None) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(mesh, activation_spec(*logical))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    shape = request["shape"]
    B, T, dtype = shape["batch"], shape["seq_len"], shape["dtype"]
    q = array(dtype, (B, T, shape["heads"], shape["head_dim"]), "batch", "length", "heads", None)
    k = array(dtype, (B, T, shape["kv_heads"], shape["head_dim"]), "batch", "length", "kv_heads", None)
    segments = array("int32", (B, T), "batch", "length")

    def run(q, k, v, segments):
        return attention(q, k, v, mask=Mask(), segments_BT=segments, implementation="pallas")

    # As training runs it: forward saves what backward needs.
    def forward(q, k, v, segments):
        return jax.vjp(lambda q, k, v: run(q, k, v, segments), q, k, v)[0]

    def backward(q, k, v, segments, do):
        return jax.vjp(lambda q, k, v: run(q, k, v, segments), q, k, v)[1](do)

    is_backward = request["kernel"] == "attention-backward"
    function, arguments = (backward, (q, k, k, segments, q)) if is_backward else (forward, (q, k, k, segments))
    with jax.set_mesh(mesh):
        try:
            lowered = jax.jit(function).lower(*arguments)
        except ValueError as error:
            return {"error": str(error)}
        text = lowered.compile().as_text() or ""
    found = kernels_of(text)
    return {"kernels": [kernel for kernel in found if kernel["backward"] == is_backward]}


def kernels_of(text: str) -> list[dict[str, Any]]:
    """The Pallas kernels of a compiled module's text: name, settings that its author noted, and whether of backward."""
    found = []
    for match in _KERNEL.finditer(text):
        # The kernel's notes have line breaks: its instruction ends with the metadata, lines further down.
        instruction = text[match.start() : text.find("backend_config=", match.end())]
        noted = re.search(r'"xprof_metadata":"(\{.*?\})"', instruction, re.DOTALL)
        op_name = re.search(r'op_name="([^"]*)"', instruction)
        found.append(
            {
                "name": match[1],
                "settings": json.loads(noted[1].replace('\\"', '"')) if noted else {},
                "backward": bool(op_name and "transpose(" in op_name[1]),
            }
        )
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
