"""Holders to scores. Pure: values in, values out."""

from kvatlas.score.holdings import Holdings
from kvatlas.score.match import Matcher, Prompt
from kvatlas.score.prefix import PrefixHit, longest_prefix
from kvatlas.score.scorers import Scorer, load_scorer, scorer_names
from kvatlas.score.weights import TierWeights

__all__ = [
    "Holdings",
    "Matcher",
    "PrefixHit",
    "Prompt",
    "Scorer",
    "TierWeights",
    "load_scorer",
    "longest_prefix",
    "scorer_names",
]
