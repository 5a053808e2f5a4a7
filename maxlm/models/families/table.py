"""What a family of public models is: one table of weight names and one of config keys, each read in both directions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.moe_config import MoEConfig
from maxlm.models.stacks import LayerKind, places

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
    *("moe.balance_loss", "moe.balance_loss_over", "moe.z_loss"),
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
    in letters d embed, h heads, g key-value heads, k head width, f mlp, v vocabulary, p positions, e experts, m width
    of an expert, s width of the shared experts. Where several of ours are one of theirs, `n` tells them apart in it:
    `d(nhk)` has all heads of the first before all of the second, `(hnk)d` one head of each in turn.

    Weights of layers have `{layer}` in `theirs`, the layer's number, and `*` in `ours`, the name of the stack in whose
    arrays it is. Where theirs have a tensor an expert, `{expert}` is its number; ours have a further leading axis.
    """

    ours: tuple[str, ...]
    theirs: str
    layout: str
    when: Callable[[ModelConfig], bool] = always
    kinds: Callable[[LayerKind], bool] = every_kind
    """the kinds of layers that have it"""

    @property
    def layered(self) -> bool:
        """Whether ours are stacked over layers and theirs are a tensor a layer."""
        return "{layer}" in self.theirs

    def tensors(self, config: ModelConfig) -> Iterator[Tensor]:
        """Their tensors, layer by layer."""
        if not self.when(config):
            return
        if not self.layered:
            yield Tensor(self.theirs, self, self.ours, ())
            return
        for layer, place in enumerate(places(config.layer_kinds)):
            if self.kinds(place.kind):
                ours = tuple(path.replace("*", place.stack) for path in self.ours)
                for expert, index in self._experts(config):
                    name = self.theirs.format(layer=layer, expert=expert)
                    yield Tensor(name, self, ours, (place.index, *index))

    def _experts(self, config: ModelConfig) -> Iterator[tuple[int | None, tuple[int, ...]]]:
        """The experts that have a tensor of their own, each with its place on ours; one without a number otherwise."""
        if "{expert}" not in self.theirs or config.moe is None:
            yield None, ()
            return
        for expert in range(config.moe.n_experts):
            yield expert, (expert,)

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape of their tensor."""
        _, groups = self._axes()
        sizes = self._sizes(config)
        return tuple(math.prod(sizes[letter] for letter in group) for group in groups)

    def our_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape of each of ours, of one layer, the vocabulary padded."""
        letters, _ = self._axes()
        sizes = self._sizes(config) | {"v": config.padded_vocab_size}
        return tuple(sizes[letter] for letter in letters[1:])

    def export(self, arrays: list[np.ndarray], config: ModelConfig) -> np.ndarray:
        """Their tensor from ours, of one layer; the vocabulary's padding is cut off."""
        letters, groups = self._axes()
        array = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
        if "v" in letters:
            array = array[(slice(None),) * letters.index("v") + (slice(config.vocab_size),)]
        order = [letters.index(letter) for group in groups for letter in group]
        return np.ascontiguousarray(array.transpose(order).reshape(self.shape(config)))

    def read(self, tensor: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        """Ours, of one layer, from their tensor; rows of the padded vocabulary are zeros."""
        letters, groups = self._axes()
        sizes, flat = self._sizes(config), [letter for group in groups for letter in group]
        arrays = tensor.reshape([sizes[letter] for letter in flat]).transpose([flat.index(x) for x in letters])
        padding = [(0, to - now) for to, now in zip(self.our_shape(config), arrays.shape[1:], strict=True)]
        return [np.pad(array, padding) if "v" in letters else array for array in arrays]

    def _axes(self) -> tuple[str, list[str]]:
        """The letters of ours, stacked on `n`, and the groups of letters of theirs."""
        ours, theirs = self.layout.split(" -> ")
        groups = [group.strip("()") for group in re.findall(r"\(\w+\)|\w", theirs)]
        if len(self.ours) == 1:
            groups[0] = f"n{groups[0]}"
        return f"n{ours}", groups

    def _sizes(self, c: ModelConfig) -> dict[str, int]:
        sizes = {"d": c.d_model, "h": c.n_heads, "g": c.kv_heads, "k": c.head_width, "f": c.d_ff}
        if c.moe is not None:
            sizes |= {"e": c.moe.n_experts, "m": c.moe.d_ff, "s": c.moe.shared_width}
        return sizes | {"v": c.vocab_size, "p": c.max_seq_len, "n": len(self.ours)}


def _same(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config)


def _no_more(config: ModelConfig) -> dict[str, Any]:
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
    linked: Mapping[str, str] = field(default_factory=dict)
    """our keys that in this family are equal to another of ours"""
    synonyms: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """further values of constants that mean the same"""
    harmless: frozenset[str] = frozenset()
    """their keys that bear on training alone, or on other heads"""
    buffers: str = r"(?!)"
    """a pattern of names of tensors in the files that are no weights"""
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

    def misfits_of(self, config: ModelConfig) -> list[str]:
        """Why a model is not of this family, a clause for each key; none where it is."""
        if (config.moe is not None) != self.has_experts:
            return [f"model.moe is {'given' if config.moe is not None else 'null'} (its layers are the other kind)"]
        wrong = [
            f"model.{ours} = {value_of(config, ours)!r} (it has {value!r})"
            for ours, value in self.bricks.items()
            if value_of(config, ours) != value
        ]
        known = {*self.keys.values(), *self.bricks, *self.linked, *self.derived, *NOT_OF_THE_WEIGHTS, "moe"}
        fields = {**ModelConfig.model_fields}
        if self.has_experts:
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
        return wrong + list(self.misfits(config))

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
        theirs = {key: filled.get(ours, value_of(config, ours)) for key, ours in self.keys.items()}
        ids = {f"{name}_token_id": special_ids.get(name) for name in ("bos", "eos", "pad")}
        about = {"architectures": [self.architecture], "model_type": self.model_type, "torch_dtype": dtype}
        theirs |= self.write_config(config)
        return dict(sorted((about | theirs | dict(self.constants) | ids | {"use_cache": True}).items()))

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
        return self._model_config(values | linked | dict(self.bricks), origin)

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
