"""The report's words: the summary, and what each picture means for these runs. Every claim is computed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from maxlm.evaluation.report import count, figure
from maxlm.scaling.published import KAPLAN, PUBLISHED, REFIT
from maxlm.scaling.result import Estimate
from maxlm.scaling.study import METHODS, PENDING, TITLES, Study, exponents

TERMS = (
    ("N, parameters", "how many numbers the model learns"),
    ("D, tokens", "how many pieces of text it is trained on, repeats counted"),
    ("C, FLOPs", "the arithmetic that training takes, close to 6 N D; a budget is a fixed amount of it"),
    ("loss", (
        "how badly the model guesses the next token of text it has not seen, in nats: e to the loss is the "
        "number of tokens it hesitates between. Lower is better"
    )),
    ("N*, D*", (
        "the size and the tokens that reach the lowest loss a budget can buy; N*(C) over budgets is the "
        "frontier"
    )),
    ("law", (
        "L(N, D) = E + A / N^alpha + B / D^beta: a floor E, what a model of finite size loses, and what finite "
        "data loses"
    )),
    ("95% interval", (
        "a range made so that it would hold the true number in 95 of 100 repetitions of the sweep, told by fitting "
        "many times to resampled runs (the bootstrap)"
    )),
    ("σ", "the typical distance of a run from the law, told so that a few odd runs do not move it"),
)  # fmt: skip


def between(estimate: Estimate, show: Callable[[float], str] = count) -> str:
    """A value with its interval, where there is one."""
    if not math.isfinite(estimate.value):
        return "not known"
    if not math.isfinite(estimate.low):
        return show(estimate.value)
    return f"{show(estimate.value)} (95% interval {show(estimate.low)} to {show(estimate.high)})"


def short(estimate: Estimate, show: Callable[[float], str] = count) -> str:
    """As `between`, for a cell of a table."""
    if not math.isfinite(estimate.value):
        return "–"
    return show(estimate.value) + (
        f" ({show(estimate.low)} to {show(estimate.high)})" if math.isfinite(estimate.low) else ""
    )


def loss_text(value: float) -> str:
    """A loss to four digits."""
    return figure(value, 4)


def ratio(value: float) -> str:
    """A ratio or a parameter to three digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e5 else f"{value:.3g}".replace("e+", "e")


def exponent(value: float) -> str:
    """An exponent to three decimals."""
    return f"{value:.3f}".replace("-0.000", "0.000")


def flops_text(value: float) -> str:
    """FLOPs as 3e+19 is written: 3e19."""
    return f"{value:.3g}".replace("e+", "e")


def listed(words: list[str], comma: str = ", ") -> str:
    """a, b and c."""
    return " and ".join([comma.join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(n: int, word: str) -> str:
    """1 run, 2 runs."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def counted(words: list[str]) -> str:
    """2 failed and 1 diverged."""
    return listed([f"{words.count(word)} {word}" for word in dict.fromkeys(words)])


def what_was_run(study: Study) -> str:
    """How many runs, which came to nothing, and what they span."""
    used = [row for row in study.rows if row.used]
    text = f"The table has {plural(len(study.rows), 'run')}, of which {len(used):,} are fitted"
    bad = counted(
        [row.status if row.status != "done" or study.main is None else "not usable" for row in study.left_out]
    )
    if bad:
        text += f"; {bad}, left out and shown as crosses" if used else f"; {bad}"
    pending = counted([row.status for row in study.rows if row.pending])
    text += f"; {pending}, with no result yet" if pending else ""
    if not used:
        return text + "."
    sizes, tokens, flops = ([getattr(row, name) for row in used] for name in ("n_params", "n_tokens", "flops"))
    return (
        f"{text}. Those fitted have {count(min(sizes))} to {count(max(sizes))} parameters, were trained on "
        f"{count(min(tokens))} to {count(max(tokens))} tokens, and took {flops_text(min(flops))} to "
        f"{flops_text(max(flops))} FLOPs each."
    )


def what_the_law_says(study: Study) -> str:
    """The law with its numbers, and how ten times the compute is best spent."""
    if study.main is None:
        return ""
    named = {name: estimate.value for name, estimate in study.main.parameters.items()}
    share = ""
    if study.has_optimum("chinchilla"):
        a, b = exponents(study.main)
        share = f"the best model is {ratio(10**a.value)} times larger and sees {ratio(10**b.value)} times the tokens"
        share = f" With 10 times the compute, {share}."
    return (
        f"The law fitted is L = {ratio(named['E'])} + {ratio(named['A'])} / N^{exponent(named['alpha'])} + "
        f"{ratio(named['B'])} / D^{exponent(named['beta'])}: no size and no amount of such text would bring the "
        "loss under "
        f"{ratio(named['E'])}.{share}"
    )


def the_next_model(study: Study) -> str:
    """Size, tokens and loss for the largest budget asked, and whether the other approaches say the same."""
    if study.main is None or not study.main.optimum:
        return ""
    point = max(study.main.optimum, key=lambda each: each.flops)
    if not math.isfinite(point.n_params.value):
        return f"For {flops_text(point.flops)} FLOPs the law has no best size: one of its terms vanished."
    text = (
        f"For {flops_text(point.flops)} FLOPs, {ratio(point.flops / study.largest)} times the largest run, train "
        f"{between(point.n_params)} parameters on {between(point.n_tokens)} tokens: "
        f"{ratio(point.n_tokens.value / point.n_params.value)} tokens for each parameter."
    )
    if point.loss is not None:
        text += f" Its loss should be {between(point.loss, loss_text)}."
    return f"{text} {_agreement(study, point.flops, point.n_params)}".strip()


def _agreement(study: Study, flops: float, size: Estimate) -> str:
    said = []
    for law in ("approach2", "approach1"):
        result = study.fits.get(law)
        if result is None:
            continue
        other = next(each.n_params for each in result.optimum if each.flops == flops)
        apart = not (other.low <= size.high and size.low <= other.high)
        known = all(math.isfinite(each) for each in (other.low, size.low))
        agrees = "" if not known else ", which disagrees: the intervals do not meet" if apart else ", which agrees"
        distrusted = "" if result.trusted else " (itself not to be trusted)"
        said.append(f"{TITLES[law].capitalize()}, by {METHODS[law]}, says {between(other)}{agrees}{distrusted}.")
    return " ".join(said)


def trust(study: Study) -> str:
    """The verdict of the main fit, its back-test, and what refuses to be fitted."""
    if study.main is None:
        return f"The law could not be fitted: {study.refused['chinchilla']}."
    severe = [finding for finding in study.main.findings if finding.severe]
    rest = len(study.main.findings) - len(severe)
    text = study.main.verdict
    if rest:
        text += f" There {'is' if rest == 1 else 'are'} {plural(rest, 'lesser remark')} below."
    test = study.main.backtest
    if test is not None:
        text += (
            f" Put to the test, the law fitted to the {plural(test.rows_fitted, 'smaller run')} misses the loss of the "
            f"largest by {test.mean_error:+.2%} on average and {test.worst_error:+.2%} at worst."
        )
    else:
        text += " There are too few runs to hold the largest ones out and predict them."
    return text


def loss_curves_caption(study: Study) -> list[str]:
    """For the loss curves."""
    bad = [f"{curve.run} ({curve.status})" for curve in study.curves if curve.failed]
    best = min(
        (curve for curve in study.curves if curve.status == "done" and curve.held_out is not None),
        key=lambda curve: curve.held_out or math.inf, default=None,
    )  # fmt: skip
    here = f"The curves are of {plural(len(study.curves), 'run')}."
    if best is not None:
        here += (
            f" The lowest held-out loss, {loss_text(best.held_out or math.nan)}, is {best.run}'s "
            f"({count(best.n_params)} parameters)."
        )
    here += f" Dashed with a cross: {listed(bad)}." if bad else " None failed or diverged."
    pending = sum(curve.status in PENDING for curve in study.curves)
    here += f" Dashed without one: {plural(pending, 'run')} not at the end yet." if pending else ""
    return [
        (
            "Each line is a run's training loss while it spends its FLOPs; its colour is the model's size, the dot "
            "at its end the loss on held-out text."
        ),
        (
            "Small models (dark ends of the scale) fall early and flatten; large ones start later and end lower. "
            "The lower edge of all curves together is what a FLOP can buy. The first steps, where all fall from a "
            "blind guess, are cut off."
        ),
        here,
    ]  # fmt: skip


def isoflop_caption(study: Study) -> list[str]:
    """For the isoFLOP parabolas."""
    minima = study.fits["approach2"].details["minima"]
    total = int(study.budgets.max()) + 1
    pairs = [f"{count(each['n_params'])} at {flops_text(each['flops'])}" for each in minima]
    here = f"{len(minima)} of {plural(total, 'budget')} have a minimum among their runs: {listed(pairs)} FLOPs."
    grows = np.diff([each["n_params"] for each in minima]) > 0
    if len(minima) > 1:
        here += (
            " The best size grows with each budget."
            if grows.all()
            else " The best size does not grow with every budget, as it should: noise, or runs that are not comparable."
        )
    return [
        (
            "Each colour is one compute budget, each dot a run: the further right, the larger the model and the "
            "fewer tokens the budget leaves for it. A parabola of log loss in log N goes through each budget's "
            "runs."
        ),
        (
            "Left of a star the model is too small for its budget, right of it there is too little data. The star "
            "is the parabola's lowest point, not the nearest run."
        ),
        here,
    ]  # fmt: skip


def frontier_caption(study: Study) -> list[str]:
    """For N*(C) and D*(C)."""
    said = []
    for law in ("chinchilla", "approach2", "approach1"):
        if study.has_optimum(law):
            said.append(f"{TITLES[law]} {short(exponents(study.fits[law])[0], exponent)}")
    here = f"Exponent a of N* ~ C^a: {'; '.join(said)}."
    for law in ("approach2", "approach1"):
        if law in study.refused:
            here += f" {TITLES[law].capitalize()} is missing: {study.refused[law]}."
    if study.envelope_of_curves:
        here += " Approach 1 is of the runs' training curves, since few sizes of the table recur."
    return [
        (
            "The best size (left) and the best number of tokens (right) for each amount of compute, by three "
            "methods: approach 3 fits the law to all runs; approach 2 draws a line through the parabolas' minima "
            "(stars); approach 1 takes the lowest curve at each FLOP count."
        ),
        (
            "Bands are 95% intervals. Lines that lie in each other's bands agree. In the shaded part no run was "
            "made: what is said there is extrapolated. A band wider than a factor of 4 leaves the picture."
        ),
        here,
    ]  # fmt: skip


def contours_caption(study: Study) -> list[str]:
    """For the contours."""
    assert study.main is not None
    here = "A term of the law vanished, so no size is the best for a budget."
    if study.has_optimum("chinchilla"):
        ratios = [
            f"{ratio(point.n_tokens.value / point.n_params.value)} at {flops_text(point.flops)} FLOPs"
            for point in study.main.optimum
        ]
        here = f"Along the line, tokens for each parameter: {listed(ratios)}."
    return [
        (
            "The loss that the law gives for every size and number of tokens; lines join equal losses. Circles are "
            "the runs that it was fitted to."
        ),
        (
            "Down and left is cheap and bad, up and right dear and good. Where a contour runs flat, more parameters "
            "no longer help; where it stands upright, more tokens do not. The thick line is the best size for each "
            "budget, the stars the budgets asked for. Far from all circles the colours are extrapolation."
        ),
        here,
    ]  # fmt: skip


def residuals_caption(study: Study) -> list[str]:
    """For the residuals."""
    assert study.main is not None
    used = [row for row in study.rows if row.used and row.residual is not None]
    values = np.array([row.residual or 0.0 for row in used])
    trends = []
    for name, what in (("n_params", "size"), ("n_tokens", "tokens")):
        x = np.log([getattr(row, name) for row in used])
        if np.ptp(x) > 0 and len(used) > 4 and np.ptp(values) > 0:
            r = float(np.corrcoef(x, values)[0, 1])
            if abs(r) > 2 / math.sqrt(len(used)):
                trends.append(f"they {'rise' if r > 0 else 'fall'} with {what} (correlation {r:+.2f})")
    worst = max(used, key=lambda row: abs(row.residual or 0.0))
    here = (
        f"σ is {study.main.residual_scale:.2%}; the run furthest off is {worst.name} ({worst.residual or 0.0:+.2%}). "
    )
    here += (
        f"There is a trend: {listed(trends)}; the law bends otherwise than these runs."
        if trends
        else "No trend with size or tokens stands out."
    )
    return [
        (
            "How far each run's measured loss lies above or below what the law says, against its size, its tokens "
            "and the law's loss."
        ),
        (
            "Dots scattered evenly about zero mean that the law has the right shape; a slope or a bow means that it "
            "does not, and then it should not be extrapolated. The band is ±2σ. Crosses are runs left out, at the "
            "edge where they have no loss or lie beyond it."
        ),
        here,
    ]  # fmt: skip


def parameters_caption(study: Study) -> list[str]:
    """For the parameters' intervals."""
    assert study.main is not None
    inside, outside = [], []
    for name in ("alpha", "beta"):
        estimate = study.main.parameters[name]
        (inside if estimate.low <= REFIT.parameters[name] <= estimate.high else outside).append(name)
    here = []
    if not len(study.main.samples):
        here.append("No bootstrap was asked for, so there are no intervals.")
    else:
        if inside:
            here.append(
                f"The published re-fit's {listed(inside)} {'lies' if len(inside) == 1 else 'lie'} inside the "
                f"interval{'' if len(inside) == 1 else 's'} found here."
            )
        if outside:
            here.append(
                f"Its {listed(outside)} {'lies' if len(outside) == 1 else 'lie'} outside: these runs fall at "
                "another rate."
            )
    return [
        "The law's five numbers: the dot is the best fit, the bar its 95% interval; each has a scale of its own.",
        (
            "A narrow bar means that the runs determine the number. A and B go with their exponents and are known "
            "to a factor only; E, A and B depend on the text and the tokenizer, so other people's need not be the "
            "same. The exponents are what can be compared."
        ),
        " ".join(here),
    ]  # fmt: skip


def exponents_caption(study: Study) -> list[str]:
    """For the exponents of all methods and papers."""
    assert study.main is not None
    a, _ = exponents(study.main)
    inside = [each.name for each in PUBLISHED if a.low <= each.a <= a.high]
    outside = [each.name for each in PUBLISHED if not a.low <= each.a <= a.high]
    here = f"Approach 3 here: a = {between(a, exponent)}."
    if math.isfinite(a.low):
        here += f" The interval contains a of {listed(inside, '; ')}." if inside else ""
        here += f" It does not contain a of {listed(outside, '; ')}." if outside else ""
    return [
        (
            f"How fast the best size grows with compute, by every method and in the papers. {KAPLAN.name} count "
            "parameters without embeddings."
        ),
        "a = 0.5 (dotted): size and tokens grow alike. More: larger models; less: more tokens.",
        here,
    ]  # fmt: skip


def backtest_caption(study: Study) -> list[str]:
    """For the back-test."""
    assert study.main is not None
    assert study.main.backtest is not None
    test = study.main.backtest
    sign = "too good" if test.mean_error < 0 else "too bad"
    here = (
        f"{plural(len(test.held_out), 'run')} held out; the largest took {ratio(test.factor)} times the FLOPs "
        "of the largest "
        f"run fitted. The mean error is {test.mean_error:+.2%}, so the prediction is {sign}; the worst is "
        f"{test.worst_error:+.2%}. "
        f"The fit's noise σ is {study.main.residual_scale:.2%}."
    )
    return [
        "The law was fitted again without the largest runs, and then asked for their loss: a row for each.",
        (
            "Where diamond and dot meet, the prediction is exact; a dot left of its diamond promised a lower loss than "
            "was reached. Inside the bar the miss is no more than the noise of single runs. The error here is what to "
            "expect one such step beyond the largest run; further out it grows."
        ),
        here,
    ]  # fmt: skip
