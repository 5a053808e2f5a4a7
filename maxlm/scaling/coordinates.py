"""The coordinate check: whether what a model computes, and how fast it changes, is independent of its width or depth.

Models of several sizes are trained for some steps on the same data, with `model.transfer` and without. Of each
activation the mean absolute size of an entry and of its change since the start is taken on the first batch. With a
parametrisation that transfers, changes do not depend on the size: their slope over it, both in logarithms, is near 0
(Tensor Programs V, arXiv:2203.03466, appendix D.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.console import print_table
from maxlm.data.loader import Loader
from maxlm.data.tokenizer import load_tokenizer
from maxlm.errors import ConfigError
from maxlm.kernels.cross_entropy import logits
from maxlm.models.config import ModelConfig
from maxlm.models.transfer_config import Scales
from maxlm.parallel.mesh import make_mesh
from maxlm.training.program import Program

if TYPE_CHECKING:
    from maxlm.config import RunConfig

Along = Literal["width", "depth"]
Batch = dict[str, np.ndarray]
STABLE = 0.3
"""Slopes up to this are called stable. Over few and small widths the slope of what theory has at 0 is a little off it:
of the logits' change a part, what the head as it started makes of changed inputs, falls as 1 / sqrt(width) with mup."""
PARAMETRISATIONS = ("off", "on")


@dataclass(frozen=True)
class Curves:
    """A model's activations on the first batch, step by step, `[steps + 1, activations]`, and its losses `[steps]`."""

    names: tuple[str, ...]
    size: np.ndarray
    """mean absolute entry"""
    change: np.ndarray
    """mean absolute difference to the model as it started"""
    losses: np.ndarray


@dataclass(frozen=True)
class CoordinateCheck:
    """The curves of models of all sizes, without transfer ("off") and with it ("on")."""

    along: Along
    sizes: tuple[int, ...]
    steps: int
    learning_rate: float
    transfer: dict[str, Any]
    curves: dict[str, tuple[Curves, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The activations that models of all sizes have."""
        return self.curves["off"][0].names

    def changes(self, which: str, name: str) -> np.ndarray:
        """Mean absolute changes of an activation, `[sizes, steps + 1]`."""
        return np.stack([curves.change[:, self.names.index(name)] for curves in self.curves[which]])

    def slope(self, which: str, name: str) -> float:
        """Of the change after the last step over the size, both in logarithms; NaN where a run diverged."""
        last = self.changes(which, name)[:, -1]
        if not np.all(np.isfinite(last) & (last > 0)):
            return float("nan")
        return float(np.polyfit(np.log(self.sizes), np.log(last), 1)[0])

    def rows(self) -> list[dict[str, Any]]:
        """A row for each activation: the slope of its change without transfer and with it, and what that means."""
        found = []
        for name in self.names:
            row: dict[str, Any] = {"activation": name}
            for which in PARAMETRISATIONS:
                slope = self.slope(which, name)
                row |= {f"slope_{which}": slope, f"verdict_{which}": verdict(slope, self.along)}
            found.append(row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        curves = {
            which: [
                {"size": size, "activation_size": c.size, "activation_change": c.change, "loss": c.losses}
                for size, c in zip(self.sizes, found, strict=True)
            ]
            for which, found in self.curves.items()
        }
        listed = jax.tree.map(lambda leaf: leaf.tolist() if isinstance(leaf, np.ndarray) else leaf, curves)
        about = {"along": self.along, "sizes": list(self.sizes), "steps": self.steps}
        about |= {"learning_rate": self.learning_rate, "transfer": self.transfer, "stable_below": STABLE}
        return {**about, "slopes": self.rows(), "activations": list(self.names), "curves": listed}


def verdict(slope: float, along: Along) -> str:
    """A slope in words."""
    if not np.isfinite(slope):
        return "not finite: a run diverged, or nothing changed"
    if abs(slope) <= STABLE:
        return "stable"
    return f"{'grows' if slope > 0 else 'shrinks'} with {along}"


def coordinate_check(
    config: RunConfig, sizes: Sequence[int], batches: Sequence[Batch], *, along: Along = "width"
) -> CoordinateCheck:
    """Trains models of all sizes, a step a batch, at the peak learning rate from the first on, and looks at them.

    All widths grow in proportion, by more heads of the config's width. The base model is that of `model.transfer`, or
    else the smallest size. `batches` are of `store_batches`, or of `language`, which needs no data. Raises ConfigError
    where the sizes or the kind of model cannot be.
    """
    if config.model.kind != "decoder":
        raise ConfigError(f"model.kind = {config.model.kind!r}: the coordinate check looks at decoders")
    sizes = tuple(sorted(set(sizes)))
    if len(sizes) < 2:
        raise ConfigError(f"{along}s {', '.join(map(str, sizes))}: a slope needs at least two different ones")
    transfer = _transfer_of(config.model, sizes[0], along)
    models = [tuple(resized(config.model, along, size, either) for either in (None, transfer)) for size in sizes]
    off, on, whole, n_steps = [], [], along == "width", len(batches)
    for plain, scaled in models:
        off.append(trained(run_of(config, plain, n_steps), batches, whole=whole))
        # The base model is the same with transfer.
        same = scaled.scales == Scales() and scaled.residual_init_std == plain.residual_init_std
        on.append(off[-1] if same else trained(run_of(config, scaled, n_steps), batches, whole=whole))
    curves = {"off": tuple(off), "on": tuple(on)}
    return CoordinateCheck(along, sizes, n_steps, config.optimizer.learning_rate, transfer, curves)


def _transfer_of(model: ModelConfig, smallest: int, along: Along) -> dict[str, Any]:
    if model.transfer is not None:
        if along == "depth" and model.transfer.base_depth is None:
            raise ConfigError(
                f"model.transfer.kind = {model.transfer.kind!r} says nothing of depth; set it to completep, or check "
                "--widths"
            )
        return model.transfer.model_dump(exclude_none=True)
    if along == "depth":
        return {"kind": "completep", "base_width": model.d_model, "base_depth": smallest}
    return {"kind": "mup", "base_width": smallest}


def resized(model: ModelConfig, along: Along, size: int, transfer: dict[str, Any] | None) -> ModelConfig:
    """The model with another d_model or n_layers, and all that goes with it in proportion."""
    tree = model.model_dump()
    tree["transfer"] = transfer
    if along == "depth":
        tree["n_layers"] = size
        return ModelConfig.model_validate(tree)
    ratio = size / model.d_model
    heads, kv_heads = model.n_heads * ratio, model.kv_heads * ratio
    if heads != int(heads):
        raise ConfigError(
            f"width {size}: model.n_heads = {model.n_heads} at model.d_model = {model.d_model} would be {heads:g}; "
            f"choose widths that give whole heads, or others with model.n_heads=... (heads are {model.head_width} wide)"
        )
    # Fewer key and value heads than 1 there cannot be, nor a number that does not divide the heads.
    kv_heads = int(kv_heads) if kv_heads == int(kv_heads) and kv_heads else 1
    tree |= {"d_model": size, "n_heads": int(heads), "n_kv_heads": kv_heads, "head_dim": model.head_width}
    if model.latent is not None:
        tree |= {"head_dim": None, "n_kv_heads": None}
    tree["d_ff"] = max(1, round(model.d_ff * ratio))
    if model.moe is not None:
        tree["moe"]["d_ff"] = max(1, round(model.moe.d_ff * ratio))
    return ModelConfig.model_validate(tree)


def run_of(config: RunConfig, model: ModelConfig, steps: int) -> RunConfig:
    """A run of the model at a constant learning rate that skips no step."""
    sections = {
        name: getattr(config, name).model_dump() for name in ("train", "optimizer", "precision", "loss", "data")
    }
    sections["train"] |= {"steps": steps, "spike": {"sigmas": None}}
    constant = {"kind": "constant", "warmup_steps": 0}
    return type(config).model_validate({"model": model.model_dump(), "schedule": constant, **sections})


def trained(run: RunConfig, batches: Sequence[Batch], *, whole: bool = True) -> Curves:
    """Trains on one batch after another, and looks at the first before each and at the end. `whole`: at every layer,
    else at the last alone."""
    program = Program(run, make_mesh(run.mesh, jax.devices()[:1]))
    sizes, changes, losses = [], [], []
    with jax.set_mesh(program.mesh):
        state, step = program.init_state(), program.train_step()
        placed = [{k: jax.device_put(v, program.batch_sharding) for k, v in batch.items()} for batch in batches]

        look = jax.jit(lambda params: _activations(program, params, placed[0], whole))
        start = now = look(state.params)
        for batch in [*placed, None]:
            size, change = _means(now, start)
            sizes.append(size)
            changes.append(change)
            if batch is not None:
                state, metrics = step(state, batch)
                losses.append(metrics["loss"])
                now = look(state.params)
        found = jax.device_get((sizes, changes, losses))
    layers = [f"layer {i}" for i in range(1, run.model.n_layers + 1)] if whole else ["last layer"]
    return Curves(("embedding", *layers, "logits"), *(np.asarray(values, np.float64) for values in found))


@jax.jit
def _means(now: list[jax.Array], start: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Mean absolute entries of activations, and of their differences to those at the start."""
    mean = lambda x: jnp.mean(jnp.abs(x.astype(jnp.float32)))  # noqa: E731
    return [mean(x) for x in now], [mean(x - x_0) for x, x_0 in zip(now, start, strict=True)]


def _activations(program: Program, params: Any, batch: dict[str, jax.Array], whole: bool) -> list[jax.Array]:
    """The stream behind the embedding and behind the layers, and the logits."""
    module = program.model.bind(params)
    embedded, *layers, last = module.streams(batch["inputs"], batch["positions"], batch["segments"])
    scores = logits(
        module.head_input(last),
        module.head_weight(),
        vocab_size=module.config.vocab_size,
        bias_V=module.head_bias(),
        softcap=module.config.logit_softcap,
    )
    return [embedded, *(layers if whole else layers[-1:]), scores]


def store_batches(config: RunConfig, steps: int) -> list[Batch]:
    """The first batches of the config's store or mixture. Raises ConfigError, DataError or StorageError as it does."""
    rows = config.train.global_batch_tokens // config.train.seq_len
    loader = Loader(
        config.data,
        seq_len=config.train.seq_len,
        global_batch=rows,
        seed=config.train.seed,
        tokenizer=load_tokenizer(config.tokenizer) if config.tokenizer.path else None,
        objective=config.objective,
    )
    if loader.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {loader.vocab_size} tokens of the "
            f"store's tokenizer; set model.vocab_size={loader.vocab_size}"
        )
    return [loader.rows(step, np.arange(rows)) for step in range(steps)]


def language(config: RunConfig, steps: int) -> list[Batch]:
    """Batches of a made-up language that can be learned: four tokens may follow a token, the first as often as not, the
    next half as often, and so on."""
    vocab_size, length = config.model.vocab_size, config.train.seq_len
    rows = config.train.global_batch_tokens // length
    rng = np.random.default_rng(config.train.seed)
    followers = rng.integers(0, vocab_size, (vocab_size, 4))
    tokens = np.empty((steps, rows, length + 1), np.int32)
    tokens[..., 0] = rng.integers(0, vocab_size, (steps, rows))
    choices = rng.choice(4, (steps, rows, length), p=(0.5, 0.25, 0.125, 0.125))
    for i in range(length):
        tokens[..., i + 1] = followers[tokens[..., i], choices[..., i]]
    return [whole_rows(batch) for batch in tokens]


def whole_rows(tokens: np.ndarray) -> Batch:
    """The batch of rows `[B, T + 1]` that are a document each."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "weights": np.ones((rows, length), np.float32),
    }


def print_check(check: CoordinateCheck, json_wanted: bool) -> None:
    """The table of slopes, and what it comes to."""
    print_table(check.rows(), json_wanted, as_json=check.to_dict())
    if json_wanted:
        return
    span = f"{check.along}s {check.sizes[0]} to {check.sizes[-1]}, {check.steps} steps"
    print(f"\nslope of log(mean change since the start) over log({check.along}); {span}; stable: up to {STABLE:g}")
    for which in PARAMETRISATIONS:
        moving = [name for name in check.names if not abs(check.slope(which, name)) <= STABLE]
        said = "all changes are stable" if not moving else f"not stable: {', '.join(moving)}"
        print(f"transfer {which}: {said}")
