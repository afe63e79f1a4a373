"""Representative Vector Selection (RVS): one unit vector that stands for a cloud of prompt embeddings.

CLIP-AD (arXiv 2311.00453), section 3.1. scikit-learn is imported where it is used: vectors from the cache need none.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from anomalib_clipad.errors import InputError

logger = logging.getLogger(__name__)


def select_representative_vector(embeddings: torch.Tensor, method: str = "dbscan", **options: float) -> torch.Tensor:
    """Choose the vector that represents a cloud of unit vectors (section 3.1 of the paper).

    Args:
        embeddings: (P, D) unit vectors.
        method: How to choose:

            - ``mean``: the mean.
            - ``pca``: the first principal direction of the cloud, the prompts being the features.
            - ``kde``: the mean weighted by each point's Gaussian kernel density; option ``bandwidth`` (0.3).
            - ``dbscan``: the mean of the largest cluster; options ``eps`` (0.5) and ``min_samples`` (15). The paper's
              choice; its VisA runs use 1.5 and 25.
            - ``mean_shift``: the mean of the largest cluster; option ``bandwidth`` (2).
        **options: The method's options, passed to scikit-learn's estimator.

    Returns:
        (D,) unit vector, dtype and device of ``embeddings``.

    Raises:
        InputError: If the method or an option is unknown, or ``embeddings`` is not a finite, non-empty matrix.

    Example:
        >>> cloud = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.0]]), dim=-1)
        >>> select_representative_vector(cloud, "mean")
        tensor([1., 0.])
        >>> select_representative_vector(cloud, "dbscan", eps=0.5, min_samples=2)
        tensor([1., 0.])
    """
    options = check_rvs(method, **options)
    wanted = "embeddings must be a finite, non-empty (P, D) matrix of floating-point numbers"
    if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
        msg = f"{wanted}, got {getattr(embeddings, 'dtype', type(embeddings).__name__)}."
        raise InputError(msg)
    if embeddings.ndim != 2 or not embeddings.numel() or not embeddings.isfinite().all():
        msg = f"{wanted}, got shape {tuple(embeddings.shape)}."
        raise InputError(msg)
    cloud = embeddings.detach().cpu().double().numpy()
    try:
        vector = torch.from_numpy(np.ascontiguousarray(_METHODS[method][0](cloud, **options)))
    except ValueError as error:  # scikit-learn's, for options that it refuses beyond our own check
        msg = f"rvs method {method!r} with the options {options} fails ({error}); choose others."
        raise InputError(msg) from error
    if not vector.isfinite().all():
        msg = f"rvs method {method!r} with the options {options} gives no finite vector; choose others."
        raise InputError(msg)
    return F.normalize(vector, dim=0).to(embeddings)


def check_rvs(method: str, **options: float) -> dict[str, float]:
    """The options of a method, with its defaults filled in.

    Args:
        method: See :func:`select_representative_vector`.
        **options: The method's options.

    Raises:
        InputError: If the method or an option is unknown.

    Example:
        >>> check_rvs("dbscan", eps=1.5)
        {'eps': 1.5, 'min_samples': 15}
    """
    if not isinstance(method, str) or method not in _METHODS:
        msg = f"rvs method must be one of {', '.join(_METHODS)}, got {method!r}."
        raise InputError(msg)
    defaults = _METHODS[method][1]
    if unknown := sorted(set(options) - set(defaults)):
        msg = f"rvs method {method!r} takes {', '.join(defaults) or 'no options'}, got {', '.join(unknown)}."
        raise InputError(msg)
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            msg = f"rvs option {name} must be a positive number, got {value!r}."
            raise InputError(msg)
        if name == "min_samples" and value != int(value):
            msg = f"rvs option min_samples must be a whole number, got {value!r}."
            raise InputError(msg)
    return {**defaults, **options}


def rvs_options(rvs: str | Mapping[str, Any]) -> dict[str, Any]:
    """What a user writes for RVS, a method's name or a mapping of ``method`` and its options, as a checked mapping.

    Raises:
        InputError: If the method is missing, or it or an option is unknown.

    Example:
        >>> rvs_options("mean"), rvs_options({"method": "dbscan", "eps": 1.5})
        ({'method': 'mean'}, {'method': 'dbscan', 'eps': 1.5})
    """
    options = {"method": rvs} if isinstance(rvs, str) else rvs
    if not isinstance(options, Mapping) or "method" not in options or not all(isinstance(key, str) for key in options):
        msg = f"rvs must name its method, for example {{'method': 'dbscan', 'eps': 1.5}}, got {rvs!r}."
        raise InputError(msg)
    check_rvs(**options)
    return dict(options)


def _mean(cloud: np.ndarray) -> np.ndarray:
    return cloud.mean(axis=0)


def _pca(cloud: np.ndarray) -> np.ndarray:
    from sklearn.decomposition import PCA

    # One component along every side: a direct decomposition, never scikit-learn's randomised one.
    direction = PCA(n_components=1, svd_solver="full").fit_transform(cloud.T)[:, 0]
    return direction if direction @ cloud.mean(axis=0) >= 0 else -direction


def _kde(cloud: np.ndarray, bandwidth: float) -> np.ndarray:
    from sklearn.neighbors import KernelDensity

    log_density = KernelDensity(kernel="gaussian", bandwidth=bandwidth).fit(cloud).score_samples(cloud)
    # The result is normalised, so the constant, which overflows in many dimensions, can be left out.
    return np.exp(log_density - log_density.max()) @ cloud


def _dbscan(cloud: np.ndarray, eps: float, min_samples: float) -> np.ndarray:
    from sklearn.cluster import DBSCAN

    return _largest_cluster(cloud, DBSCAN(eps=eps, min_samples=int(min_samples)).fit(cloud).labels_)


def _mean_shift(cloud: np.ndarray, bandwidth: float) -> np.ndarray:
    from sklearn.cluster import MeanShift

    return _largest_cluster(cloud, MeanShift(bandwidth=bandwidth).fit(cloud).labels_)


def _largest_cluster(cloud: np.ndarray, labels: np.ndarray) -> np.ndarray:
    members = labels[labels >= 0]
    if not members.size:
        logger.warning("Clustering found no cluster among %d prompts; their mean is used instead.", len(cloud))
        return cloud.mean(axis=0)
    return cloud[labels == np.bincount(members).argmax()].mean(axis=0)


_METHODS: dict[str, tuple[Callable[..., np.ndarray], dict[str, float]]] = {
    "mean": (_mean, {}),
    "pca": (_pca, {}),
    "kde": (_kde, {"bandwidth": 0.3}),
    "dbscan": (_dbscan, {"eps": 0.5, "min_samples": 15}),
    "mean_shift": (_mean_shift, {"bandwidth": 2.0}),
}
