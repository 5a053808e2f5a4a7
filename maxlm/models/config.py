"""What a model is made of: sizes, bricks, precision and loss."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from maxlm.models.latent_config import LatentConfig
from maxlm.models.moe_config import MoEConfig
from maxlm.models.rope_config import RopeScalingConfig
from maxlm.models.stacks import LayerKind, Segment, segments
from maxlm.models.transfer_config import Scales, TransferConfig, misfits
from maxlm.section import Section, key

VOCAB_MULTIPLE = 128

# Names that `checkpoint_name` gives to activations, for remat policy `names`.
REMAT_NAMES = (
    *("layer_input", "q_latent", "kv_latent", "q", "k", "v", "r", "flash_out", "flash_lse", "attention_out"),
    *("mlp_gate", "mlp_up", "mlp_out", "expert_gate", "expert_up"),
)


class RematConfig(Section):
    """Which activations of a layer are kept for the backward pass; the others are computed again."""

    policy: Literal["none", "full", "dots", "names"] = key(
        "none",
        "none: keep everything; full: keep only each layer's input; dots: keep matmul results; names: keep `names`",
    )
    names: tuple[str, ...] = key((), f"activations kept by policy `names`, of {', '.join(REMAT_NAMES)}")
    offload: tuple[str, ...] = key(
        (), "policy `names`: activations kept in the host's memory between forward and backward (TPU and GPU only)"
    )

    @model_validator(mode="after")
    def _names_go_with_policy(self) -> RematConfig:
        if unknown := {*self.names, *self.offload} - set(REMAT_NAMES):
            raise ValueError(
                f"names {sorted(unknown)} are not activations of a layer; they are {', '.join(REMAT_NAMES)}"
            )
        if (self.policy == "names") != bool(self.names or self.offload):
            raise ValueError(
                f"policy {self.policy!r} with names {list(self.names)} and offload {list(self.offload)}: with policy "
                "'names' at least one of them is given, with another none"
            )
        if both := set(self.names) & set(self.offload):
            raise ValueError(f"{sorted(both)} stand in both names and offload; keep each in one memory")
        return self


class ModelConfig(Section):
    """A transformer: its sizes and its bricks."""

    kind: Literal["decoder", "encoder", "encoder_decoder"] = key(
        "decoder",
        "decoder: a token sees those before it; encoder: all of its document (BERT); encoder_decoder: an encoder, and "
        "a decoder whose layers also attend to the encoder's result (arXiv:1706.03762)",
    )
    vocab_size: int = key(..., "tokens in the vocabulary (padded inside to a multiple of 128)", unit="tokens", ge=2)
    n_layers: int = key(..., "transformer layers; of an encoder_decoder, those of its decoder", ge=1)
    n_encoder_layers: int | None = key(
        None, "layers of the encoder of an encoder_decoder; n_layers where not given", ge=1
    )
    decoder_start_id: int = key(0, "the token before the first of an encoder_decoder's decoder", ge=0)
    d_model: int = key(..., "width of the residual stream", ge=1)
    n_heads: int = key(..., "query heads", ge=1)
    n_kv_heads: int | None = key(None, "key and value heads; n_heads where not given, 1 is multi-query", ge=1)
    head_dim: int | None = key(None, "width of a head; d_model / n_heads where not given", ge=1)
    d_ff: int = key(..., "width inside the feed-forward block", ge=1)
    max_seq_len: int = key(2048, "longest sequence that the model is made for", unit="tokens", ge=1)

    norm: Literal["rms", "layer"] = key("rms", "RMSNorm (arXiv:1910.07467) or LayerNorm with bias (arXiv:1607.06450)")
    norm_eps: float = key(1e-5, "added to the variance inside the norms", gt=0)
    norm_unit_offset: bool = key(False, "norms multiply by 1 + scale, and scales start at 0 (Gemma)")
    norm_placement: Literal["pre", "post", "sandwich", "branch"] = key(
        "pre",
        "where norms stand beside a block f: pre: x + f(norm(x)); post: norm(x + f(x)), the original Transformer's; "
        "sandwich: x + norm(f(norm(x))) (Gemma 2); branch: x + norm(f(x)) (OLMo 2). All but post norm the last layer's "
        "result too",
    )
    embedding_scale: bool = key(False, "token vectors are multiplied by sqrt(d_model) (arXiv:1706.03762, section 3.4)")
    embedding_norm: bool = key(False, "a norm of the embeddings' sum, before the first layer (BLOOM, BERT)")
    token_types: int = key(0, "vectors for the parts of a row, added to the embedding (BERT's segments)", ge=0)
    positions: Literal["rope", "learned", "alibi", "sinusoidal", "relative", "transformer_xl"] = key(
        "rope",
        "rotary (arXiv:2104.09864), learned absolute positions, scores lowered in proportion to distance, more or less "
        "in each head (ALiBi, arXiv:2108.12409), sines and cosines of absolute positions (arXiv:1706.03762, section "
        "3.5), numbers learned for distances and added to scores (T5, arXiv:1910.10683), or scores of queries with "
        "projected sines and cosines of distances (Transformer-XL, arXiv:1901.02860; Gopher)",
    )
    relative_buckets: int = key(32, "relative positions: how many ranges of distances there are", ge=4)
    relative_max_distance: int = key(
        128, "relative positions: from this distance on all are alike", unit="tokens", ge=1
    )
    position_offset: int = key(
        0, "rows of the learned positions' table before that of the first position; OPT has 2", unit="rows", ge=0
    )
    rope_theta: float = key(10_000.0, "base of RoPE's wavelengths", gt=0)
    rope_fraction: float = key(
        1.0, "part of a head's channels that RoPE turns, the first ones; the others pass (GPT-NeoX)", gt=0, le=1
    )
    rope_scaling: RopeScalingConfig | None = key(None, "stretches RoPE's wavelengths for longer rows; null: none")
    attention_bias: bool = key(False, "biases on the query, key and value projections")
    attention_out_bias: bool = key(False, "a bias on attention's output projection")
    attention_scale: float | None = key(None, "scores are queries by keys times this; null: 1 / sqrt(head_dim)", gt=0)
    qk_norm: Literal["none", "head", "all"] = key(
        "none",
        "RMSNorm of queries and keys before RoPE: head: over each head (arXiv:2302.05442); all: over all heads of a "
        "token together (OLMo 2)",
    )
    latent: LatentConfig | None = key(
        None, "multi-head latent attention, with its own widths of heads; null: the usual attention"
    )
    attention_window: int | None = key(
        None,
        "a token attends to itself and the tokens before it, so many in all (Mistral, arXiv:2310.06825); null: to all",
        unit="tokens",
        ge=1,
    )
    attention_chunk: int | None = key(
        None,
        "a token attends to its own chunk of so many positions of the row, those before it alone in a decoder (Llama "
        "4); with attention_window too, to what both leave; null: no chunks",
        unit="tokens",
        ge=1,
    )
    attention_global_tokens: int = key(
        0,
        "window and chunk do not bind the first so many positions of a row: they attend to all, and all to them, in a "
        "decoder only backwards (Longformer, arXiv:2004.05150, section 3.1, by the same projections as all others). Of "
        "a row with several documents they are the first one's",
        unit="tokens",
        ge=0,
    )
    attention_pattern: tuple[Literal["local", "global"], ...] = key(
        (),
        "attention of the layers in turn, repeated over the model: local sees attention_window positions or an "
        "attention_chunk, global all; empty: all layers are local where one of these is given, else global",
    )
    local_rope_theta: float | None = key(
        None, "base of RoPE's wavelengths in local layers, not scaled (Gemma 3); as the others' where not given", gt=0
    )
    attention_softcap: float | None = key(None, "attention scores are softcap * tanh(scores / softcap)", gt=0)
    attention_sinks: bool = key(
        False,
        "a trained score a head that takes its share of each softmax and has no value (GPT-OSS, arXiv:2508.10925)",
    )
    attention_implementation: Literal["auto", "reference", "chunked", "pallas"] = key(
        "auto", "which attention kernel runs; auto: pallas on TPUs where it takes the shapes, chunked elsewhere"
    )
    context_attention: Literal["ring", "all_to_all"] = key(
        "ring",
        "how a token sees its whole row where mesh.context shares rows: ring: keys and values go from device to device "
        "(arXiv:2310.01889), by the chunked kernel; all_to_all: devices exchange positions for heads, which they must "
        "divide (arXiv:2309.14509)",
    )
    mlp: Literal["swiglu", "swiglu_clamped", "geglu", "gelu", "gelu_exact", "silu", "relu", "relu2"] = key(
        "swiglu",
        "gated by SiLU, clamped as in GPT-OSS (arXiv:2508.10925) or not, or by GELU (arXiv:2002.05202), or plain with "
        "GELU (by tanh, or exact), SiLU, ReLU or squared ReLU (arXiv:2109.08668)",
    )
    mlp_bias: bool = key(False, "biases in the feed-forward block")
    moe: MoEConfig | None = key(
        None, "experts in place of the feed-forward block, in the layers that it says; null: in none"
    )
    parallel_residual: bool = key(
        False,
        "the feed-forward block reads the layer's input, as attention does, and not its result (arXiv:2204.06745)",
    )
    mtp_layers: int = key(
        0,
        "modules that in training predict one token further ahead each, weighed by loss.mtp_weight (multi-token "
        "prediction, DeepSeek-V3, arXiv:2412.19437, section 2.2)",
        ge=0,
    )
    tied_embeddings: bool = key(False, "the output head is the token embedding")
    head_transform: bool = key(False, "a dense layer, GELU and a LayerNorm before the output projection (BERT)")
    head_bias: bool = key(False, "a bias on the logits")
    next_sentence_head: bool = key(
        False, "BERT's second head on the first token of a row: a dense layer, tanh, and two logits (arXiv:1810.04805)"
    )
    logit_scale: float = key(1.0, "logits are multiplied by this; T5 with a tied head has 1 / sqrt(d_model)", gt=0)
    logit_softcap: float | None = key(None, "logits are softcap * tanh(logits / softcap)", gt=0)
    init_std: float = key(0.02, "standard deviation of the initial weights", gt=0)
    residual_init_scaling: bool = key(
        True, "projections into the residual stream start smaller, by 1 / sqrt(2 n_layers) (GPT-2)"
    )
    transfer: TransferConfig | None = key(
        None,
        "learning rate, initial weights and multipliers are a base model's, scaled to this size; null: they are "
        "this model's own",
    )
    remat: RematConfig = key(RematConfig(), "what the backward pass keeps and what it computes again")

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelConfig:
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}")
        if self.head_dim is None and self.latent is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model = {self.d_model} is not a multiple of n_heads = {self.n_heads}; give head_dim")
        if self.mtp_layers and self.positions == "learned":
            raise ValueError(
                f"mtp_layers = {self.mtp_layers} with positions = 'learned': a token's position vector would go in "
                "twice; choose positions = 'rope', or no mtp_layers"
            )
        return self

    @model_validator(mode="after")
    def _latent_fits(self) -> ModelConfig:
        scaling = self.rope_scaling
        if self.latent is None:
            if scaling is not None and scaling.mscale is not None:
                raise ValueError("rope_scaling.mscale is latent attention's, and latent is not given; leave it out")
            return self
        if self.positions != "rope":
            raise ValueError(f"latent attention turns channels by RoPE, and positions = {self.positions!r}")
        if self.kv_heads != self.n_heads:
            raise ValueError(
                f"n_kv_heads = {self.n_kv_heads} with latent: every head has its own keys and values, n_heads = "
                f"{self.n_heads}; leave it out"
            )
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        others = ("attention_bias", "qk_norm", "rope_fraction")
        foreign = [name for name in others if getattr(self, name) != defaults[name]]
        if self.head_dim not in (None, self.latent.qk_head_dim):
            foreign.append("head_dim")
        if foreign:
            given = ", ".join(f"{name} = {getattr(self, name)!r}" for name in foreign)
            raise ValueError(f"{given}: not of latent attention, whose sizes stand in latent; leave it out")
        return self

    @model_validator(mode="after")
    def _norms_fit(self) -> ModelConfig:
        if self.parallel_residual and self.norm_placement != "pre":
            raise ValueError(
                f"parallel_residual goes with norm_placement = 'pre' alone, and it is {self.norm_placement!r}"
            )
        return self

    @model_validator(mode="after")
    def _kind_fits(self) -> ModelConfig:
        only = {
            "encoder_decoder": {"n_encoder_layers": None, "decoder_start_id": 0},
            "encoder": {"token_types": 0, "next_sentence_head": False},
        }
        for kind, defaults in only.items():
            for name, default in defaults.items():
                if self.kind != kind and getattr(self, name) != default:
                    raise ValueError(
                        f"{name} = {getattr(self, name)!r} is of kind = {kind!r}, and kind = {self.kind!r}; leave it "
                        "out"
                    )
        if self.decoder_start_id >= self.vocab_size:
            raise ValueError(f"decoder_start_id = {self.decoder_start_id} is not under vocab_size = {self.vocab_size}")
        if self.kind == "encoder_decoder":
            for name in ("attention_window", "attention_chunk", "parallel_residual"):
                if getattr(self, name):
                    raise ValueError(f"{name} does not go with kind = 'encoder_decoder'; leave it out")
        if self.kind != "decoder" and self.positions == "alibi":
            raise ValueError(f"positions = 'alibi' goes with kind = 'decoder' alone, and it is {self.kind!r}")
        return self

    @model_validator(mode="after")
    def _positions_fit(self) -> ModelConfig:
        if self.position_offset and self.positions != "learned":
            raise ValueError(
                f"position_offset = {self.position_offset} is of learned positions, and positions = "
                f"{self.positions!r}; leave it out"
            )
        if self.positions in ("sinusoidal", "transformer_xl") and self.d_model % 2:
            raise ValueError(f"d_model = {self.d_model} is odd, and half of it are sines of positions, half cosines")
        if self.kind == "encoder_decoder" and self.positions == "transformer_xl":
            raise ValueError(
                "positions = 'transformer_xl' does not go with kind = 'encoder_decoder'; choose 'relative'"
            )
        buckets, farthest = self.relative_buckets, self.relative_max_distance
        if self.positions == "relative" and (buckets % 4 or farthest <= buckets // 2):
            raise ValueError(
                f"relative_buckets = {buckets}, relative_max_distance = {farthest}: the buckets must be a multiple of "
                "4, and the distance more than half of them"
            )
        return self

    @model_validator(mode="after")
    def _rope_fits(self) -> ModelConfig:
        if self.positions != "rope":
            if self.rope_scaling is not None or self.rope_fraction != 1:
                name = "rope_fraction" if self.rope_scaling is None else "rope_scaling"
                raise ValueError(f"{name} is given, and positions = {self.positions!r} are not RoPE's; leave it out")
            return self
        if self.head_width % 2 and self.rope_fraction == 1:
            raise ValueError(f"head_dim = {self.head_width} is odd, and RoPE turns pairs of channels")
        if self.rope_width % 2 or not self.rope_width:
            raise ValueError(
                f"rope_fraction = {self.rope_fraction:g} of head_dim = {self.head_width} is {self.rope_width} "
                "channels, and RoPE turns pairs of them; choose another fraction"
            )
        if self.rope_scaling is not None and self.rope_scaling.kind == "ntk" and self.rope_width == 2:
            raise ValueError("rope_scaling.kind = 'ntk' changes all wavelengths but the first, and 2 channels have one")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta = {self.rope_theta:g} must be over 1 with rope_scaling.kind = 'yarn'")
        return self

    @model_validator(mode="after")
    def _pattern_fits(self) -> ModelConfig:
        pattern = self.attention_pattern
        if len(pattern) > self.n_layers:
            raise ValueError(f"attention_pattern names {len(pattern)} layers, and n_layers = {self.n_layers}")
        bounds = [name for name in ("attention_window", "attention_chunk") if getattr(self, name) is not None]
        if "local" in pattern and not bounds:
            raise ValueError("attention_pattern has local layers; give attention_window or attention_chunk")
        if pattern and "local" not in pattern and bounds:
            raise ValueError(f"{' and '.join(bounds)} given, and no layer of attention_pattern is local; leave it out")
        if self.attention_global_tokens and not bounds:
            raise ValueError(
                f"attention_global_tokens = {self.attention_global_tokens}, and no layer is local: every token attends "
                "to all; give attention_window or attention_chunk, or leave it out"
            )
        if self.local_rope_theta is not None and (
            self.positions != "rope" or not any(k.local for k in self.layer_kinds)
        ):
            raise ValueError("local_rope_theta is given, and no layer is local and turned by RoPE; leave it out")
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> ModelConfig:
        if self.moe is not None and self.moe.first_layer >= self.n_layers:
            raise ValueError(
                f"moe.first_layer = {self.moe.first_layer} is behind the last of n_layers = {self.n_layers} layers, "
                "and no layer has experts; leave moe out"
            )
        return self

    @model_validator(mode="after")
    def _transfer_fits(self) -> ModelConfig:
        if problems := misfits(self):
            raise ValueError("\n".join(problems))
        return self

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer; of an encoder_decoder, those of its decoder."""
        bound = self.attention_window is not None or self.attention_chunk is not None
        pattern = self.attention_pattern or ("local" if bound else "global",)
        causal, cross = self.kind != "encoder", self.kind == "encoder_decoder"
        return tuple(
            LayerKind(
                local=pattern[i % len(pattern)] == "local",
                experts=self.moe is not None and self.moe.in_layer(i),
                causal=causal,
                cross=cross,
            )
            for i in range(self.n_layers)
        )

    @property
    def sides(self) -> dict[str, tuple[LayerKind, ...]]:
        """The kinds of the layers of `encoder` and `decoder`, of which a model has one or both."""
        if self.kind != "encoder_decoder":
            return {self.kind: self.layer_kinds}
        encoder = (LayerKind(causal=False),) * (self.n_encoder_layers or self.n_layers)
        return {"encoder": encoder, "decoder": self.layer_kinds}

    @property
    def total_layers(self) -> int:
        """Layers of both sides, and of the modules that predict further ahead."""
        return sum(map(len, self.sides.values())) + self.mtp_layers

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The layers as they are stacked and run; of an encoder_decoder, those of its decoder."""
        return segments(self.layer_kinds)

    @property
    def rope_width(self) -> int:
        """Channels of a head that RoPE turns."""
        if self.latent is not None:
            return self.latent.rope_head_dim
        return int(self.head_width * self.rope_fraction)

    @property
    def norms_before(self) -> bool:
        """Whether a block's input is normed."""
        return self.norm_placement in ("pre", "sandwich")

    @property
    def norms_after(self) -> bool:
        """Whether a block's result is normed, alone or with the residual stream."""
        return self.norm_placement != "pre"

    @property
    def kv_heads(self) -> int:
        """Key and value heads, filled in."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """Width of a head of queries and keys, filled in."""
        if self.latent is not None:
            return self.latent.qk_head_dim
        return self.head_dim or self.d_model // self.n_heads

    @property
    def value_width(self) -> int:
        """Width of a head of values."""
        return self.head_width if self.latent is None else self.latent.v_head_dim

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block multiplies by a gate."""
        return self.mlp in ("swiglu", "swiglu_clamped", "geglu")

    @property
    def scales(self) -> Scales:
        """What this size makes of a base model's numbers."""
        return Scales.of(self)

    @property
    def hidden_init_std(self) -> float:
        """Standard deviation of matrices between widths when they start."""
        return self.init_std * self.scales.hidden_init

    @property
    def residual_init_std(self) -> float:
        """Standard deviation of projections into the residual stream when they start."""
        base_depth = self.transfer.base_depth if self.transfer is not None else None
        n_layers = base_depth or self.n_layers
        return self.hidden_init_std / (2 * n_layers) ** 0.5 if self.residual_init_scaling else self.hidden_init_std

    @property
    def score_scale(self) -> float | None:
        """What attention multiplies scores by; None: 1 / sqrt(head_dim)."""
        if (factor := self.scales.scores) == 1:
            return self.attention_scale
        return factor * (self.attention_scale or self.head_width**-0.5)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up, so that every mesh divides it."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class PrecisionConfig(Section):
    """Number formats. Norms, softmax, router and loss are float32 whatever stands here."""

    parameters: Literal["float32", "bfloat16"] = key("float32", "format of the weights and of the optimizer state")
    compute: Literal["float32", "bfloat16"] = key("bfloat16", "format of matmul inputs and activations")


class LossConfig(Section):
    """Cross-entropy of a batch's targets, and that of tokens further ahead."""

    z_loss: float = key(
        0.0, "weight of the squared log-partition in the loss (PaLM, arXiv:2204.02311, section 5)", ge=0
    )
    label_smoothing: float = key(
        0.0, "part of each target that is spread over the whole vocabulary (arXiv:1706.03762, section 5.4)", ge=0, lt=1
    )
    mtp_weight: float = key(
        0.3,
        "weight of the mean loss of model.mtp_layers (arXiv:2412.19437, equation 25; DeepSeek-V3 had 0.3 for the first "
        "10T tokens, then 0.1)",
        ge=0,
    )
    chunk_tokens: int | None = key(
        None, "tokens whose logits exist at once on a device; chosen by memory where not given", unit="tokens", ge=1
    )
