"""What frozen features know of the labels, by scikit-learn's logistic regression."""

import numpy as np

__all__ = ["probe"]


def probe(train_x: np.ndarray, train_y, test_x: np.ndarray, test_y) -> float:
    """Test accuracy in per cent of logistic regression on standardised features."""
    # Here, since scikit-learn takes a second to import.
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_x)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(train_x), train_y)
    return 100 * float(model.score(scaler.transform(test_x), test_y))
