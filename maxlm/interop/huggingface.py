"""Runs to folders that `transformers` loads, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

import maxlm
from maxlm.data.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer
from maxlm.errors import ConfigError, DataError
from maxlm.inference.load import LoadedRun, inference_mesh, load_run
from maxlm.interop.files import (
    DTYPES,
    FORMATS,
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
from maxlm.interop.placing import leaf, read_params
from maxlm.models.config import ModelConfig
from maxlm.models.families import Family, family_for, family_of
from maxlm.models.families.table import Tensor
from maxlm.models.transfer import folded
from maxlm.models.transformer import Model, Params

if TYPE_CHECKING:
    from maxlm.config import RunConfig

MAX_SHARD_BYTES = 5_000_000_000
# Number format of weights on import, by what all tensors of the files are; else float32, which holds them all.
DTYPE_OF = {frozenset({"BF16"}): "bfloat16"}
ROWS_COMPARED = 1024
IMPORTED = """\
# A Hugging Face model, read by `maxlm import`. Its files do not say how it was trained: what stands under train,
# optimizer and schedule is the least that a config needs.
"""


def export_run(run_dir: str | Path, out: str | Path, dtype: str = "float32", step: int | None = None) -> None:
    """Writes the model of a run at `step`, or at its newest intact checkpoint, as a folder for `transformers`.

    Raises ConfigError where no family is equal to the model, StorageError where `out` holds something already.
    """
    _check_dtype(dtype)
    config, tokenizer, load = load_for_export(run_dir, out, step)
    run = load()
    with jax.set_mesh(run.mesh):
        export_params(config.model, run.params, out, tokenizer, dtype)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: for transformers weights are written as {', '.join(DTYPES)}")


def load_for_export(
    run_dir: str | Path, out: str | Path, step: int | None
) -> tuple[RunConfig, Tokenizer | None, Callable[[], LoadedRun]]:
    """A run's config, its tokenizer, and what loads its weights, when all that can be refused before that has been.

    Raises ConfigError where no family is equal to the model or the tokenizer is of another, StorageError where `out`
    holds something already.
    """
    from maxlm.config import load_config

    config = load_config(Path(run_dir) / "config.yaml")
    family_for(config.model)
    if config.objective.kind == "prefix_lm":
        raise ConfigError(
            "data.objective.kind = 'prefix_lm': this model was trained to see prompts both ways, and transformers and "
            "llama.cpp would run it as one that sees them from left to right; sample it with maxlm generate"
        )
    refuse_existing(Path(out))
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer.path is not None else None
    check_tokenizer(tokenizer, config.model)
    return config, tokenizer, partial(load_run, run_dir, step)


def check_tokenizer(tokenizer: Tokenizer | None, config: ModelConfig) -> None:
    """Raises ConfigError where the tokenizer has more tokens than the model."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{tokenizer.origin} has {tokenizer.vocab_size} tokens and model.vocab_size is {config.vocab_size}: "
            "the tokenizer is of another model"
        )


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
    _check_dtype(dtype)
    check_tokenizer(tokenizer, config)
    ids = {name: getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    files = tokenizer.files() if tokenizer is not None else {}
    files["config.json"] = to_json(family.to_hf_config(config, dtype=dtype, special_ids=ids))
    # Where this file is, transformers does not look for them in config.json.
    starts = {"decoder_start": config.decoder_start_id} if config.kind == "encoder_decoder" else {}
    generation = {f"{name}_token_id": i for name, i in (ids | starts).items() if i is not None}
    files["generation_config.json"] = to_json(generation)
    specs = [
        TensorSpec(name, tensor.weight.shape(config), dtype, partial(_tensor, tensor, config, params, dtype))
        for name, tensor in family.tensors(config).items()
    ]
    with new_folder(out) as folder:
        write_shards(folder, specs, max_shard_bytes)
        for name, content in sorted(files.items()):
            write_synced(folder / name, content)


def to_host(tensor: Tensor, config: ModelConfig, params: Params) -> np.ndarray:
    """A tensor of the files, from the devices, in the format of the parameters, or float32 where `model.transfer` is
    multiplied into it."""
    arrays = [_part_of(leaf(params, path), tensor.index) for path in tensor.ours]
    arrays = [np.asarray(jax.device_get(array)) for array in arrays]
    return tensor.weight.export([_folded(a, path, config) for a, path in zip(arrays, tensor.ours, strict=True)], config)


def _folded(array: np.ndarray, path: str, config: ModelConfig) -> np.ndarray:
    """A weight of a model that is equal to this one and has no transfer."""
    if (factor := folded(config, path)) == 1:
        return array
    array, norm_scale = array.astype(np.float32), path.endswith("norm.scale") and config.norm_unit_offset
    return (1 + array) * factor - 1 if norm_scale else array * factor


def _tensor(tensor: Tensor, config: ModelConfig, params: Params, dtype: str) -> np.ndarray:
    found = to_host(tensor, config, params)
    with np.errstate(over="ignore"):
        cast = found.astype(DTYPES[dtype], copy=False)
    if dtype == "float16" and np.isinf(cast).any() and not np.isinf(found).any():
        largest = np.abs(found).max()
        raise ConfigError(f"{tensor.name} has a weight of {largest:g}, too large for float16; export as bfloat16")
    return cast


@jax.jit
def _part_of(stacked: jax.Array, index: tuple[int, ...]) -> jax.Array:
    rest = stacked.shape[len(index) :]
    part = jax.lax.dynamic_slice(stacked, (*index, *(0 for _ in rest)), (*(1 for _ in index), *rest))
    return part.reshape(rest)


def import_model(model_dir: str | Path, out: str | Path, dtype: str | None = None) -> None:
    """Reads a Hugging Face model's folder into a run's folder: config.yaml, checkpoint of step 0, tokenizer.

    `dtype` is the format of the parameters and of compute, float32 or bfloat16; where not given, bfloat16 where all
    tensors of the files are, else float32. On the host there is at most one tensor, whatever the size of the model.

    The checkpoint holds parameters alone, to sample from and to export again; there is no optimizer's state to go on
    training from. Of the tokenizer, ids, special tokens and the chat template are kept.

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
    files = TensorFiles(source)
    config = family.as_filed(config, files.files)
    names = _checked_names(files, family, config)
    dtype = dtype or DTYPE_OF.get(frozenset(files.dtype(name) for name in names.values()), "float32")
    run = _run_config(config, out, tokenizer is not None, dtype)
    mesh = inference_mesh(config)
    with new_folder(out) as folder, jax.set_mesh(mesh):
        abstract = Model(run.model, run.precision).abstract_params(mesh)
        params = read_params(lambda name: files.read(names[name]), family, config, abstract)
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
        _check_copy(files, names.pop(family.head), names.get(family.embedding), "tie_word_embeddings = true")
    for pattern, first in family.copies.items():
        for full in [full for full in names if re.fullmatch(pattern, full)]:
            _check_copy(
                files, names.pop(full), names.get(first), f"model_type = {family.model_type}, where they are one"
            )
    expected = {name: tensor.weight.shape(config) for name, tensor in tensors.items()}
    problems = named_differences({full: files.shape(name) for full, name in names.items()}, expected)
    for name in names.values():
        if files.dtype(name) not in FORMATS:
            problems.append(f"{name} is of {files.dtype(name)}; weights are read as F32, BF16 or F16")
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(
            f"{files.folder}: the tensors are not those of a {family.model_type} model of this config.json:\n  "
            + "\n  ".join(problems[:10])
            + more
        )
    return names


def _check_copy(files: TensorFiles, name: str, first: str | None, because: str) -> None:
    """Some files hold a tensor a second time. It is left out; that it is the same is not taken on trust."""
    if first is not None and not _equal(files.read(name), files.read(first)):
        raise DataError(
            f"{files.where(name)}: {name} is not {first}, and config.json says {because}; one of them is wrong"
        )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors are one, without either of them whole in memory."""
    rows = range(0, len(a), ROWS_COMPARED)
    return a.shape == b.shape and all(np.array_equal(a[i : i + ROWS_COMPARED], b[i : i + ROWS_COMPARED]) for i in rows)


def _run_config(config: ModelConfig, out: Path, has_tokenizer: bool, dtype: str) -> RunConfig:
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
            "precision": {"parameters": dtype, "compute": dtype},
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
