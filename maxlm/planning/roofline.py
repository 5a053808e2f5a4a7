"""How long a step must take by its FLOPs and bytes, part by part, before any compiler is asked.

The formulas are those of the scaling book (jax-ml.github.io/scaling-book, "How to Parallelize a Transformer for
Training"). A part takes the longest of its computation, its HBM traffic and its communication when all overlap, their
sum when nothing does. FLOPs come from `models/flops.py`, bytes of collectives from how the code shards: weights are
gathered over `fsdp` in the compute format once for the forward pass and once for the backward pass (they are never
kept), gradients travel in that format too, and tensor parallelism gathers and scatters the residual stream's positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from maxlm.models.config import ModelConfig
from maxlm.models.flops import distance_flops, forward_flops
from maxlm.models.weights import Weight, weights_of
from maxlm.parallel.axes_table import DATA, PIPELINE, SEQUENCE, STORED, TOKENS
from maxlm.planning.context_cost import context_cost
from maxlm.planning.expert_cost import expert_cost
from maxlm.planning.layout import Cost, collective_cost, network_of
from maxlm.planning.memory_model import BYTES, Shapes, chunk_tokens, microbatches, predicted_memory
from maxlm.planning.pipeline_cost import Pipelined
from maxlm.planning.recomputation import Again, again
from maxlm.planning.topology import Topology

if TYPE_CHECKING:
    from maxlm.config import RunConfig

# Attention's backward makes the scores again, five products for the forward's two (FlashAttention, arXiv:2205.14135,
# algorithm 4); model FLOPs count four. With products of queries and distances too, eight for the forward's three.
ATTENTION_BACKWARD, RELATIVE_ATTENTION_BACKWARD = 5 / 2, 8 / 3

# HBM bytes of a logit: float32 written and read three times (maximum, exponentials, target), and its gradient written
# once and read twice in two bytes.
LOGIT_BYTES = 4 * 4 + 3 * 2


@dataclass(frozen=True)
class Part:
    """One device's share of a part of the step: all layers, all microbatches."""

    name: str
    flops: float
    hbm_bytes: float
    ici_bytes: float
    """received over ICI, or NVLink on GPUs"""
    dcn_bytes: float
    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float

    @property
    def bound(self) -> str:
        """What takes longest: compute, HBM, ICI or DCN."""
        seconds = {
            "compute": self.compute_seconds,
            "HBM": self.hbm_seconds,
            "ICI": self.ici_seconds,
            "DCN": self.dcn_seconds,
        }
        return max(seconds, key=lambda name: seconds[name])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bound": self.bound}


@dataclass(frozen=True)
class Roofline:
    """The parts of a step, the memory of a device, and the range of a step's time."""

    parts: list[Part]
    memory: dict[str, int]
    """bytes a device: parameters, optimizer, gradients, activations, temporaries, total"""
    step_seconds: tuple[float, float]
    """all communication hidden behind computation where it is shorter; none hidden, and gradients all-reduced"""

    def seconds_of(self, resource: str) -> float:
        """All parts' seconds of `compute`, `hbm`, `ici` or `dcn`."""
        return sum(getattr(part, f"{resource}_seconds") for part in self.parts)

    @property
    def bound(self) -> str:
        """What the whole step waits for most."""
        totals = {"compute": "compute", "HBM": "hbm", "ICI": "ici", "DCN": "dcn"}
        return max(totals, key=lambda name: self.seconds_of(totals[name]))

    def to_dict(self) -> dict[str, Any]:
        return {
            "parts": [part.to_dict() for part in self.parts],
            "memory": dict(self.memory),
            "step_seconds": list(self.step_seconds),
            "bound": self.bound,
        }


def roofline(config: RunConfig, topology: Topology, sizes: Mapping[str, int]) -> Roofline:
    """The roofline of a config on a topology whose devices the mesh has `sizes` of.

    Raises ConfigError where the mesh does not fit the topology, or a rate that is needed is not published.
    """
    network_of(sizes, topology)
    step = _Step(config, topology, dict(sizes))
    scattered, reduced = step.gradient_costs()
    parts = [
        step.embedding(),
        *step.layers(),
        *step.distances(),
        step.head(),
        step.optimizer(),
        step.part("gradient reduction", cost=reduced),
    ]
    busy = sum(max(part.compute_seconds, part.hbm_seconds) for part in parts)
    ici, dcn = (sum(getattr(part, f"{name}_seconds") for part in parts) for name in ("ici", "dcn"))
    best = max(
        busy,
        ici - reduced.ici_seconds + scattered.ici_seconds,
        dcn - reduced.dcn_seconds + scattered.dcn_seconds,
    )
    return Roofline(parts, predicted_memory(config, sizes), (best, busy + ici + dcn))


def attention_backward(model: ModelConfig) -> float:
    """FLOPs of attention's backward over those of its forward."""
    return RELATIVE_ATTENTION_BACKWARD if model.positions == "transformer_xl" else ATTENTION_BACKWARD


@dataclass(frozen=True)
class _Step:
    """What the parts share. Costs of layers are of one microbatch and all layers, times microbatches in `part`."""

    config: RunConfig
    topology: Topology
    sizes: dict[str, int]

    @property
    def shapes(self) -> Shapes:
        return Shapes.of(self.config, self.sizes)

    @property
    def microbatches(self) -> int:
        """Into how many the batch of a step is cut."""
        return microbatches(self.config, self.sizes)

    @cached_property
    def pipelined(self) -> Pipelined | None:
        """The stages, if there are some."""
        return Pipelined.of(self.config, self.sizes)

    @property
    def width(self) -> int:
        """Bytes of an element in the compute format."""
        return BYTES[self.config.precision.compute]

    @property
    def storage(self) -> tuple[str, ...]:
        """The mesh axes that weights are gathered over."""
        return (*DATA, *STORED) if self.config.mesh.zero == 3 else STORED

    @property
    def replicas(self) -> tuple[str, ...]:
        """The mesh axes that share the batch and not the weights."""
        return tuple(axis for axis in TOKENS if axis not in self.storage)

    def part(self, name: str, *, flops: float = 0.0, hbm: float = 0.0, cost: Cost | None = None) -> Part:
        """A part from what a device does of it in a step."""
        cost = cost or Cost()
        return Part(
            name=name,
            flops=flops,
            hbm_bytes=hbm,
            ici_bytes=cost.ici_bytes,
            dcn_bytes=cost.dcn_bytes,
            compute_seconds=flops / self.topology.peak_flops_per_device(self.config.precision.compute),
            hbm_seconds=hbm / self.topology.hbm_bytes_per_s_per_device,
            ici_seconds=cost.ici_seconds,
            dcn_seconds=cost.dcn_seconds,
        )

    def cost(self, kind: str, n_bytes: float, *axes: str) -> Cost:
        return collective_cost(kind, n_bytes, axes, self.sizes, self.topology)

    def forward_flops(self) -> tuple[float, float, float, float]:
        """Forward FLOPs that a device does in a step: projections, scores, MLP, head (with the padded vocabulary)."""
        model = self.config.model
        found = forward_flops(model, self.config.train.seq_len, self.config.row_lengths)
        head = found.head * model.padded_vocab_size / model.vocab_size
        share = self.config.train.global_batch_tokens / self.topology.n_devices
        return (
            found.attention_projections * share,
            found.attention_scores * share,
            found.mlp * share,
            head * share,
        )

    def embedding(self) -> Part:
        """Tokens' columns travel to the device of the token, and their gradients back; the table stays."""
        n, model = self.microbatches, self.config.model
        n *= 1 + model.mtp_layers
        rows = self.shapes.tokens * model.d_model * self.width
        table = next(weight for weight in weights_of(model) if weight.part == "embedding")
        gradient = 4 * table.at_rest(self.sizes, shard_over_data=self.config.mesh.zero == 3)
        travel = self.cost("all-to-all", rows, *self.storage) + self.cost("reduce-scatter", rows, *SEQUENCE)
        cost = travel + travel + self.cost("all-reduce", gradient, *self.replicas)
        # Lookup: rows read and written. Gradient: rows in float32 read and written, the table's written twice.
        return self.part("embedding", hbm=n * (2 * rows + 2 * rows * 4 / self.width + 2 * gradient), cost=cost * n)

    def layers(self) -> list[Part]:
        """Projections, scores and MLP, forward and backward; and what the backward pass does again of each."""
        n, layers, model = self.microbatches, self.config.model.total_layers, self.config.model
        projections, scores, mlp, _ = self.forward_flops()
        shapes, repeated = self.shapes, again(model)
        residual = shapes.tokens * model.d_model * self.width
        # Queries are as wide as keys, and outputs as values.
        head_bytes = (model.head_width + model.value_width) / 2 * self.width
        q, kv = shapes.tokens * shapes.heads * head_bytes, shapes.tokens * shapes.kv_heads * head_bytes
        inner = shapes.tokens * (shapes.d_ff + shapes.expert_ff) * self.width * (2 if model.gated else 1)
        # Routed tokens are sorted and put together again.
        routed = 2 * shapes.routed * model.d_model * self.width
        # Bytes of one forward pass through all layers; the backward pass moves twice as many.
        through = {
            "attention projections": self._weight_bytes("attention") + layers * (4 * residual + 2 * (q + kv)),
            "attention scores": layers * (2 * (q + kv) + (q if shapes.distances else 0)),
            "mlp": self._weight_bytes("mlp") + layers * (4 * residual + 2 * inner + 2 * routed),
        }
        flops = {"attention projections": projections, "attention scores": scores, "mlp": mlp}
        if (pipelined := self.pipelined) is not None:
            # A stage has its share of the layers, and waits; FLOPs are of a device already.
            flops = {name: count * pipelined.stretch for name, count in flops.items()}
            n *= pipelined.stretch / pipelined.turns.stages
        parts = []
        for name, ahead in through.items():
            backward = attention_backward(model) if name == "attention scores" else 2
            cost = self._layers_cost(name, repeated, residual) * n
            parts.append(self.part(name, flops=flops[name] * (1 + backward), hbm=3 * ahead * n, cost=cost))
            if share := repeated.share(name, model):
                hbm = share * ahead * n
                parts.append(self.part(f"{name}, recomputed", flops=share * flops[name], hbm=hbm))
        if pipelined is not None:
            parts.append(self.part("between stages", cost=pipelined.cost(self.cost)))
        return parts

    def distances(self) -> list[Part]:
        """Projections of distances, where the model has them: each device multiplies the rows of the weight that it
        stores, and products and their gradients are summed in float32, the second over all rows of the batch."""
        n, layers, model = self.microbatches, self.config.model.total_layers, self.config.model
        weights = [weight for weight in weights_of(model) if weight.part == "distances"]
        if not weights:
            return []
        zero3, times = self.config.mesh.zero == 3, 2 + ("r" in again(model).names)
        stored = sum(weight.at_rest(self.sizes, shard_over_data=zero3) for weight in weights)
        share = stored / sum(weight.size for weight in weights)
        made = self.shapes.distances * self.shapes.heads * model.head_width * 4
        cost = self.cost("all-reduce", made, *self.storage) * (times - 1)
        cost += self.cost("all-reduce", made, *TOKENS)
        flops = times * share * distance_flops(model, self.config.train.seq_len)
        hbm = times * (stored * self.width + layers * made)
        return [self.part("distance projections", flops=n * flops, hbm=n * hbm, cost=cost * (n * layers))]

    def _layers_cost(self, name: str, repeated: Again, residual: float) -> Cost:
        """Communication of all layers in a microbatch: weights gathered twice; positions gathered before the products
        and scattered after them, as many again for the gradients, and gathered once more where they were not kept."""
        if name == "attention scores":
            return context_cost(self.config, self.sizes, self.cost)
        cost = Cost()
        for weight in self._gathered("attention" if name == "attention projections" else "mlp"):
            axes = self._gathered_over(weight)
            gather = self.cost("all-gather", weight.gathered(self.sizes) * self.width, *axes)
            cost += gather * (self._gathers * weight.layers)
        if name == "mlp":
            cost += expert_cost(self.config, self.sizes, self.cost, ragged=self.topology.is_tpu)
        gathers = 2 + (1 if repeated.gathers else 0)
        positions = self.cost("all-gather", residual, *SEQUENCE) * gathers
        positions += self.cost("reduce-scatter", residual, *SEQUENCE) * 2
        return cost + positions * self.config.model.total_layers

    def _gathered_over(self, weight: Weight) -> tuple[str, ...]:
        """The mesh axes over which a layer's weight is gathered where it is used: stages have their layers whole."""
        axes = weight.storage_axes(shard_over_data=self.config.mesh.zero == 3)
        return axes if self.pipelined is None else tuple(axis for axis in axes if axis != PIPELINE)

    @property
    def _gathers(self) -> float:
        """How often a microbatch gathers a weight: for the forward and for the backward pass, or once a step."""
        if self.pipelined is None or self.config.pipeline.gather_weights == "layer":
            return 2
        return 1 / self.microbatches / self.pipelined.stretch

    def _gathered(self, part: str) -> list[Weight]:
        zero3 = self.config.mesh.zero == 3
        return [
            weight
            for weight in weights_of(self.config.model)
            if weight.part == part and weight.is_gathered(self.sizes, shard_over_data=zero3)
        ]

    def _weight_bytes(self, part: str) -> float:
        """Bytes of all layers' weights as they are used on a device."""
        weights = (weight for weight in weights_of(self.config.model) if weight.part == part)
        return self.width * sum(weight.gathered(self.sizes) * weight.layers for weight in weights)

    def head(self) -> Part:
        """Three products for every token: logits, and both gradients, made in the forward pass."""
        n, model, shapes = self.microbatches, self.config.model, self.shapes
        n *= 1 + model.mtp_layers
        head = shapes.vocab * model.d_model
        residual = shapes.tokens * model.d_model * self.width
        chunks = -(-shapes.tokens // chunk_tokens(self.config, shapes))
        # Each chunk reads the head twice and adds to its float32 gradient.
        hbm = shapes.tokens * shapes.vocab * LOGIT_BYTES + chunks * head * (2 * self.width + 2 * 4) + 4 * residual
        cost = self.cost("all-gather", head * self.width, *self.storage)
        cost += self.cost("all-gather", residual, *SEQUENCE) + self.cost("reduce-scatter", residual, *SEQUENCE)
        return self.part("head and loss", flops=3 * self.forward_flops()[3], hbm=n * hbm, cost=cost * n)

    def optimizer(self) -> Part:
        """AdamW reads gradient, parameter and two moments, and writes the last three; the norm reads gradients once."""
        zero, stored = self.config.mesh.zero, BYTES[self.config.precision.parameters]
        weights = weights_of(self.config.model)
        elements = sum(weight.at_rest(self.sizes, shard_over_data=zero >= 1) for weight in weights)
        cost = Cost()
        if zero == 1:
            # What was updated in pieces over `data` is brought together again.
            resting = sum(weight.at_rest(self.sizes, shard_over_data=False) for weight in weights)
            cost = self.cost("all-gather", resting * stored, *self.replicas)
        return self.part("optimizer", hbm=8 * elements * stored, cost=cost)

    def gradient_costs(self) -> tuple[Cost, Cost]:
        """Layers' and head's gradients over all axes that share the batch, each microbatch, in the compute format:
        reduce-scattered over the axes that store weights and reduced over the others; and all of it all-reduced.

        Compilers choose: v5e and v6e scatter with the right options, v5p was seen to all-reduce.
        """
        scattered = reduced = Cost()
        zero3 = self.config.mesh.zero == 3
        for weight in weights_of(self.config.model):
            if weight.part == "embedding" and not self.config.model.tied_embeddings:
                continue  # made where it is stored
            if weight.part == "distances":
                continue  # of products that are summed before
            whole = weight.gathered(self.sizes) * self.width
            summed = tuple(axis for axis in TOKENS if axis not in weight.axes_in_use)
            everywhere = self.cost("all-reduce", whole, *summed)
            here = everywhere
            if weight.is_gathered(self.sizes, shard_over_data=zero3):
                piece = weight.at_rest(self.sizes, shard_over_data=zero3) // weight.layers * self.width
                storage = weight.storage_axes(shard_over_data=zero3)
                here = self.cost("reduce-scatter", whole, *(axis for axis in storage if axis in summed))
                here += self.cost("all-reduce", piece, *(axis for axis in summed if axis not in storage))
            scattered += here * weight.layers
            reduced += everywhere * weight.layers
        n = self.microbatches
        return scattered * n, reduced * n
