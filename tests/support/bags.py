"""Bags of visual words and improved Fisher vectors, trained with scikit-learn and written in standard ONNX operators.

picture [N, 3, H, W] -> local descriptors [N, D, h, w]: patches, projected (PCA), a convolution
bag of words     distances to the words (a 1x1 convolution) -> Hardmax or Softmax -> mean over places: histogram [N, V]
                 -> histogram intersection with support vectors -> SVM (Bach et al. 2015)
Fisher vector    gamma_k(l) (x_l - mu_k) / sigma_k and gamma_k(l) ((x_l - mu_k)^2 / sigma_k^2 - 1), means over places
                 -> sign sqrt, L2 -> linear SVM (Perronnin et al. 2010; Lapuschkin et al. 2016)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser

from fixtures.shapes import make as shapes

SIZE, STRIDE, DIMENSIONS = 8, 4, 12


@dataclass
class Descriptors:
    """Patches of SIZE x SIZE every STRIDE pixels, projected: x = P (patch - mean)."""

    P: np.ndarray  # [D, 3 * SIZE * SIZE]
    mean: np.ndarray

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """[N, 3, H, W] -> [N, places, D]."""
        return (patches(pictures) - self.mean) @ self.P.T


def patches(pictures: np.ndarray) -> np.ndarray:
    """[N, 3, H, W] -> [N, places, 3 * SIZE * SIZE]."""
    windows = np.lib.stride_tricks.sliding_window_view(pictures, (SIZE, SIZE), axis=(2, 3))[:, :, ::STRIDE, ::STRIDE]
    n, c, h, w = windows.shape[:4]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(n, h * w, c * SIZE * SIZE)


@functools.cache
def data(n: int = 300, seed: int = 3) -> tuple[np.ndarray, np.ndarray, shapes.Scenes]:
    """Pictures 0..1 [N, 3, 64, 64], labels, scenes."""
    scenes = shapes.scenes(n, seed)
    return scenes.images.transpose(0, 3, 1, 2).astype(np.float64) / 255, scenes.labels, scenes


@functools.cache
def descriptors() -> Descriptors:
    from sklearn.decomposition import PCA

    pictures, _, _ = data()
    sample = patches(pictures[:100]).reshape(-1, 3 * SIZE * SIZE)
    pca = PCA(DIMENSIONS, whiten=True, random_state=0).fit(sample)
    return Descriptors(pca.components_ / np.sqrt(pca.explained_variance_)[:, None], pca.mean_)


def intersection(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    return np.minimum(A[:, None], B).sum(2)


# ------------------------------------------------------------------------------------------------------- bags of words


@dataclass
class Bag:
    words: np.ndarray  # [V, D]
    hard: bool
    vectors: np.ndarray  # [S, V]
    alpha: np.ndarray  # [1, S]
    b: np.ndarray

    def mapping(self, pictures: np.ndarray) -> np.ndarray:
        """m_d(l) [N, places, V]: which word a descriptor is."""
        score = self.score(descriptors()(pictures))
        if self.hard:
            return np.eye(len(self.words))[score.argmax(2)]
        weights = np.exp(score - score.max(2, keepdims=True))
        return weights / weights.sum(2, keepdims=True)

    def score(self, x: np.ndarray) -> np.ndarray:
        """-|x - c|^2 up to what is the same for all words."""
        return 2 * x @ self.words.T - (self.words**2).sum(1)

    def model(self) -> onnx.ModelProto:
        assign = "Hardmax <axis = 1> (score)" if self.hard else "Softmax <axis = 1> (score)"
        return _model(
            f"""
            x = Conv <strides = [{STRIDE}, {STRIDE}]> (picture, P, p)
            score = Conv (x, C, c)
            m = {assign}
            places = Constant <value = int64[2] {{2, 3}}> ()
            histogram = ReduceMean <keepdims = 0> (m, places)
            one = Constant <value = int64[1] {{1}}> ()
            two = Constant <value = int64[1] {{2}}> ()
            apart = Unsqueeze (histogram, one)
            smaller = Min (apart, vectors)
            K = ReduceSum <keepdims = 0> (smaller, two)
            y = Gemm <transB = 1> (K, alpha, b)
            """,
            C=2 * self.words[:, :, None, None], c=-(self.words**2).sum(1),
            vectors=self.vectors, alpha=self.alpha, b=self.b,
        )  # fmt: skip


@functools.cache
def bag(target: int, *, hard: bool = True, words: int = 40) -> Bag:
    """One class against the others."""
    from sklearn.cluster import KMeans
    from sklearn.svm import SVC

    pictures, labels, _ = data()
    x = descriptors()(pictures)
    centres = KMeans(words, n_init=1, random_state=0).fit(x[:100].reshape(-1, DIMENSIONS)).cluster_centers_
    made = Bag(centres, hard, np.zeros([0, words]), np.zeros([1, 0]), np.zeros(1))
    histograms = made.mapping(pictures).mean(1)
    svm = SVC(C=50, kernel="precomputed", class_weight="balanced").fit(
        intersection(histograms, histograms), labels == target
    )
    made.vectors, made.alpha, made.b = histograms[svm.support_], svm.dual_coef_, svm.intercept_
    return made


# ------------------------------------------------------------------------------------------------------ Fisher vectors


@dataclass
class Fisher:
    pi: np.ndarray  # [K]
    mu: np.ndarray  # [K, D]
    sigma: np.ndarray  # [K, D], deviations
    w: np.ndarray  # [1, 2 K D]
    b: np.ndarray

    def mapping(self, pictures: np.ndarray) -> np.ndarray:
        """Psi_d(l) [N, places, 2 K D]."""
        x = descriptors()(pictures)
        u = (x[:, :, None] - self.mu) / self.sigma
        log = np.log(self.pi) - 0.5 * (u**2).sum(3) - np.log(self.sigma).sum(1)
        gamma = np.exp(log - log.max(2, keepdims=True))
        gamma = (gamma / gamma.sum(2, keepdims=True))[..., None]
        first = gamma * u / np.sqrt(self.pi)[:, None]
        second = gamma * (u**2 - 1) / np.sqrt(2 * self.pi)[:, None]
        return np.concatenate([first.reshape(*x.shape[:2], -1), second.reshape(*x.shape[:2], -1)], 2)

    def vector(self, pictures: np.ndarray) -> np.ndarray:
        """Signed roots, then length 1."""
        z = self.mapping(pictures).mean(1)
        z = np.sign(z) * np.sqrt(np.abs(z))
        return z / np.sqrt((z**2).sum(1, keepdims=True))

    def model(self) -> onnx.ModelProto:
        variance = self.sigma**2
        constant = np.log(self.pi) - 0.5 * (self.mu**2 / variance).sum(1) - np.log(self.sigma).sum(1)
        return _model(
            f"""
            x = Conv <strides = [{STRIDE}, {STRIDE}]> (picture, P, p)
            square = Mul (x, x)
            quadratic = Conv (square, Q)
            linear = Conv (x, L, l)
            log = Add (quadratic, linear)
            gamma = Softmax <axis = 1> (log)
            one = Constant <value = int64[1] {{1}}> ()
            two = Constant <value = int64[1] {{2}}> ()
            gate = Unsqueeze (gamma, two)
            wide = Unsqueeze (x, one)
            centred = Sub (wide, mu)
            u = Div (centred, sigma)
            uu = Mul (u, u)
            number = Constant <value = float {{1.0}}> ()
            spread = Sub (uu, number)
            psi_mu = Mul (gate, u)
            psi_sigma = Mul (gate, spread)
            places = Constant <value = int64[2] {{3, 4}}> ()
            mean_mu = ReduceMean <keepdims = 0> (psi_mu, places)
            mean_sigma = ReduceMean <keepdims = 0> (psi_sigma, places)
            scaled_mu = Mul (mean_mu, s_mu)
            scaled_sigma = Mul (mean_sigma, s_sigma)
            flat_mu = Flatten (scaled_mu)
            flat_sigma = Flatten (scaled_sigma)
            z = Concat <axis = 1> (flat_mu, flat_sigma)
            size = Abs (z)
            root = Sqrt (size)
            sign = Sign (z)
            powered = Mul (sign, root)
            length = ReduceL2 <keepdims = 1> (powered, one)
            vector = Div (powered, length)
            y = Gemm <transB = 1> (vector, w, b)
            """,
            Q=(-0.5 / variance)[:, :, None, None], L=(self.mu / variance)[:, :, None, None], l=constant,
            mu=self.mu[None, :, :, None, None], sigma=self.sigma[None, :, :, None, None],
            s_mu=(1 / np.sqrt(self.pi))[:, None], s_sigma=(1 / np.sqrt(2 * self.pi))[:, None], w=self.w, b=self.b,
        )  # fmt: skip


@functools.cache
def fisher(target: int, components: int = 8) -> Fisher:
    """One class against the others."""
    from sklearn.mixture import GaussianMixture
    from sklearn.svm import LinearSVC

    pictures, labels, _ = data()
    x = descriptors()(pictures[:100]).reshape(-1, DIMENSIONS)
    mixture = GaussianMixture(
        components, covariance_type="diag", random_state=0, reg_covar=1e-2, max_iter=30, tol=1e-2
    ).fit(x)
    made = Fisher(mixture.weights_, mixture.means_, np.sqrt(mixture.covariances_), np.zeros([1, 0]), np.zeros(1))
    svm = LinearSVC(C=10, class_weight="balanced", random_state=0).fit(made.vector(pictures), labels == target)
    made.w, made.b = svm.coef_, svm.intercept_
    return made


def _model(body: str, **constants: np.ndarray) -> onnx.ModelProto:
    projection = descriptors()
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]> net (float[N, 3, 64, 64] picture) => (float[N, 1] y) {{ {body} }}'
    )
    constants["P"] = projection.P.reshape(-1, 3, SIZE, SIZE)
    constants["p"] = -projection.P @ projection.mean
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, np.float32), name))
    onnx.checker.check_model(model)
    return model


# ----------------------------------------------------------------------------------------------------- relevance by hand


def to_places(R: np.ndarray, mapping: np.ndarray) -> np.ndarray:
    """R_d [V] to R_l [places] by the mapping m_d(l) [places, V]; empty bins to all places alike."""
    total = mapping.sum(0)
    empty = total == 0
    shares = mapping / np.where(empty, 1, total)
    return (shares * np.where(empty, 0, R)).sum(1) + R[empty].sum() / len(mapping)


def to_pixels(R: np.ndarray, height: int = 64, width: int = 64) -> np.ndarray:
    """R_l [places] to pixels [3, H, W], each descriptor's to its patch flat."""
    out = np.zeros([3, height, width])
    columns = (width - SIZE) // STRIDE + 1
    for place, amount in enumerate(R):
        y, x = place // columns * STRIDE, place % columns * STRIDE
        out[:, y : y + SIZE, x : x + SIZE] += amount / (3 * SIZE * SIZE)
    return out
