"""From a fitted law to the model to train: the best size and tokens of a FLOP budget, under what there is of data, of
memory, and of tokens to be served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maxlm.errors import ConfigError
from maxlm.scaling.result import Estimate, FitOptions, FitResult
from maxlm.scaling.surface import SURFACES, Surface, least
from maxlm.scaling.table import RunTable

if TYPE_CHECKING:
    from maxlm.scaling.hardware import Hardware
    from maxlm.scaling.next_model import NextModel

APPROACHES = ("approach1", "approach2")
OPTIMUM_LAWS = (*SURFACES, *APPROACHES)

TRAINING_FLOPS, SERVING_FLOPS = 6, 2
"""of a parameter and token (Kaplan et al., arXiv:2001.08361, section 2.1)"""
# A cap binds where the optimum lies on it.
ON_THE_CAP = 1e-6
# A loss that a cap changes by less is the same loss, to rounding.
NO_COST = 1e-9


@dataclass(frozen=True)
class Question:
    """A FLOP budget, and what bounds the answer.

    With `served_tokens` T the budget is of training and serving together, 6ND + 2NT (Sardana et al., arXiv:2401.00448,
    section 2). With `same_loss` besides, `flops` are of training and set the loss, that of their compute-optimal model,
    and the fewest FLOPs in all are sought that reach it (their problem). `unique_tokens` are what there is of data: by
    the law data-constrained they may be repeated, else they are a bound, as `max_tokens` is by every law.
    """

    flops: float
    served_tokens: float = 0.0
    same_loss: bool = False
    max_tokens: float | None = None
    unique_tokens: float | None = None
    max_params: float | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    """where bounds come from, in words, by field, where that is not the field itself: memory, days"""


@dataclass(frozen=True)
class Split:
    """A size, its tokens, their loss (None where the law tells none) and FLOPs."""

    n_params: Estimate
    n_tokens: Estimate
    loss: Estimate | None
    training_flops: Estimate
    serving_flops: Estimate

    @property
    def tokens_per_parameter(self) -> float:
        return self.n_tokens.value / self.n_params.value


@dataclass(frozen=True)
class Binding:
    """A constraint that the optimum lies on, in words, and what it costs: the loss above that of the optimum without
    it, or with `same_loss` FLOPs in all, as a fraction."""

    name: str
    message: str
    loss_cost: Estimate | None = None
    flops_cost: Estimate | None = None


@dataclass(frozen=True)
class Answer:
    """`best` under all constraints; `plain`, the compute-optimal split of the same FLOPs under none."""

    question: Question
    fit: FitResult
    best: Split
    plain: Split
    binding: tuple[Binding, ...]
    notes: tuple[str, ...]
    extrapolation: float
    """the training FLOPs over those of the table's largest run"""
    model: NextModel | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return {
            "law": self.fit.law,
            "trusted": self.fit.trusted,
            "verdict": self.fit.verdict,
            "warnings": self.fit.warnings,
            "question": asdict(self.question),
            "optimum": asdict(self.best),
            "compute_optimal": asdict(self.plain),
            "binding": [asdict(each) for each in self.binding],
            "notes": list(self.notes),
            "extrapolation": self.extrapolation,
            "parameters": {name: asdict(value) for name, value in self.fit.parameters.items()},
            "model": None if self.model is None else self.model.to_dict(),
        }


@dataclass(frozen=True)
class Solved:
    """Sizes, tokens and losses of all samples `[S]`, the fit itself first; `flops` in all."""

    size: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray | None
    served: float

    @property
    def flops(self) -> np.ndarray:
        return self.size * (TRAINING_FLOPS * self.tokens + SERVING_FLOPS * self.served)

    def split(self) -> Split:
        def estimate(values: np.ndarray) -> Estimate:
            return Estimate.of(values[0], values[1:])

        return Split(
            n_params=estimate(self.size),
            n_tokens=estimate(self.tokens),
            loss=None if self.loss is None else estimate(self.loss),
            training_flops=estimate(TRAINING_FLOPS * self.size * self.tokens),
            serving_flops=estimate(SERVING_FLOPS * self.size * self.served),
        )


def optimum(
    table: FitResult | RunTable | Path | str,
    question: Question,
    law: str = "chinchilla",
    options: FitOptions | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    base: str | Path | None = None,
    hardware: Hardware | None = None,
) -> Answer:
    """The best size and tokens of a budget, with 95% intervals of the law's bootstrap, and a model of that size.

    Args:
        table: runs, their file or sweep's folder, to which `law` is fitted with `options`; or a fit.
        base: a config, or a sweep's specification, whose family the model is of (`next_model.py`); None: numbers alone.
        hardware: the devices that the model must fit, with `base`; their days are a bound of `flops` if they say so.

    Raises ConfigError where a constraint asks what the law does not tell, or leaves nothing; DataError as `fit`.
    """
    from maxlm.scaling.fitting import fit

    check(question, table.law if isinstance(table, FitResult) else law)
    if not isinstance(table, FitResult):
        options = replace(options or FitOptions(), budgets=(question.flops,))
        table = fit(table, law, options, columns=columns)
    if base is None:
        return answer(table, question)
    from maxlm.scaling.next_model import next_model

    return next_model(table, question, base, hardware)


def check(question: Question, law: str) -> None:
    """Raises ConfigError where the law cannot answer, naming what can."""
    if law not in OPTIMUM_LAWS:
        raise ConfigError(f"law {law} does not split a budget into size and tokens; {', '.join(OPTIMUM_LAWS)} do")
    for name in ("flops", *FIELDS):
        value = getattr(question, name)
        if value is not None and not (0 < value < np.inf or (name == "served_tokens" and value == 0)):
            raise ConfigError(f"{name} = {value:g}: must be a finite number above 0")
    if law in APPROACHES and question.served_tokens:
        raise ConfigError(f"{law} tells no losses, which served tokens are weighed by; take --law chinchilla")
    if question.same_loss and not question.served_tokens:
        raise ConfigError("the same loss for the fewest FLOPs is asked of tokens to be served; give --served-tokens")
    if law == "data-constrained" and question.same_loss:
        raise ConfigError("law data-constrained does not answer --same-loss: ask within a budget, or take another law")


def answer(fit: FitResult, question: Question) -> Answer:
    """`optimum` of a fit, without a model."""
    check(question, fit.law)
    plain_question = Question(question.flops)
    best, plain = solve(fit, question), solve(fit, plain_question)
    if not np.isfinite(best.size[0]):
        raise ConfigError(_nothing(fit, question, plain))
    largest = float(np.max(fit.rows.columns["flops"]))
    trained = TRAINING_FLOPS * float(best.size[0] * best.tokens[0])
    return Answer(
        question=question,
        fit=fit,
        best=best.split(),
        plain=plain.split(),
        binding=tuple(bindings(fit, question, best)),
        notes=tuple(notes(fit, question, best, trained, largest)),
        extrapolation=trained / largest,
    )


def samples_of(fit: FitResult) -> np.ndarray:
    """The parameters of the fit and of its bootstrap, `[1 + B, p]`."""
    natural = np.array([[estimate.value for estimate in fit.parameters.values()]])
    return np.concatenate([natural, fit.samples])


def surface_of(fit: FitResult, unique_tokens: float | None = None) -> Surface:
    """The loss of a fit and its bootstrap."""
    return Surface(fit.law, tuple(fit.parameters), samples_of(fit), unique_tokens)


def token_cap(law: str, question: Question) -> float:
    """The most tokens that may be trained on; infinite where there is no bound."""
    unique = None if law == "data-constrained" else question.unique_tokens
    return min(question.max_tokens or np.inf, unique or np.inf)


def solve(fit: FitResult, question: Question) -> Solved:
    """The optimum of every sample; NaN where one has none.

    Along a budget the tokens of a size follow: D = (C / N - 2T) / 6, and no more than there are. The loss as a function
    of log N falls to its minimum and rises after it, and is minimised there by golden section.
    """
    if fit.law in APPROACHES:
        return _power_laws(fit, question)
    surface = surface_of(fit, question.unique_tokens)
    cap, rows = token_cap(fit.law, question), len(surface.natural)
    if question.same_loss:
        return _fewest_flops(fit, surface, question)

    def tokens(size: np.ndarray) -> np.ndarray:
        left = (question.flops / size - SERVING_FLOPS * question.served_tokens) / TRAINING_FLOPS
        return np.where(left > 0, np.minimum(left, cap), np.nan)

    def loss(log_size: np.ndarray) -> np.ndarray:
        size = np.exp(log_size)
        return surface.loss(size, tokens(size))

    most = question.flops / (TRAINING_FLOPS + SERVING_FLOPS * question.served_tokens)
    capped = question.max_params is not None and question.max_params < most
    highest = np.log(question.max_params if capped and question.max_params else most)
    if not highest > 0:
        nothing = np.full(rows, np.nan)
        return Solved(nothing, nothing, nothing, question.served_tokens)
    log_size, found, end = least(loss, np.zeros(rows), np.full(rows, highest))
    size = np.where((end == 0) | ((end > 0) & capped), np.exp(log_size), np.nan)
    return Solved(size, tokens(size), np.where(np.isnan(size), np.nan, found), question.served_tokens)


def _fewest_flops(fit: FitResult, surface: Surface, question: Question) -> Solved:
    """The least 6ND + 2NT of those that have the loss of the compute-optimal model of `flops`, sample by sample."""
    cap, rows = token_cap(fit.law, question), len(surface.natural)
    plain = solve(fit, Question(question.flops))
    assert plain.loss is not None
    target = plain.loss[:, None]

    def flops(log_size: np.ndarray) -> np.ndarray:
        size = np.exp(log_size)
        tokens = surface.tokens_for(size, target)
        total = np.log(size) + np.log(TRAINING_FLOPS * tokens + SERVING_FLOPS * question.served_tokens)
        return np.where(tokens <= cap * (1 + NO_COST), total, np.inf)

    # Serving only makes models smaller; where the tokens are too few for that they are larger, by at most so much.
    highest = np.log(plain.size) + np.log(1e4)
    capped = np.zeros(rows, bool)
    if question.max_params is not None:
        capped = np.log(question.max_params) < highest
        highest = np.minimum(highest, np.log(question.max_params))
    # From the least size that can have the loss at all: below it there is nothing to compare.
    low = _least_size(surface, plain.loss, cap, highest)
    log_size, _, end = least(flops, low, highest)
    fine = (end == 0) | ((end > 0) & capped) | ((end < 0) & np.isfinite(cap))
    size = np.where(fine, np.exp(log_size), np.nan)
    tokens = np.minimum(surface.tokens_for(size, plain.loss), cap)
    return Solved(size, tokens, np.where(np.isnan(size), np.nan, plain.loss), question.served_tokens)


def _least_size(surface: Surface, loss: np.ndarray, cap: float, highest: np.ndarray) -> np.ndarray:
    """log of the smallest size that has the loss after no more than `cap` tokens, by bisection, from above."""
    low, high = np.zeros_like(highest), highest.copy()
    for _ in range(80):
        middle = (low + high) / 2
        there = surface.tokens_for(np.exp(middle), loss) <= cap * (1 + 1e-12)
        there &= np.isfinite(surface.tokens_for(np.exp(middle), loss))
        low, high = np.where(there, low, middle), np.where(there, middle, high)
    return high


def _power_laws(fit: FitResult, question: Question) -> Solved:
    """N* = k_N C^a and D* = k_D C^b; bounds move along 6ND = C as far as they must."""
    a, b, k_n, k_d = samples_of(fit).T
    size, tokens = k_n * question.flops**a, k_d * question.flops**b
    cap = token_cap(fit.law, question)
    over = tokens > cap
    size = np.where(over, question.flops / (TRAINING_FLOPS * cap), size)
    tokens = np.minimum(tokens, cap)
    if question.max_params is not None:
        over = size > question.max_params
        rest = np.minimum(question.flops / (TRAINING_FLOPS * question.max_params), cap)
        size, tokens = np.where(over, question.max_params, size), np.where(over, rest, tokens)
    return Solved(size, tokens, None, 0.0)


FIELDS = {
    "max_params": ("the size is", "parameters"),
    "max_tokens": ("the tokens are", "tokens"),
    "unique_tokens": ("the tokens are", "unique tokens"),
    "served_tokens": ("serving is", "tokens"),
}


def bindings(fit: FitResult, question: Question, best: Solved) -> list[Binding]:
    """The constraints that the optimum lies on, each with what lifting it alone would save."""
    size, tokens = float(best.size[0]), float(best.tokens[0])
    on = {
        "max_params": question.max_params is not None and size >= question.max_params * (1 - ON_THE_CAP),
        "max_tokens": question.max_tokens is not None and tokens >= question.max_tokens * (1 - ON_THE_CAP),
        "unique_tokens": question.unique_tokens is not None and tokens >= question.unique_tokens * (1 - ON_THE_CAP),
        "served_tokens": question.served_tokens > 0,
    }
    return [_binding(fit, question, best, name) for name, binds in on.items() if binds]


def _binding(fit: FitResult, question: Question, best: Solved, name: str) -> Binding:
    lifted = replace(question, **{name: 0.0 if name == "served_tokens" else None})
    if name == "served_tokens" and question.same_loss:
        lifted = Question(question.flops)
    without = solve(fit, lifted)
    what, unit = FIELDS[name]
    value = float(getattr(question, name))
    if name == "served_tokens":
        told = f"serving {value:.4g} tokens is paid for"
    elif name == "unique_tokens" and best.tokens[0] > value * (1 + ON_THE_CAP):
        told = f"the tokens are bound: {best.tokens[0] / value:.3g} passes over {value:.4g} unique ones"
    else:
        told = f"{what} bound: at most {value:.4g} {unit}" + (
            f" ({why})" if (why := question.reasons.get(name)) else ""
        )
    if np.isfinite(without.size[0]):
        told += f"; without that {without.size[0]:.4g} parameters and {without.tokens[0]:.4g} tokens were best"
    if question.same_loss:
        return _flops_cost(name, told, question, best, without)
    if best.loss is None or without.loss is None:
        return Binding(name, f"{told}; {fit.law} tells no losses, so not what it costs")
    difference = best.loss - without.loss
    cost = Estimate.of(difference[0], difference[1:])
    return Binding(name, f"{told}; it costs {_interval(cost, 1, ' nats')}", loss_cost=cost)


def _flops_cost(name: str, told: str, question: Question, best: Solved, without: Solved) -> Binding:
    """What is paid for a bound in FLOPs, where the loss is given; for serving, against the compute-optimal model that
    serves as much."""
    if name == "served_tokens":
        total = without.size * (TRAINING_FLOPS * without.tokens + SERVING_FLOPS * question.served_tokens)
        more = best.flops / total - 1
        change = Estimate.of(more[0], more[1:])
        text = f"{told}; against the {total[0]:.4g} FLOPs that take that model through training and serving this is"
        return Binding(name, f"{text} {_interval(change, 100, '%')}", flops_cost=change)
    more = best.flops / without.flops - 1
    cost = Estimate.of(more[0], more[1:])
    return Binding(name, f"{told}; it costs {_interval(cost, 100, '%')} of FLOPs", flops_cost=cost)


def _interval(estimate: Estimate, scale: float, unit: str) -> str:
    """A value, and its interval where there is one that is wider than rounding."""
    told = f"{scale * estimate.value:.3g}{unit}"
    if np.isnan(estimate.low):
        return told
    return f"{told} ({scale * estimate.low:.3g} to {scale * estimate.high:.3g})"


def notes(fit: FitResult, question: Question, best: Solved, trained: float, largest: float) -> list[str]:
    """What else has to be said of the answer."""
    found = []
    if trained > largest:
        told = f"extrapolating: {trained:.3g} training FLOPs are {trained / largest:.3g} times the table's largest run"
        found.append(f"{told}, {largest:.3g}")
    if not question.same_loss and best.flops[0] < question.flops * (1 - ON_THE_CAP) and fit.law not in APPROACHES:
        share = best.flops[0] / question.flops
        found.append(f"size and tokens are both bound: {share:.1%} of the budget is used, more FLOPs buy nothing")
    if fit.law == "kaplan-nd":
        found.append("parameters are counted without embeddings, as in kaplan-nd")
    if fit.law == "data-constrained" and question.unique_tokens is None:
        found.append("no unique tokens are given: all are taken to be fresh")
    if question.unique_tokens is not None and fit.law != "data-constrained":
        found.append(f"{fit.law} knows nothing of repeated tokens: one pass at most; --law data-constrained does")
    column = "n_params_nonembedding" if fit.law == "kaplan-nd" else "n_params"
    ratio, ratios = best.tokens[0] / best.size[0], fit.rows.columns["n_tokens"] / fit.rows.columns[column]
    if not np.min(ratios) <= ratio <= np.max(ratios):
        seen = f"{np.min(ratios):.3g} to {np.max(ratios):.3g}"
        found.append(f"{ratio:.3g} tokens a parameter are outside what the table's runs have, {seen}")
    lost = int(np.isnan(best.size[1:]).sum())
    if lost > 0.01 * max(len(best.size) - 1, 1):
        found.append(f"{lost} of {len(best.size) - 1} resamples have no optimum; intervals are of the others")
    return found


def _nothing(fit: FitResult, question: Question, plain: Solved) -> str:
    """Why there is no answer, and what would give one."""
    if not np.isfinite(plain.size[0]):
        return (
            f"the fitted law ({fit.law}) has no optimum: a term is 0, so that only size or only tokens count; see "
            "`maxlm sweep fit` for what is wrong with the table"
        )
    if question.same_loss:
        return (
            f"no model within the bounds reaches the loss of {question.flops:.4g} compute-optimal training FLOPs; "
            "raise them (--max-params, --max-tokens), or lower --flops"
        )
    return (
        f"{question.flops:.4g} FLOPs leave nothing to train with after serving {question.served_tokens:.4g} tokens; "
        "raise --flops, or lower --served-tokens"
    )
