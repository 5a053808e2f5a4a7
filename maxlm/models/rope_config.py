"""How RoPE is stretched for longer rows: the config section of `models/positions.py`'s scalings. Needs no JAX."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from maxlm.section import Section, key

# What each kind of RoPE scaling is made of, besides `factor`: the keys that it needs and those that it may have.
ROPE_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "ntk": ((), ()),
    "yarn": (
        ("original_max_seq_len",),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("original_max_seq_len", "low_freq_factor", "high_freq_factor"), ()),
}


class RopeScalingConfig(Section):
    """How RoPE's wavelengths are stretched for rows longer than those that a model was first trained on."""

    kind: Literal["linear", "ntk", "yarn", "llama3"] = key(
        ...,
        "linear: positions divided by `factor` (arXiv:2306.15595); ntk: a larger base, which stretches the longest "
        "wavelength by `factor`; yarn: long wavelengths alone, and sharper attention (both arXiv:2309.00071); llama3: "
        "long wavelengths alone, as Llama 3.1",
    )
    factor: float = key(..., "how many times as long rows become", ge=1)
    original_max_seq_len: int | None = key(
        None, "yarn, llama3: the longest row before the stretching", unit="tokens", ge=1
    )
    low_freq_factor: float | None = key(
        None, "llama3: wavelengths over original_max_seq_len / this are stretched in full", gt=0
    )
    high_freq_factor: float | None = key(
        None, "llama3: wavelengths under original_max_seq_len / this are left alone", gt=0
    )
    beta_fast: float | None = key(
        None,
        "yarn: channels that turn oftener than this in original_max_seq_len are left alone; 32 where not given",
        gt=0,
    )
    beta_slow: float | None = key(
        None, "yarn: channels that turn more seldom than this are stretched in full; 1 where not given", gt=0
    )
    attention_factor: float | None = key(
        None, "yarn: turned queries and keys are multiplied by this; 0.1 ln(factor) + 1 where not given", gt=0
    )
    mscale: float | None = key(
        None,
        "yarn in latent attention: attention_factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + "
        "1) where not given (DeepSeek-V2)",
        gt=0,
    )
    mscale_all_dim: float | None = key(
        None, "yarn in latent attention: scores are multiplied by (0.1 mscale_all_dim ln(factor) + 1)^2", gt=0
    )

    truncate: bool | None = key(
        None,
        "yarn: the channels where stretching begins and ends are whole pairs; true where not given (GPT-OSS: false)",
    )

    @model_validator(mode="after")
    def _keys_belong_to_the_kind(self) -> RopeScalingConfig:
        needed, optional = ROPE_SCALINGS[self.kind]
        given = {name for name in type(self).model_fields if getattr(self, name) is not None} - {"kind", "factor"}
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"kind {self.kind!r} needs {', '.join(missing)}")
        if foreign := sorted(given - {*needed, *optional}):
            has = ", ".join(("factor", *needed, *optional))
            raise ValueError(f"{', '.join(foreign)} is not of kind {self.kind!r}, which has {has}; leave it out")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"mscale = {self.mscale} and mscale_all_dim = {self.mscale_all_dim} go together; give both or none"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            less, more = getattr(self.filled_in, low), getattr(self.filled_in, high)
            if less is not None and more is not None and not less < more:
                raise ValueError(f"{low} = {less:g} must be less than {high} = {more:g}")
        return self

    @property
    def filled_in(self) -> RopeScalingConfig:
        """The same with every number that the kind has."""
        if self.kind != "yarn":
            return self
        attention_factor = self._growth(1.0)
        if self.mscale is not None and self.mscale_all_dim is not None:
            attention_factor = self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        numbers: dict[str, float | bool] = {
            "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": attention_factor, "truncate": True
        }  # fmt: skip
        return self.model_copy(update={k: v for k, v in numbers.items() if getattr(self, k) is None})

    @property
    def score_factor(self) -> float:
        """What latent attention multiplies scores by."""
        return 1.0 if self.mscale_all_dim is None else self._growth(self.mscale_all_dim) ** 2

    def _growth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0
