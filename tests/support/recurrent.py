"""The relevance of LSTMs after Arras et al. 2017, in numpy and float64: gates get none, sums and layers share."""

from __future__ import annotations

import numpy as np


def stab(z: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return z + eps * np.where(z >= 0, 1.0, -1.0)


def epsilon(a: np.ndarray, W: np.ndarray, z: np.ndarray, R: np.ndarray) -> np.ndarray:
    """R_i = sum_j a_i w_ij / (z_j + eps sign z_j) R_j."""
    return a * (W.T @ (R / stab(z)))


class Lstm:
    """One direction: W [4, H, in], R [4, H, H], b [4, H], gates in the order i, o, f, g."""

    def __init__(self, W: np.ndarray, R: np.ndarray, b: np.ndarray) -> None:
        self.W, self.R, self.b = (array.astype(np.float64) for array in (W, R, b))
        self.hidden = R.shape[-1]

    @classmethod
    def of_torch(cls, lstm, suffix: str = "") -> Lstm:
        """The first layer of a torch.nn.LSTM, whose order is i, f, g, o."""
        W, R, b, c = (getattr(lstm, f"{name}_l0{suffix}").detach().numpy() for name in
                      ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # fmt: skip
        h = R.shape[1]
        order = [0, 3, 1, 2]
        return cls(W.reshape(4, h, -1)[order], R.reshape(4, h, h)[order], (b + c).reshape(4, h)[order])

    def run(self, x: np.ndarray) -> np.ndarray:
        """x [T, in] -> h [T, H]."""
        steps, H = len(x), self.hidden
        self.x = x
        self.h, self.c = np.zeros([steps + 1, H]), np.zeros([steps + 1, H])  # row -1 is the state before the first
        self.i, self.f, self.o, self.g, self.a = (np.zeros([steps, H]) for _ in range(5))
        for t in range(steps):
            z = np.einsum("ghi,i->gh", self.W, x[t]) + np.einsum("ghi,i->gh", self.R, self.h[t - 1]) + self.b
            self.i[t], self.o[t], self.f[t] = 1 / (1 + np.exp(-z[:3]))
            self.a[t] = z[3]
            self.g[t] = np.tanh(z[3])
            self.c[t] = self.f[t] * self.c[t - 1] + self.i[t] * self.g[t]
            self.h[t] = self.o[t] * np.tanh(self.c[t])
        return self.h[:steps]

    def relevance(self, Rh: np.ndarray) -> np.ndarray:
        """What arrives at every h_t from above, [T, H] -> relevance of x [T, in]."""
        steps = len(self.x)
        Rx, arriving, Rc = np.zeros_like(self.x), np.zeros(self.hidden), np.zeros(self.hidden)
        for t in range(steps)[::-1]:
            Rc = Rc + arriving + Rh[t]  # h = o . tanh(c): c is the signal, o the gate
            Rg = self.i[t] * self.g[t] / stab(self.c[t]) * Rc
            kept = self.f[t] * self.c[t - 1] / stab(self.c[t]) * Rc
            both = np.concatenate([self.x[t], self.h[t - 1]])
            shares = epsilon(both, np.concatenate([self.W[3], self.R[3]], 1), self.a[t], Rg)
            Rx[t], arriving, Rc = shares[: self.x.shape[1]], shares[self.x.shape[1] :], kept
        return Rx
