"""Path quantities of a traced model: norms and the path Gram matrix."""

from dagpath.lifting.gram import gram_diagonal
from dagpath.lifting.norms import path_norm

__all__ = ["gram_diagonal", "path_norm"]
