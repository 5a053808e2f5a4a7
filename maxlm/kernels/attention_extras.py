"""The arrays that a call of attention may have besides queries, keys and values, and their shardings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from maxlm.kernels.attention_bias import Alibi, Bias
from maxlm.kernels.attention_relative import Relative
from maxlm.kernels.manual import bring
from maxlm.parallel.axes import activation_spec, mesh_axes


class Layout(NamedTuple):
    """The logical axes of a call's arrays: how positions and heads are shared by devices."""

    length: str | None = "length"
    heads: str = "heads"
    kv_heads: str = "kv_heads"

    @property
    def rows(self) -> PartitionSpec:
        """Of `[B, T]` and `[B, S]`."""
        return activation_spec("batch", self.length)

    @property
    def queries(self) -> PartitionSpec:
        """Of `[B, T, H, K]`."""
        return activation_spec("batch", self.length, self.heads, None)

    @property
    def keys(self) -> PartitionSpec:
        """Of `[B, S, G, K]`."""
        return activation_spec("batch", self.length, self.kv_heads, None)

    @property
    def lse(self) -> PartitionSpec:
        """Of `[B, T, H]`."""
        return activation_spec("batch", self.length, self.heads)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes that each have other queries of the same heads."""
        return mesh_axes("batch") + (mesh_axes(self.length) if self.length else ())


class Extras(NamedTuple):
    """As `attention.attention` takes them; None where not given. Segments come in pairs."""

    segments_BT: jax.Array | None = None
    kv_segments_BS: jax.Array | None = None
    prefix_BS: jax.Array | None = None
    sinks_H: jax.Array | None = None
    bias: Bias | None = None
    relative: Relative | None = None

    def specs(self, layout: Layout) -> Any:
        """The sharding of each array that is given, in the same places."""
        rows, heads = layout.rows, activation_spec(layout.heads)
        per_head = heads if isinstance(self.bias, Alibi) else activation_spec(None, layout.heads)
        relative = self.relative
        if relative is not None:
            distances = activation_spec(None, layout.heads, None)
            relative = replace(relative, q_BTHK=layout.queries, r_LHK=distances)
        each = (rows, rows, rows, heads, jax.tree.map(lambda _: per_head, self.bias), relative)
        specs: list[Any] = [None if given is None else spec for given, spec in zip(self, each, strict=True)]
        return Extras(*specs)

    def brought(self, layout: Layout) -> Extras:
        """The same arrays in their shardings."""
        return jax.tree.map(bring, self, self.specs(layout))

    def problems(self, q: jax.Array, k: jax.Array) -> list[str]:
        """What does not fit queries `[B, T, H, K]` and keys `[B, S, G, K]`, in words."""
        (B, T, H, _), S = q.shape, k.shape[1]
        found = []
        if self.segments_BT is None and self.kv_segments_BS is not None:
            found.append("segments of keys are given and those of queries are not")
        if self.segments_BT is not None and self.segments_BT.shape != (B, T):
            found.append(f"segments {self.segments_BT.shape} do not fit queries {q.shape}")
        if self.kv_segments_BS is not None and self.kv_segments_BS.shape != (B, S):
            found.append(f"segments of the keys do not fit keys {k.shape}")
        if self.prefix_BS is not None and (self.prefix_BS.shape != (B, S) or self.prefix_BS.dtype != bool):
            found.append(f"a prefix {self.prefix_BS.dtype} {self.prefix_BS.shape} is not bool {(B, S)}")
        if self.sinks_H is not None and self.sinks_H.shape != (H,):
            found.append(f"sinks {self.sinks_H.shape} do not fit {H} query heads")
        if self.bias is not None:
            (array,) = jax.tree.leaves(self.bias)
            if array.ndim != (1 if isinstance(self.bias, Alibi) else 2) or array.shape[-1] != H:
                found.append(f"a bias {array.shape} does not fit {H} query heads")
        return found + ([] if self.relative is None else self.relative.problems(q))
