"""Scaling laws: from a compute budget to the next model. A command of `maxlm sweep` is a function of its name here."""

from maxlm.scaling.fitting import fit as fit
from maxlm.scaling.optimum import Answer as Answer
from maxlm.scaling.optimum import Question as Question
from maxlm.scaling.optimum import optimum as optimum
from maxlm.scaling.result import FitOptions as FitOptions
from maxlm.scaling.result import FitResult as FitResult
