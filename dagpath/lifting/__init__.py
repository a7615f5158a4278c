"""Path quantities of a traced model: norms, counts, the path Gram matrix, the distance of two networks."""

from dagpath.lifting.counts import path_count, path_length_profile
from dagpath.lifting.expectation import expected_gram_diagonal
from dagpath.lifting.gram import gram_diagonal
from dagpath.lifting.metric import path_metric
from dagpath.lifting.norms import path_norm
from dagpath.lifting.operator import GramOperator, gram
from dagpath.lifting.through import path_mass

__all__ = [
    "GramOperator",
    "expected_gram_diagonal",
    "gram",
    "gram_diagonal",
    "path_count",
    "path_length_profile",
    "path_mass",
    "path_metric",
    "path_norm",
]
