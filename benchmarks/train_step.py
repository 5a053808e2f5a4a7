"""Times a config's training step on the present devices, on synthetic tokens, and prints JSON.

    python benchmarks/train_step.py CONFIG [key=value ...] [--devices N] [--steps N]

CONFIG is a preset or a YAML file; `--devices N` simulates N devices on the CPU. The step is the one that `maxlm train`
runs. Printed: tokens/s and step time (median over the steps after the first), model FLOP/s and MFU, the peak resident
memory of the process, the peak memory of its fullest device (on a CPU, the process's), the compiler's memory figures
a device, and the seconds from the start of the process to the end of the first step.
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--devices", type=int, help="simulate so many devices on the CPU")
    parser.add_argument("--steps", type=int, default=10, help="steps to time, after the first")
    args = parser.parse_intermixed_args()
    if args.devices:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
        )
    print(json.dumps(measure(args.config, args.overrides, args.steps), indent=1))


def measure(path: str, overrides: list[str], steps: int) -> dict:
    """Runs one step, then `steps` more, each waited for."""
    import jax
    import numpy as np

    from maxlm.config import load_config
    from maxlm.models.flops import count_parameters, training_flops_per_token
    from maxlm.parallel.mesh import make_mesh
    from maxlm.planning.hardware import peak_flops_per_device
    from maxlm.training.metrics import peak_memory_bytes
    from maxlm.training.program import Program

    config = load_config(path, overrides)
    mesh = make_mesh(config.mesh)
    program = Program(config, mesh)
    tokens = config.train.global_batch_tokens
    with jax.set_mesh(mesh):
        state = program.init_state()
        compiled = program.train_step().lower(program.abstract_state, program.abstract_batch).compile()
        batch = synthetic_batch(program, np.random.default_rng(0))
        seconds = []
        for i in range(steps + 1):
            begin = time.perf_counter()
            state, metrics = compiled(state, batch)
            loss = float(metrics["loss"])
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - begin)
            if i == 0:
                first_step = time.perf_counter() - START
    median = statistics.median(seconds[1:])
    flops = training_flops_per_token(config.model, config.train.seq_len) * tokens
    memory = compiled.memory_analysis()
    peak, meaning = peak_flops_per_device(mesh.devices.flatten().tolist(), config.precision.compute)
    return {
        "config": config.name,
        "overrides": overrides,
        "parameters": count_parameters(config.model).total,
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "compute": config.precision.compute,
        "tokens_per_step": tokens,
        "step_seconds": {"median": median, "min": min(seconds[1:]), "max": max(seconds[1:])},
        "tokens_per_second": tokens / median,
        "model_flops_per_second": flops / median,
        "mfu": flops / median / (peak * mesh.size) if peak else None,
        "mfu_is_over_the": meaning,
        "first_step_seconds_from_start": first_step,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "peak_memory_gb": peak_memory_bytes() / 1e9,
        "compiled_bytes_per_device": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        "last_loss": loss,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def synthetic_batch(program, rng) -> dict:
    """Random tokens, one document a row."""
    import jax
    import numpy as np

    rows, length = program.rows, program.config.train.seq_len
    tokens = rng.integers(0, program.config.model.vocab_size, (rows, length + 1), dtype=np.int32)
    arrays = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "weights": np.ones((rows, length), np.float32),
    }
    return {name: jax.device_put(value, program.batch_sharding) for name, value in arrays.items()}


if __name__ == "__main__":
    main()
