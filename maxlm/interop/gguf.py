"""Runs to GGUF files, which llama.cpp and what is built on it load.

GGUF's names come from the `gguf` package, which knows them by transformers' names; what llama.cpp has for each family
stands in `gguf_architectures.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.data.tokenizer import Tokenizer
from maxlm.errors import ConfigError
from maxlm.interop.files import new_file
from maxlm.interop.gguf_architectures import Architecture, architecture_for
from maxlm.interop.gguf_tokenizer import Vocabulary, vocabulary
from maxlm.interop.huggingface import check_tokenizer, load_for_export, to_host
from maxlm.models.config import ModelConfig
from maxlm.models.families import Family, family_for
from maxlm.models.families.table import Tensor
from maxlm.models.positions import rope_frequencies
from maxlm.models.transformer import Params

DTYPES = ("float32", "bfloat16", "float16", "q8_0")
Q8_0_BLOCK = 32


def export_run(run_dir: str | Path, out: str | Path, dtype: str = "float32", step: int | None = None) -> None:
    """Writes the model of a run at `step`, or at its newest intact checkpoint, as the GGUF file `out`.

    Raises ConfigError where llama.cpp has no equal of the model or the tokenizer, StorageError where `out` is there.
    """
    _check_dtype(dtype)
    config, tokenizer, load = load_for_export(run_dir, out, step)
    architecture_for(config.model)
    if tokenizer is not None:
        vocabulary(tokenizer, config.model.vocab_size)
    run = load()
    with jax.set_mesh(run.mesh):
        export_params(config.model, run.params, out, tokenizer, dtype, name=config.name)


def export_params(
    config: ModelConfig,
    params: Params,
    out: str | Path,
    tokenizer: Tokenizer | None,
    dtype: str = "float32",
    *,
    name: str = "maxlm",
) -> None:
    """Writes parameters and tokenizer as one GGUF file; `dtype` is that of matrices, all else and routers are float32.

    On the host there is one tensor at a time; of experts, one of all those of a layer. The same model gives the same
    bytes; `out` appears when all of it is written. `q8_0` is blocks of 32 eight-bit numbers with a float16 scale each;
    matrices whose rows are no multiple of 32 are float16 then. Raises ConfigError where llama.cpp has no equal of the
    model or the tokenizer, StorageError where `out` cannot be written.
    """
    gguf = _gguf()
    _check_dtype(dtype)
    architecture, family = architecture_for(config), family_for(config)
    check_tokenizer(tokenizer, config)
    vocab = vocabulary(tokenizer, config.vocab_size) if tokenizer is not None else None
    tensors = _named(architecture, family, config)
    with new_file(Path(out)) as path:
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
        try:
            writer.add_name(name)
            _add_model(writer, architecture, config)
            _add_file_type(writer, dtype)
            _add_tokenizer(writer, config, vocab, tokenizer)
            factors = _rope_factors(config)
            if factors is not None:
                writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
            formats = {name: _format(name, tensor.weight.shape(config), dtype) for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                _add_info(writer, name, tensor.weight.shape(config), formats[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            for name, tensor in tensors.items():
                array = to_host(tensor, config, params)
                for pattern, change in architecture.changes.items():
                    array = change(array, config) if re.search(pattern, tensor.name) else array
                writer.write_tensor_data(_as_stored(array, formats[name], tensor.name))
        finally:
            writer.close()


def _check_dtype(dtype: str) -> None:
    _gguf()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: GGUF is written as {', '.join(DTYPES)}")


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            'GGUF is written by the package gguf, which is not installed; install it with: pip install "maxlm[gguf]"'
        ) from None
    return gguf


def _named(architecture: Architecture, family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors by their names in GGUF, laid as there."""
    gguf = _gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name], config.n_layers)
    found: dict[str, Tensor] = {}
    tensors = [tensor for weight in architecture.weights(family) for tensor in weight.tensors(config)]
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        name = names.get_name(tensor.name.removeprefix(architecture.cut), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(f"{tensor.name} has no name in GGUF's architecture {architecture.name.lower()}")
        found[name] = tensor
    if architecture.needs_head and config.tied_embeddings:
        found["output.weight"] = found["token_embd.weight"]
    return found


def _format(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """How a tensor is stored."""
    if len(shape) == 1 or name == "position_embd.weight" or name.endswith((".bias", ".ffn_gate_inp.weight")):
        return "float32"
    return "float16" if dtype == "q8_0" and shape[-1] % Q8_0_BLOCK else dtype


def _type(stored: str) -> Any:
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
    return _gguf().GGMLQuantizationType[names[stored]]


def _add_info(writer: Any, name: str, shape: tuple[int, ...], stored: str) -> None:
    kind = _type(stored)
    if stored in ("float32", "float16"):
        format_ = np.dtype(stored)
        writer.add_tensor_info(name, shape, format_, int(np.prod(shape)) * format_.itemsize, raw_dtype=kind)
        return
    packed = _gguf().quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(np.prod(packed)), raw_dtype=kind)


def _as_stored(array: np.ndarray, stored: str, name: str) -> np.ndarray:
    if stored != "float16":
        return np.ascontiguousarray(_gguf().quantize(array.astype(np.float32, copy=False), _type(stored)))
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array.astype(np.float16))
    if np.isinf(cast).any():
        raise ConfigError(
            f"{name} has a weight of {np.abs(array).max():g}, too large for float16; choose another dtype"
        )
    return cast


def _add_model(writer: Any, architecture: Architecture, config: ModelConfig) -> None:
    """The sizes and numbers of the model."""
    context = config.max_seq_len
    if architecture.global_every is None and config.attention_window is not None:
        # It has no window there. Within the window attention sees everything, and all is equal.
        context = min(context, config.attention_window)
    writer.add_context_length(context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_vocab_size(config.vocab_size)
    if config.norm == "rms":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if config.positions == "rope":
        _add_rope(writer, config)
    architecture.numbers(writer, config)


def _add_rope(writer: Any, config: ModelConfig) -> None:
    gguf = _gguf()
    writer.add_rope_dimension_count(config.rope_width)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":  # which is a tensor of factors
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What llama.cpp divides RoPE's frequencies by, `[rope_width / 2]` float32, for Llama 3.1's scaling."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    plain, _ = rope_frequencies(config.model_copy(update={"rope_scaling": None}))
    return (plain / rope_frequencies(config)[0]).astype(np.float32)


def _add_file_type(writer: Any, dtype: str) -> None:
    gguf = _gguf()
    types = {"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[types[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: Any, config: ModelConfig, vocab: Vocabulary | None, tokenizer: Tokenizer | None) -> None:
    if vocab is None or tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    writer.add_add_bos_token(vocab.add_bos)
    writer.add_add_eos_token(False)
    for name in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{name}_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
