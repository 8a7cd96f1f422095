"""scikit-learn: models and pipelines, trained on a few drawn samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.zoo.case import Case, Made

SCIKIT = (
    "LinearRegression",
    "Ridge",
    "LogisticRegression",
    "LogisticRegression (two classes)",
    "LinearSVC",
    "MLPClassifier",
    "MLPRegressor",
    "StandardScaler + LogisticRegression",
    "StandardScaler + PCA + SVC (linear)",
    "MinMaxScaler + MLPClassifier",
    "Normalizer + LogisticRegression",
    "PCA + SVC (rbf)",
    "SVC (linear)",
    "SVC (poly)",
    "SVC (sigmoid)",
    "SVC (rbf)",
    "SVR (rbf)",
)


def _scikit(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from sklearn.datasets import make_classification
        from sklearn.decomposition import PCA
        from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
        from sklearn.neural_network import MLPClassifier, MLPRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler
        from sklearn.svm import SVC, SVR, LinearSVC

        classes = 2 if "two" in name else 3
        x, y = make_classification(120, 8, n_informative=5, n_classes=classes, random_state=0)
        steps: dict[str, Callable[[], Any]] = {
            "LinearRegression": LinearRegression,
            "Ridge": Ridge,
            "LogisticRegression": LogisticRegression,
            "LogisticRegression (two classes)": LogisticRegression,
            "LinearSVC": LinearSVC,
            "MLPClassifier": lambda: MLPClassifier((12, 8), random_state=0, max_iter=60),
            "MLPRegressor": lambda: MLPRegressor(hidden_layer_sizes=(12, 8), random_state=0, max_iter=60),
            "StandardScaler": StandardScaler,
            "MinMaxScaler": MinMaxScaler,
            "Normalizer": Normalizer,
            "PCA": lambda: PCA(4),
            **{f"SVC ({k})": (lambda k=k: SVC(kernel=k)) for k in ("linear", "poly", "sigmoid", "rbf")},
            "SVR (rbf)": SVR,
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore")  # that 60 rounds are few
            parts = [steps[step]() for step in name.split(" + ")]
            model = (make_pipeline(*parts) if len(parts) > 1 else parts[0]).fit(x, y)
        return model, {"X": x[[0, 60]].astype(np.float32)}

    return make


def rows() -> list[Case]:
    """Every row of scikit-learn."""
    return [Case(name, "scikit-learn", _scikit(name), "epsilon", ("skl2onnx",), needs="skl2onnx") for name in SCIKIT]
