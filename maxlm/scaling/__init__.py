"""Scaling laws: from a compute budget to the next model. A command of `maxlm sweep` is a function of its name here."""

from maxlm.scaling.fitting import fit as fit
from maxlm.scaling.result import FitOptions as FitOptions
from maxlm.scaling.result import FitResult as FitResult
