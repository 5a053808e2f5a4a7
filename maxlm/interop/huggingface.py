"""Runs to folders that `transformers` loads, and back."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import maxlm
from maxlm.data.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer
from maxlm.errors import ConfigError, DataError
from maxlm.inference.load import inference_mesh, load_run
from maxlm.interop.files import (
    DTYPES,
    TensorFiles,
    TensorSpec,
    named_differences,
    new_folder,
    read_json,
    refuse_existing,
    to_json,
    write_shards,
    write_synced,
)
from maxlm.models.config import ModelConfig
from maxlm.models.families import Family, family_for, family_of
from maxlm.models.families.table import Tensor
from maxlm.models.transformer import Model, Params

if TYPE_CHECKING:
    from maxlm.config import RunConfig

MAX_SHARD_BYTES = 5_000_000_000
# Number formats of weights on import, by what all tensors of the files are: (parameters, compute).
PRECISIONS = {frozenset({"BF16"}): ("bfloat16", "bfloat16")}
IMPORTED = """\
# A Hugging Face model, read by `maxlm import`. Its files do not say how it was trained: what stands under train,
# optimizer and schedule is the least that a config needs.
"""


def export_run(run_dir: str | Path, out: str | Path, dtype: str = "float32", step: int | None = None) -> None:
    """Writes the model of a run at `step`, or at its newest intact checkpoint, as a folder for `transformers`.

    Raises ConfigError where no family is equal to the model, StorageError where `out` holds something already.
    """
    from maxlm.config import load_config

    config = load_config(Path(run_dir) / "config.yaml")
    family_for(config.model)
    refuse_existing(Path(out))
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer.path is not None else None
    run = load_run(run_dir, step)
    with jax.set_mesh(run.mesh):
        export_params(config.model, run.params, out, tokenizer, dtype)


def export_params(
    config: ModelConfig,
    params: Params,
    out: str | Path,
    tokenizer: Tokenizer | None,
    dtype: str = "float32",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes parameters as safetensors, with config.json, generation_config.json and the tokenizer's files.

    The same model gives the same bytes. On the host there is one tensor at a time, whatever the size of the model;
    `out` appears when all of it is written. Raises ConfigError where no family is equal to the model, where the
    tokenizer has more tokens than the model, or where a weight is too large for `dtype`; StorageError where `out`
    cannot be written.
    """
    out = Path(out)
    family = family_for(config)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: weights are written as {', '.join(DTYPES)}")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{tokenizer.origin} has {tokenizer.vocab_size} tokens and model.vocab_size is {config.vocab_size}: "
            "the tokenizer is of another model"
        )
    ids = {name: getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    files = tokenizer.files() if tokenizer is not None else {}
    files["config.json"] = to_json(family.to_hf_config(config, dtype=dtype, special_ids=ids))
    files["generation_config.json"] = to_json({f"{name}_token_id": i for name, i in ids.items() if i is not None})
    specs = [
        TensorSpec(name, tensor.weight.shape(config), dtype, partial(_tensor, tensor, config, params, dtype))
        for name, tensor in family.tensors(config).items()
    ]
    with new_folder(out) as folder:
        write_shards(folder, specs, max_shard_bytes)
        for name, content in sorted(files.items()):
            write_synced(folder / name, content)


def _tensor(tensor: Tensor, config: ModelConfig, params: Params, dtype: str) -> np.ndarray:
    """A tensor of the files, from the device to the host."""
    arrays = [_part_of(_leaf(params, path), tensor.index) for path in tensor.ours]
    found = tensor.weight.export([np.asarray(jax.device_get(array)) for array in arrays], config)
    with np.errstate(over="ignore"):
        cast = found.astype(DTYPES[dtype])
    if dtype == "float16" and np.isinf(cast).any() and not np.isinf(found).any():
        largest = np.abs(found).max()
        raise ConfigError(f"{tensor.name} has a weight of {largest:g}, too large for float16; export as bfloat16")
    return cast


@jax.jit
def _part_of(stacked: jax.Array, index: tuple[int, ...]) -> jax.Array:
    rest = stacked.shape[len(index) :]
    part = jax.lax.dynamic_slice(stacked, (*index, *(0 for _ in rest)), (*(1 for _ in index), *rest))
    return part.reshape(rest)


def import_model(model_dir: str | Path, out: str | Path) -> None:
    """Reads a Hugging Face model's folder into a run's folder: config.yaml, checkpoint of step 0, tokenizer.

    The checkpoint holds parameters alone, to sample from and to export again; there is no optimizer's state to go on
    training from. Of the tokenizer, ids and special tokens are kept, and not chat templates.

    Raises DataError where files are missing, damaged or not of the model that config.json says, ConfigError where that
    model has no equal here, StorageError where `out` holds something already or cannot be written.
    """
    source, out = Path(model_dir), Path(out)
    theirs = read_json(source / "config.json")
    origin = str(source / "config.json")
    family = family_of(theirs, origin)
    config = family.from_hf_config(theirs, origin)
    refuse_existing(out)
    tokenizer = _tokenizer_of(source, config)
    with TensorFiles(source) as files:
        names = _checked_names(files, family, config)
        parameters, compute = PRECISIONS.get(frozenset(files.dtype(n) for n in names.values()), ("float32", "float32"))
        run = _run_config(config, out, tokenizer is not None, parameters, compute)
        model = Model(run.model, run.precision)
        mesh = inference_mesh(config)
        with new_folder(out) as folder, jax.set_mesh(mesh):
            params = _read_params(files, names, family, config, model.abstract_params(mesh))
            _write_run(folder, run, params, tokenizer)


def _tokenizer_of(source: Path, config: ModelConfig) -> Tokenizer | None:
    if not any((source / name).is_file() for name in FILE_NAMES.values()):
        return None
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{tokenizer.origin} has {tokenizer.vocab_size} tokens, and config.json says vocab_size = "
            f"{config.vocab_size}: they are not of one model"
        )
    return tokenizer


def _checked_names(files: TensorFiles, family: Family, config: ModelConfig) -> dict[str, str]:
    """The name in the files of every tensor of the model. Raises DataError with all that is missing or unexpected."""
    tensors = family.tensors(config)
    names: dict[str, str] = {}
    for name in files.files:
        full = family.spell(name)
        known = full in tensors or full.startswith(family.prefix) or re.fullmatch(family.buffers, full)
        full = full if known else family.prefix + full
        full = name if name == family.head else full
        if full in names:
            raise DataError(f"{files.where(name)}: {name} is {names[full]} once more, under another name")
        if full in tensors or not re.fullmatch(family.buffers, full):
            names[full] = name
    if family.head not in tensors and family.head in names:
        _check_tied(files, names.pop(family.head), names.get(family.embedding))
    expected = {name: tensor.weight.shape(config) for name, tensor in tensors.items()}
    problems = named_differences({full: files.shape(name) for full, name in names.items()}, expected)
    for name in names.values():
        if files.dtype(name) not in ("F32", "F16", "BF16"):
            problems.append(f"{name} is of {files.dtype(name)}; weights are read as F32, BF16 or F16")
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(
            f"{files.folder}: the tensors are not those of a {family.model_type} model of this config.json:\n  "
            + "\n  ".join(problems[:10])
            + more
        )
    return names


def _check_tied(files: TensorFiles, head: str, embedding: str | None) -> None:
    """Some files hold the tied head a second time. It is left out; that it is the same is not taken on trust."""
    if embedding is not None and not np.array_equal(files.read(head), files.read(embedding)):
        raise DataError(
            f"{files.where(head)}: {head} is not {embedding}, and config.json says tie_word_embeddings = true; "
            "one of them is wrong"
        )


def _read_params(
    files: TensorFiles, names: dict[str, str], family: Family, config: ModelConfig, abstract: Params
) -> Params:
    """The parameters on the devices; on the host there is one at a time, or the few that are one tensor there."""
    params: Params = {}
    for paths, tensors in _together(family, config).items():
        targets = [_leaf(abstract, path) for path in paths]
        buffers = [np.empty(target.shape, target.dtype) for target in targets]
        for tensor in tensors:
            read = tensor.weight.read(files.read(names[tensor.name]), config)
            for buffer, array in zip(buffers, read, strict=True):
                buffer[tensor.index] = array
        for path, buffer, target in zip(paths, buffers, targets, strict=True):
            _put(params, path, jax.device_put(buffer, target.sharding))
    return params


def _together(family: Family, config: ModelConfig) -> dict[tuple[str, ...], list[Tensor]]:
    """The tensors that fill the same of our arrays."""
    found: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in family.tensors(config).values():
        found.setdefault(tensor.ours, []).append(tensor)
    return found


def _run_config(config: ModelConfig, out: Path, has_tokenizer: bool, parameters: str, compute: str) -> RunConfig:
    """The least run that the model can be of."""
    from maxlm.config import RunConfig

    name = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]", "", out.name) or "imported"
    return RunConfig.model_validate(
        {
            "name": name,
            "run_dir": str(out),
            "model": config,
            "tokenizer": {"path": str(out / "tokenizer") if has_tokenizer else None},
            "train": {"steps": 1, "seq_len": config.max_seq_len, "global_batch_tokens": config.max_seq_len},
            "optimizer": {"learning_rate": 1e-4},
            "precision": {"parameters": parameters, "compute": compute},
        }
    )


def _write_run(folder: Path, run: RunConfig, params: Params, tokenizer: Tokenizer | None) -> None:
    from maxlm.checkpoint import CheckpointConfig, Checkpoints
    from maxlm.config import to_yaml

    text = IMPORTED + to_yaml(run)
    meta = {"step": 0, "tokens": 0, "data": None, "maxlm": maxlm.__version__}
    with Checkpoints(folder / "checkpoints", CheckpointConfig(asynchronous=False)) as checkpoints:
        checkpoints.save(0, {"params": params}, meta=meta, config_yaml=text)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
    write_synced(folder / "config.yaml", text.encode())


def _leaf(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree[part]
    return tree


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value
