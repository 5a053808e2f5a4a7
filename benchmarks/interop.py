"""Measures import, export and decoding of a model, beside transformers' own on the same machine.

    python benchmarks/interop.py                                   # the shape of configs/llama-1b, random weights
    python benchmarks/interop.py llama-150m --dtype float32 --prompt 256 --new 32 --out benchmarks/results/interop.json

Import and export are in GB/s of the model's files: ours reads one and writes a checkpoint, or the other way round, and
all of it is on the disk at the end; transformers' reads files into memory (`from_pretrained`), and writes them
(`save_pretrained`, then a sync). Beside them what the disk takes of plain writing. Prefill is the time of the prompt
and one token; decoding, the tokens after it, one by one. Without torch transformers' part is left out.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import numpy as np

from maxlm.config import load_config
from maxlm.console import print_table
from maxlm.inference.generate import generate
from maxlm.inference.load import load_run
from maxlm.inference.sampling import Sampling
from maxlm.interop.files import DTYPES, SINGLE, TensorSpec, to_json, write_safetensors
from maxlm.interop.huggingface import export_run, import_model
from maxlm.models.config import ModelConfig
from maxlm.models.families import family_for

REPEATS = 3


def write_model(folder: Path, config: ModelConfig, dtype: str) -> float:
    """A model's folder with random weights, as transformers would have it; its gigabytes."""
    family, rng = family_for(config), np.random.default_rng(0)
    noise = (rng.standard_normal(1 << 20) * 0.02).astype(DTYPES[dtype])

    def make(shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape, DTYPES[dtype]) if len(shape) == 1 else np.resize(noise, shape)

    specs = [
        TensorSpec(name, shape, dtype, lambda shape=shape: make(shape))
        for name, shape in ((name, tensor.weight.shape(config)) for name, tensor in family.tensors(config).items())
    ]
    folder.mkdir()
    write_safetensors(folder / SINGLE, specs)
    (folder / "config.json").write_bytes(to_json(family.to_hf_config(config, dtype=dtype, special_ids={})))
    return sum(spec.n_bytes for spec in specs) / 1e9


def timed(run) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rates(one_and_many, prompt: int, new: int) -> dict[str, float]:
    """Tokens a second from what makes a number of new tokens: prefill, and decoding alone; the best of `REPEATS`."""
    one_and_many(1)
    one_and_many(new)  # compiled
    pairs = [(timed(lambda: one_and_many(1)), timed(lambda: one_and_many(new))) for _ in range(REPEATS)]
    first = min(one for one, _ in pairs)
    many = min(whole for _, whole in pairs)
    return {"prefill_tokens_per_second": prompt / first, "decode_tokens_per_second": (new - 1) / (many - first)}


def ours(run_dir: Path, ids: np.ndarray, new: int) -> dict[str, float]:
    """Our rates."""
    run = load_run(run_dir)

    def make(n: int) -> None:
        generate(
            run.model, run.params, ids.tolist(), max_tokens=n, sampling=Sampling(0.0), eos_id=None, seed=0
        )  # fmt: skip

    with jax.set_mesh(run.mesh):
        return rates(make, ids.size, new)


def theirs(folder: Path, size: float, ids: np.ndarray, new: int, dtype: str) -> dict[str, float] | None:
    """transformers' rates, for a model of `size` GB in `folder`."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None

    def load():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        for weight in model.parameters():
            weight.data = weight.data.clone()  # else they are pages of the file that nobody has read yet
        return model

    start = time.perf_counter()
    model = load()
    loaded = time.perf_counter() - start
    saved = timed(lambda: (model.save_pretrained(folder.parent / "saved"), os.sync()))
    inputs = torch.from_numpy(ids)

    def make(n: int) -> None:
        with torch.no_grad():
            model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip

    files = {"import_gigabytes_per_second": size / loaded, "export_gigabytes_per_second": size / saved}
    return files | rates(make, ids.size, new)


def written(path: Path, size: float) -> float:
    """GB/s of plain writing to the disk, synced."""
    piece = np.random.default_rng(2).bytes(1 << 24)

    def write() -> None:
        with open(path, "wb") as file:
            for _ in range(round(size * 1e9 / len(piece))):
                file.write(piece)
            os.fsync(file.fileno())

    seconds = timed(write)
    path.unlink()
    return size / seconds


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Every figure."""
    model = load_config(args.config).model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder / "theirs", model, args.dtype)
        seconds = {
            "import": timed(lambda: import_model(folder / "theirs", folder / "run")),
            "export": timed(lambda: export_run(folder / "run", folder / "out", args.dtype)),
        }
        ids = np.random.default_rng(1).integers(0, model.vocab_size, (args.rows, args.prompt))
        found = {
            "gigabytes": size,
            "disk_write_gigabytes_per_second": written(folder / "plain", size),
            "ours": {f"{what}_gigabytes_per_second": size / took for what, took in seconds.items()}
            | ours(folder / "run", ids, args.new),
        }
        found["transformers"] = theirs(folder / "out", size, ids, args.new, args.dtype)
    return found


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Prints a table, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="llama-1b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=17)
    parser.add_argument("--note", help="what else is to be known, such as other work on the machine")
    parser.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    found = measure(args)
    rows = [
        {
            "what": name.replace("_gigabytes_per_second", " GB/s").replace("_tokens_per_second", " tokens/s"),
            "maxlm": value,
            "transformers": (found["transformers"] or {}).get(name),
        }
        for name, value in found["ours"].items()
    ]
    print_table(rows, False)
    print(f"the disk takes {found['disk_write_gigabytes_per_second']:.2f} GB/s of plain writing")
    if args.out:
        packages = ("jax", "jaxlib", "numpy", "safetensors", "torch", "transformers")
        about = {
            "date": date.today().isoformat(),
            "command": "python " + " ".join(sys.argv),
            "note": args.note,
            "machine": f"{jax.devices()[0].device_kind}, {platform.machine()}",
            "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
        }
        args.out.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
