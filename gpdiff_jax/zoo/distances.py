"""In: two sets of vectors. Out: the squared distances between them."""

import numpy as np
from jaxtyping import Float


def squared_distances(one: Float[np.ndarray, "Q X"], other: Float[np.ndarray, "R X"]) -> Float[np.ndarray, "Q R"]:
    """Squared Euclidean distances by one product of matrices; near zero, rounding may make them negative."""
    return np.square(one).sum(axis=1)[:, None] + np.square(other).sum(axis=1)[None, :] - 2.0 * one @ other.T
