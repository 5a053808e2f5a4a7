"""The compute-optimal split of a FLOP budget between parameters and tokens, C = 6ND, in closed form."""

from __future__ import annotations

import numpy as np

from maxlm.scaling.law import Law

SPLITS = ("chinchilla", "over-training", "kaplan-nd")


def best_split(law: Law, natural: np.ndarray, flops: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N*, D* and the loss there, `[S]` each, of a budget, for parameters `natural [S, p]` of a law in `SPLITS`.

    chinchilla: N* = G (C / 6)^(beta / (alpha + beta)), G = (alpha A / (beta B))^(1 / (alpha + beta)) (arXiv:2203.15556,
    eq. 4). over-training: a M^eta = b M^-eta. kaplan-nd: where the derivative along ND = C / 6 is 0. Where a
    coefficient is 0 there is no optimum, and all three are NaN.
    """
    named = dict(zip(law.parameters, natural.T, strict=True))
    nd = flops / 6
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if law.name == "chinchilla":
            alpha, beta = named["alpha"], named["beta"]
            both = alpha + beta
            log_g = (np.log(alpha) + np.log(named["A"]) - np.log(beta) - np.log(named["B"])) / both
            size = np.exp(log_g + beta / both * np.log(nd))
            loss = named["E"] + named["A"] / size**alpha + named["B"] / (nd / size) ** beta
        elif law.name == "over-training":
            log_ratio = (np.log(named["b"]) - np.log(named["a"])) / (2 * named["eta"])
            size = np.exp((np.log(nd) - log_ratio) / 2)
            loss = named["E"] + 2 * np.sqrt(named["a"] * named["b"]) * flops ** -named["eta"]
        elif law.name == "kaplan-nd":
            rho = named["alpha_N"] / named["alpha_D"]
            log_size = np.log(rho) + rho * np.log(named["N_c"]) + np.log(nd) - np.log(named["D_c"])
            size = np.exp(log_size / (1 + rho))
            loss = ((named["N_c"] / size) ** rho + named["D_c"] * size / nd) ** named["alpha_D"]
        else:
            raise ValueError(f"no closed form for {law.name}; there is one for {', '.join(SPLITS)}")
        found = np.stack([size, nd / size, loss])
    size, tokens, loss = np.where(np.all(np.isfinite(found) & (found > 0), axis=0), found, np.nan)
    return size, tokens, loss
