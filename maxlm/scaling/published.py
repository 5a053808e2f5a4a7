"""Published laws, to stand beside ours: their constants as printed, and the size that each would have for a budget."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from maxlm.scaling.allocation import best_split
from maxlm.scaling.laws import find_law

PF_DAY = 1e15 * 24 * 3600
KAPLAN_SIZE, KAPLAN_EXPONENT = 1.3e9, 0.73


@dataclass(frozen=True)
class Published:
    """A paper's answer. `a` and `b` are the exponents of N*(C) and D*(C) as the paper prints them."""

    name: str
    paper: str
    a: float
    b: float
    parameters: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def size(self, flops: float) -> float | None:
        """N* for a budget, where the paper says enough to tell."""
        if self.name == KAPLAN.name:
            return KAPLAN_SIZE * (flops / PF_DAY) ** KAPLAN_EXPONENT
        if not self.parameters:
            return None
        law = find_law("chinchilla")
        return float(best_split(law, np.array([[self.parameters[name] for name in law.parameters]]), flops)[0][0])


# Table A.1 and figure 14 of arXiv:2001.08361: N = 1.3e9 C^0.73 and D = 2e10 C^0.27, C in PF-days.
KAPLAN = Published(
    "Kaplan et al. 2020",
    "arXiv:2001.08361",
    0.73,
    0.27,
    note="parameters without embeddings; N* = 1.3e9 C^0.73, C in PF-days",
)
KAPLAN_ND = {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}
"""L(N, D) of Kaplan et al., table 2"""
HOFFMANN = (
    Published("Hoffmann et al. 2022, approach 1", "arXiv:2203.15556", 0.50, 0.50, note="training curves' envelope"),
    Published("Hoffmann et al. 2022, approach 2", "arXiv:2203.15556", 0.49, 0.51, note="isoFLOP parabolas"),
    Published(
        "Hoffmann et al. 2022, approach 3", "arXiv:2203.15556", 0.46, 0.54,
        {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}, "the parametric law, of constants rounded",
    ),
)  # fmt: skip
REFIT = Published(
    "Besiroglu et al. 2024, re-fit", "arXiv:2404.10102", 0.513, 0.487,
    {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    "the parametric law fitted anew to Hoffmann et al.'s runs",
)  # fmt: skip
PUBLISHED = (*HOFFMANN, REFIT, KAPLAN)
PARAMETRIC = (HOFFMANN[2], REFIT)
