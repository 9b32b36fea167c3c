"""Defaults of a step: ``zorba.defaults``, which loads without torch, under the optimizer's name."""

from zorba.defaults import DISTRIBUTION as DISTRIBUTION
from zorba.defaults import EPS as EPS
from zorba.defaults import ESTIMATOR as ESTIMATOR
from zorba.defaults import ESTIMATORS as ESTIMATORS
from zorba.defaults import NUM_PERTURBATIONS as NUM_PERTURBATIONS
from zorba.defaults import Distribution as Distribution
from zorba.defaults import Estimator as Estimator
