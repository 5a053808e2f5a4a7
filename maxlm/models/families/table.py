"""What a family of public models is: one table of weight names and one of config keys, each read in both directions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.moe_config import MoEConfig
from maxlm.models.stacks import LayerKind, places
from maxlm.models.transfer import unfoldable

# Keys of a Hugging Face config.json, of any family, that do not change what the model computes.
BOOKKEEPING = frozenset(
    [
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "task_specific_params",
        "_commit_hash",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
    ]
)

# Our keys that change how a model is trained or run, and not what it computes; and the kinds of layers, of which
# `Family.mixed` says.
NOT_OF_THE_WEIGHTS = (
    *("init_std", "residual_init_scaling", "remat", "attention_implementation", "attention_pattern"),
    "transfer",  # `unfoldable` says of what it has
    *("moe.balance_loss", "moe.balance_loss_over", "moe.z_loss", "moe.router_noise", "moe.router_noise_scale"),
)


def value_of(config: ModelConfig, key: str) -> Any:
    """The value of one of our keys; a dot leads into a section, and there is None under one that is not given."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name) if value is not None else None
    return value


def always(config: ModelConfig) -> bool:
    """For weights that every model of the family has."""
    return True


def every_kind(kind: LayerKind) -> bool:
    """For weights that every layer has."""
    return True


def untied(config: ModelConfig) -> bool:
    """For a head of its own."""
    return not config.tied_embeddings


@dataclass(frozen=True)
class Weight:
    """A line of the table of weights: where a tensor lies here and there, and how its axes are laid.

    `layout` says both ways at once: `dhk -> (hk)d` is our `[d, h, k]` as their matrix of `h * k` rows and `d` columns,
    in letters d embed (D where there are two), h heads, g key-value heads, k head width, f mlp, v vocabulary, p
    positions, t token types, b ranges of distances, y classes, e experts, m width of an expert, s width of the shared
    experts; `n` is an axis of one that is theirs alone. Where several of ours are one of theirs, `n` tells them apart
    in it: `d(nhk)` has all heads of the first before all of the second, `(hnk)d` one head of each in turn. Where they
    differ in shape, each has a layout of its own, `hk -> (hk), gk -> (gk)`, and in theirs they lie one behind another
    along the first axis.

    Weights of layers have `{layer}` in `theirs`, the layer's number, and `*` in `ours`, the name of the stack in whose
    arrays it is, behind `encoder` or `decoder`. Where theirs have a tensor an expert, `{expert}` is its number; ours
    have a further leading axis. Those of modules that predict further ahead have `{module}`, the number of a layer
    behind the last, and `*` for the module.

    Letters of latent attention: r the queries' latent, c that of keys and values, x the same and the shared key, k a
    query head, u a head's key without RoPE and its value, w a value head.
    """

    ours: tuple[str, ...]
    theirs: str
    layout: str
    when: Callable[[ModelConfig], bool] = always
    kinds: Callable[[LayerKind], bool] = every_kind
    """the kinds of layers that have it"""
    interleaved: bool = False
    """whether RoPE turns, of the last `latent.rope_head_dim` channels on our last axis, neighbouring ones in theirs"""

    @property
    def layered(self) -> bool:
        """Whether ours are stacked over layers and theirs are a tensor a layer."""
        return "{layer}" in self.theirs

    @property
    def parts(self) -> tuple[Weight, ...]:
        """A line for each of ours, where each has a layout of its own; else none."""
        layouts = self.layout.split(", ")
        if len(layouts) == 1:
            return ()
        return tuple(
            replace(self, ours=(path,), layout=layout) for path, layout in zip(self.ours, layouts, strict=True)
        )

    def tensors(self, config: ModelConfig) -> Iterator[Tensor]:
        """Their tensors, layer by layer."""
        if not self.when(config):
            return
        if "{module}" in self.theirs:
            yield from self._of_modules(config)
            return
        if not self.layered:
            yield Tensor(self.theirs, self, self.ours, ())
            return
        side = self.ours[0].partition(".")[0]
        for layer, place in enumerate(places(config.sides.get(side, ()))):
            if self.kinds(place.kind):
                ours = tuple(path.replace("*", place.stack) for path in self.ours)
                for expert, index in self._experts(config):
                    name = self.theirs.format(layer=layer, expert=expert)
                    yield Tensor(name, self, ours, (place.index, *index))

    def _of_modules(self, config: ModelConfig) -> Iterator[Tensor]:
        """Those of the modules that predict further ahead, whose layers are of the last one's kind."""
        if not self.kinds(config.layer_kinds[-1]):
            return
        for k in range(config.mtp_layers):
            ours = tuple(path.replace("*", str(k)) for path in self.ours)
            for expert, index in self._experts(config):
                yield Tensor(self.theirs.format(module=config.n_layers + k, expert=expert), self, ours, index)

    def _experts(self, config: ModelConfig) -> Iterator[tuple[int | None, tuple[int, ...]]]:
        """The experts that have a tensor of their own, each with its place on ours; one without a number otherwise."""
        if "{expert}" not in self.theirs or config.moe is None:
            yield None, ()
            return
        for expert in range(config.moe.n_experts):
            yield expert, (expert,)

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape of their tensor."""
        if self.parts:
            shapes = [part.shape(config) for part in self.parts]
            return (sum(shape[0] for shape in shapes), *shapes[0][1:])
        _, groups = self._axes()
        sizes = self._sizes(config)
        return tuple(math.prod(sizes[letter] for letter in group) for group in groups)

    def export(self, arrays: list[np.ndarray], config: ModelConfig) -> np.ndarray:
        """Their tensor from ours, of one layer; the vocabulary's padding is cut off."""
        if self.parts:
            pieces = [part.export([array], config) for part, array in zip(self.parts, arrays, strict=True)]
            return np.concatenate(pieces)
        letters, groups = self._axes()
        array = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
        if "v" in letters:
            array = array[(slice(None),) * letters.index("v") + (slice(config.vocab_size),)]
        if self.interleaved:
            array = array[..., _neighbours(array.shape[-1], config)]
        order = [letters.index(letter) for group in groups for letter in group]
        return np.ascontiguousarray(array.transpose(order).reshape(self.shape(config)))

    def read(self, tensor: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        """Ours, of one layer and without the vocabulary's padding: views of their tensor, unless RoPE turns channels
        in another order."""
        if self.parts:
            ends = np.cumsum([part.shape(config)[0] for part in self.parts])
            pieces = np.split(tensor, ends[:-1])
            return [part.read(piece, config)[0] for part, piece in zip(self.parts, pieces, strict=True)]
        letters, groups = self._axes()
        sizes, flat = self._sizes(config), [letter for group in groups for letter in group]
        arrays = tensor.reshape([sizes[letter] for letter in flat]).transpose([flat.index(x) for x in letters])
        return list(arrays[..., np.argsort(_neighbours(arrays.shape[-1], config))] if self.interleaved else arrays)

    def _axes(self) -> tuple[str, list[str]]:
        """The letters of ours, stacked on `n`, and the groups of letters of theirs."""
        ours, theirs = self.layout.split(" -> ")
        groups = [group.strip("()") for group in re.findall(r"\(\w+\)|\w", theirs)]
        if len(self.ours) == 1 and "n" not in groups:
            groups[0] = f"n{groups[0]}"
        return f"n{ours}", groups

    def _sizes(self, c: ModelConfig) -> dict[str, int]:
        sizes = {"d": c.d_model, "D": c.d_model, "h": c.n_heads, "g": c.kv_heads, "k": c.head_width, "f": c.d_ff}
        sizes |= {"v": c.vocab_size, "p": c.position_offset + c.max_seq_len, "n": len(self.ours)}
        sizes |= {"t": c.token_types, "b": c.relative_buckets, "y": 2}
        if (latent := c.latent) is not None:
            up = latent.nope_head_dim + latent.v_head_dim
            sizes |= {"r": latent.q_rank or 0, "c": latent.kv_rank, "x": latent.cached_width, "u": up}
            sizes |= {"w": latent.v_head_dim}
        if c.moe is not None:
            sizes |= {"e": c.moe.n_experts, "m": c.moe.d_ff, "s": c.moe.shared_width}
        return sizes


def _neighbours(width: int, config: ModelConfig) -> np.ndarray:
    """For each channel of theirs, whose last ones RoPE turns in neighbouring pairs, ours, where it turns halves."""
    turned = config.rope_width
    pairs = np.arange(turned).reshape(2, turned // 2).T.ravel()
    return np.concatenate([np.arange(width - turned), width - turned + pairs])


def _same(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config)


def _as_configured(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    return config


def _no_more(config: ModelConfig) -> dict[str, Any]:
    return {}


def _no_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _no_misfits(config: ModelConfig) -> Iterator[str]:
    return iter(())


def plain_heads(config: ModelConfig) -> Iterator[str]:
    """Misfits of a family whose heads share out the width, each with its own keys and values."""
    if config.kv_heads != config.n_heads:
        yield f"model.n_kv_heads = {config.kv_heads} (it has as many as n_heads = {config.n_heads})"
    if config.n_heads * config.head_width != config.d_model:
        yield f"model.head_dim = {config.head_width} (it has d_model / n_heads = {config.d_model / config.n_heads:g})"


class Tensor(NamedTuple):
    """A tensor of the files, and where it is in ours."""

    name: str
    weight: Weight
    ours: tuple[str, ...]
    """paths in the tree of parameters"""
    index: tuple[int, ...]
    """its place on the leading axes of ours"""


@dataclass(frozen=True)
class Family:
    """A family of public models, as the bricks that it is made of."""

    model_type: str
    """its name in config.json"""
    architecture: str
    """transformers' class for it"""
    keys: Mapping[str, str]
    """sizes and choices: their config key to ours; a dot leads into a section of ours"""
    defaults: Mapping[str, Any]
    """what transformers takes for a key of theirs that is not in config.json"""
    constants: Mapping[str, Any]
    """their keys that have one value where our bricks are equal to theirs; written on export"""
    weights: tuple[Weight, ...]
    prefix: str
    """of the names of all weights but the head's; files of the bare model lack it"""
    embedding: str
    """the name of the token embedding, which a tied head is"""
    head: str = "lm_head.weight"
    """the name of the head's weight"""
    bricks: Mapping[str, Any] = field(default_factory=dict)
    """our keys that have one value in this family; those that stand nowhere in it have their defaults"""
    follow: Callable[[Mapping[str, Any]], dict[str, Any]] = _no_keys
    """our keys that in this family follow from others of ours"""
    assumed: Mapping[str, Any] = field(default_factory=dict)
    """our keys of which config.json says nothing and that bear on training alone: what a model that is read has"""
    linked: Mapping[str, str] = field(default_factory=dict)
    """our keys that in this family are equal to another of ours"""
    synonyms: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """further values of constants that mean the same"""
    harmless: frozenset[str] = frozenset()
    """their keys that bear on training alone, or on other heads"""
    buffers: str = r"(?!)"
    """a pattern of names of tensors in the files that are no weights, or none of this class"""
    spell: Callable[[str], str] = str
    """an older name of a tensor as it is now"""
    copies: Mapping[str, str] = field(default_factory=dict)
    """patterns of names of tensors that some files hold a second time, and the name of the first"""
    as_filed: Callable[[ModelConfig, Collection[str]], ModelConfig] = _as_configured
    """the model whose tensors, by name, are in the files, where these may lack a part that config.json speaks of"""
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]] = _same
    """brings other spellings of config.json to the keys above; raises ConfigError on what has no equal here"""
    write_config: Callable[[ModelConfig], dict[str, Any]] = _no_more
    """what config.json has besides, or spells otherwise than by `keys` alone"""
    misfits: Callable[[ModelConfig], Iterator[str]] = _no_misfits
    """what else keeps a model out of the family, a clause each"""
    derived: frozenset[str] = frozenset()
    """our keys that `misfits` looks at, or that `read_config` and `write_config` translate"""
    mixed: bool = False
    """whether layers may be of several kinds"""
    all_dense: bool = False
    """whether, of a family with experts, a model may have none"""

    def misfits_of(self, config: ModelConfig) -> list[str]:
        """Why a model is not of this family, a clause for each key; none where it is."""
        if (config.moe is not None) != self.has_experts and not (config.moe is None and self.all_dense):
            return [f"model.moe is {'given' if config.moe is not None else 'null'} (its layers are the other kind)"]
        wrong = [
            f"model.{ours} = {value_of(config, ours)!r} (it has {value!r})"
            for ours, value in self.bricks.items()
            if value_of(config, ours) != value and not (config.moe is None and ours.startswith("moe."))
        ]
        followed = self.follow(config.model_dump())
        wrong += [
            f"model.{name} = {getattr(config, name)!r} (in it that is {value!r})"
            for name, value in followed.items()
            if getattr(config, name) != value
        ]
        known = {*followed, *self.keys.values(), *self.bricks, *self.assumed, *self.linked, *self.derived}
        known |= {*NOT_OF_THE_WEIGHTS, "moe"}
        fields = {**ModelConfig.model_fields}
        if config.moe is not None:
            fields |= {f"moe.{name}": ours for name, ours in MoEConfig.model_fields.items()}
        for name, ours in fields.items():
            # RoPE's keys say nothing of a model without it.
            if name in known or (config.positions != "rope" and "rope" in name):
                continue
            if value_of(config, name) != ours.default:
                wrong.append(f"model.{name} = {value_of(config, name)!r} (it has {ours.default!r})")
        if not self.mixed and len(set(config.layer_kinds)) > 1:
            wrong.append(f"model.attention_pattern = {list(config.attention_pattern)!r} (its layers are all alike)")
        wrong += [
            f"model.{key} = {value_of(config, key)!r}, model.{other} = {value_of(config, other)!r} (in it they are one)"
            for key, other in self.linked.items()
            if value_of(config, key) != value_of(config, other)
        ]
        return [*wrong, *unfoldable(config), *self.misfits(config)]

    @property
    def has_experts(self) -> bool:
        """Whether its models have layers with experts."""
        return "moe.n_experts" in self.keys.values()

    def tensors(self, config: ModelConfig) -> dict[str, Tensor]:
        """Every tensor of the model's files by name, in order of names."""
        named = {tensor.name: tensor for weight in self.weights for tensor in weight.tensors(config)}
        return dict(sorted(named.items()))

    def to_hf_config(self, config: ModelConfig, *, dtype: str, special_ids: Mapping[str, int | None]) -> dict[str, Any]:
        """The config.json of a model that fits. `special_ids` are by `bos`, `eos` and `pad`."""
        filled = {"n_kv_heads": config.kv_heads, "head_dim": config.head_width}
        filled["n_encoder_layers"] = config.n_encoder_layers or config.n_layers
        theirs = {key: filled.get(ours, value_of(config, ours)) for key, ours in self.keys.items()}
        ids = {f"{name}_token_id": special_ids.get(name) for name in ("bos", "eos", "pad")}
        about = {"architectures": [self.architecture], "model_type": self.model_type, "torch_dtype": dtype}
        theirs |= self.write_config(config)
        return dict(sorted((about | ids | theirs | dict(self.constants) | {"use_cache": True}).items()))

    def from_hf_config(self, theirs: Mapping[str, Any], origin: str) -> ModelConfig:
        """The model of the config.json `origin`. Raises ConfigError, naming every key that has no equal here."""
        try:
            read = self.read_config(theirs)
        except ConfigError as error:
            raise ConfigError(f"{origin}: this model cannot be read:\n  {error}") from None
        problems = []
        for key, value in sorted(read.items()):
            if key in self.keys or key in self.harmless or key in BOOKKEEPING:
                continue
            if key not in self.constants:
                if value not in (None, False):
                    problems.append(f"{key} = {value!r}: not known for {self.model_type} models here")
            elif value not in (self.constants[key], *self.synonyms.get(key, ())):
                problems.append(
                    f"{key} = {value!r}: only {self.constants[key]!r} is what maxlm's {self.model_type} does"
                )
        if problems:
            raise ConfigError(f"{origin}: this model cannot be read:\n  " + "\n  ".join(problems))
        values = {ours: read.get(key, self.defaults.get(key)) for key, ours in self.keys.items()}
        values = {ours: value for ours, value in values.items() if value is not None}
        linked = {key: values[other] for key, other in self.linked.items() if other in values}
        values |= linked | dict(self.bricks) | dict(self.assumed)
        if self.all_dense and "moe.n_experts" not in values:
            values = {ours: value for ours, value in values.items() if not ours.startswith("moe.")}
        return self._model_config(values | self.follow(values), origin)

    def _model_config(self, values: dict[str, Any], origin: str) -> ModelConfig:
        theirs = {ours: key for key, ours in self.keys.items()}
        tree: dict[str, Any] = {}
        for name, value in values.items():
            section, _, rest = name.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[rest] = value
        try:
            config = ModelConfig.model_validate_json(json.dumps(tree), strict=True)
        except ValidationError as error:
            lines = []
            for problem in error.errors():
                ours = ".".join(map(str, problem["loc"]))
                key = theirs.get(ours) or theirs.get(ours.partition(".")[0], ours)
                lines.append(f"{key} ({ours}): {problem['msg']}" if ours else problem["msg"])
            raise ConfigError(f"{origin}: this model cannot be read:\n  " + "\n  ".join(lines)) from None
        if misfits := self.misfits_of(config):
            raise ConfigError(f"{origin}: not a {self.model_type} model that transformers makes: " + "; ".join(misfits))
        return config
