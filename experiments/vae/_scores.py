"""How good samples and codes are, on arrays: distances of features, disentanglement."""

from typing import Any

import numpy as np

__all__ = ["dci", "frechet_distance", "infomec", "kernel_distance", "sap"]


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """||m - n||^2 + tr(S + T - 2 (S T)^1/2), of features `[N, D]` and `[M, D]`.

    m, S and n, T are means and covariances; the distance of Gaussians in W_2, squared.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    first, second = np.cov(x.T), np.cov(y.T)
    # The roots of S T are those of R T R, R R = S, which is symmetric.
    value, vector = np.linalg.eigh(first)
    root = (vector * np.sqrt(np.maximum(value, 0.0))) @ vector.T
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0.0))
    apart = np.sum(np.square(x.mean(0) - y.mean(0)))
    return float(apart + np.trace(first) + np.trace(second) - 2.0 * roots.sum())


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD with the kernel (x . y / D + 1)^3 (KID)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def apart(a: np.ndarray) -> float:
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(apart(x) + apart(y) - 2.0 * kernel(x, y).mean())


def sap(codes: np.ndarray, factors: np.ndarray, test: Any) -> float:
    """Separated attribute predictability: a gap of accuracies (Kumar et al. 2018).

    For each factor a linear SVM on each latent alone; the best one's accuracy less the
    second's, mean over factors. `test` are a mask of rows that do not train.
    """
    from sklearn.svm import LinearSVC

    gaps = []
    for factor in factors.T:
        right = []
        for code in codes.T:
            # One latent at a time, in units of its spread.
            z = (code / max(code.std(), 1e-6))[:, None]
            svm = LinearSVC(C=0.01, class_weight="balanced", random_state=0)
            svm.fit(z[~test], factor[~test])
            right.append(np.mean(svm.predict(z[test]) == factor[test]))
        second, best = np.sort(right)[-2:]
        gaps.append(best - second)
    return float(np.mean(gaps))


def dci(codes: np.ndarray, factors: np.ndarray, test: Any) -> tuple[float, ...]:
    """Disentanglement, completeness, informativeness (Eastwood and Williams 2018).

    R[i, j] is how important latent i is to a forest of trees for factor j. One less the
    entropy of each row, over log of its length, is disentanglement, weighted by row
    sums; of each column, completeness; informativeness is the forests' accuracy.
    """
    from sklearn.ensemble import RandomForestClassifier

    importance, right = [], []
    for factor in factors.T:
        # All latents at each split: of a few, the best may not be one.
        knobs: Any = {"max_features": None, "max_depth": 8, "random_state": 0}
        forest = RandomForestClassifier(30, **knobs)
        forest.fit(codes[~test], factor[~test])
        importance.append(forest.feature_importances_)
        right.append(np.mean(forest.predict(codes[test]) == factor[test]))
    table = np.stack(importance, axis=1)
    rows = table.sum(axis=1)
    disentangled = np.sum(rows / rows.sum() * (1.0 - _entropy(table)))
    complete = np.mean(1.0 - _entropy(table.T))
    return float(disentangled), float(complete), float(np.mean(right))


def infomec(codes: np.ndarray, factors: np.ndarray, test: Any) -> tuple[float, ...]:
    """InfoM, InfoE and InfoC in the manner of Hsu et al. 2023, on continuous codes.

    From I(z_i; s_j) / H(s_j), by nearest neighbours (Ross 2014): what share of a
    latent's information is of one factor, and of a factor's of one latent, less what is
    so by chance, over 1 less that; latents without 1% of what the best one has do not
    count. InfoE: how much of H(s) a logistic regression on all latents saves, held out.
    """
    from sklearn.feature_selection import mutual_info_classif
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    z = StandardScaler().fit(codes[~test]).transform(codes)
    shares, saved = [], []
    for factor in factors.T:
        levels, counts = np.unique(factor, return_counts=True)
        p = counts / counts.sum()
        entropy = -np.sum(p * np.log(p))
        found = mutual_info_classif(z, factor, random_state=0)
        shares.append(np.maximum(found, 0.0) / entropy)
        model = LogisticRegression(max_iter=200).fit(z[~test], factor[~test])
        nats = log_loss(factor[test], model.predict_proba(z[test]), labels=levels)
        saved.append(1.0 - nats / entropy)
    table = np.stack(shares, axis=1)
    active = table.sum(axis=1) >= 0.01 * table.sum(axis=1).max()
    modular = _concentration(table[active])
    compact = _concentration(table[active].T)
    return modular, float(np.mean(saved)), compact


def _concentration(table: np.ndarray) -> float:
    """Mean over rows of their largest entry's share, from 0 (all equal) to 1."""
    columns = table.shape[1]
    if columns == 1:
        return 1.0
    share = table.max(axis=1) / np.maximum(table.sum(axis=1), 1e-12)
    return float(np.mean((share - 1.0 / columns) / (1.0 - 1.0 / columns)))


def _entropy(table: np.ndarray) -> np.ndarray:
    """Of each row as a distribution, over the log of its length."""
    p = table / np.maximum(table.sum(axis=1, keepdims=True), 1e-12)
    logs = np.log(np.where(p > 0.0, p, 1.0))
    return -np.sum(p * logs, axis=1) / np.log(table.shape[1])
