"""The analytic prior with a Gaussian process on what it leaves unexplained: the default for few measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

from hwnas.predictors.base import FloatArray, LatencyPredictor, Model
from hwnas.predictors.features import FEATURE_NAMES, by_name, feature_sums, from_names
from hwnas.predictors.metrics import Z_90
from hwnas.predictors.prior import conformal_90, fit_prior
from hwnas.space import Genes, SearchSpace

_JITTER = 1e-10
# Starting points of the search for hyperparameters: standard deviations of the linear, smooth and noise part of the
# log ratio, and the length scale in units of the inputs' spread.
_STARTS = ((0.1, 0.05, 0.02, 1.0), (0.02, 0.02, 0.05, 3.0), (0.3, 0.1, 0.005, 1.0))
_BOUNDS = ((1e-4, 3.0), (1e-4, 1.0), (1e-3, 1.0), (0.2, 30.0))

VARIANT = "shares"


@dataclass(frozen=True, slots=True)
class Kernel:
    linear_std: float
    smooth_std: float
    noise_std: float
    length: float

    def __call__(self, a, b):
        lin = self.linear_std**2 * (a[0] @ b[0].T)
        scaled = np.sqrt(5 * _square(a[1], b[1])) / self.length
        return lin + self.smooth_std**2 * (1 + scaled + scaled**2 / 3) * np.exp(-scaled)

    def diag(self, a):
        return self.linear_std**2 * (a[0] ** 2).sum(1) + self.smooth_std**2


def _square(a, b):
    d = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.maximum(d, 0)


def nll(theta, lin, dist, noise, r):
    ls, ss, ns, ell = np.exp(theta)
    a = np.sqrt(5) * dist / ell
    e = np.exp(-a)
    sm = ss**2 * (1 + a + a**2 / 3) * e
    K = ls**2 * lin + sm + np.diag(ns**2 * noise + _JITTER)
    L = np.linalg.cholesky(K)
    al = cho_solve((L, True), r)
    Ki = cho_solve((L, True), np.eye(len(r)))
    val = 0.5 * r @ al + np.log(np.diag(L)).sum()
    M = np.outer(al, al) - Ki
    grads = [2 * ls**2 * lin, 2 * sm, np.diag(2 * ns**2 * noise), ss**2 * (a**2 / 3) * (1 + a) * e]
    g = np.array([-0.5 * (M * G).sum() for G in grads])
    # weak log-normal beliefs
    mu = np.log([0.1, 0.03, 0.03, 2.0])
    sd = np.array([1.5, 1.5, 1.5, 1.0])
    val += (((theta - mu) / sd) ** 2).sum() / 2
    g += (theta - mu) / sd**2
    return val, g


class GpPredictor(LatencyPredictor):
    kind: ClassVar[str] = "gp"
    variant = "shares"
    use_linear = True
    mode = "cv"

    def inputs(self, genes, coef, stats=None):
        F = feature_sums(self.space)(genes)
        costs = F * coef
        m = costs.sum(1)
        sh = costs / m[:, None]
        if self.variant == "shares":
            z = np.hstack([sh, np.log(m)[:, None]])
        elif self.variant == "logf":
            z = np.log1p(F)
        elif self.variant == "sqrtshares":
            z = np.hstack([np.sqrt(sh), np.log(m)[:, None]])
        elif self.variant == "logm":
            z = np.log(m)[:, None]
        elif self.variant == "genes":
            n = np.array([max(len(g.choices) - 1, 1) for g in self.space.genes])
            z = genes / n; z = np.where(genes < 0, -.5, z)
        if stats is None:
            s = z.std(0); stats = (z.mean(0), np.where(s > 1e-9, s, np.inf), max((s > 1e-9).sum(), 1))
        z = (z - stats[0]) / stats[1] / np.sqrt(stats[2])
        return m, (sh if self.use_linear else sh*0, z), stats

    def _learn(self, genes, latency_ms, weights):
        F = feature_sums(self.space)(genes)
        fit = fit_prior(F, latency_ms, weights)
        coef = fit.coefficients
        # linear directions keep a floor so that rates at zero can move
        m, x, stats = self.inputs(genes, coef)
        r = np.log(latency_ms / m)
        rin = r
        if self.mode != "in": r = fit.log_errors
        noise = 1 / fit.trust
        if not self.use_linear: x = (x[0] * 0, x[1])
        lin = x[0] @ x[0].T
        dist = np.sqrt(_square(x[1], x[1]))
        best = None
        for st in _STARTS:
            o = minimize(nll, np.log(st), args=(lin, dist, noise, r), jac=True, method="L-BFGS-B", bounds=np.log(_BOUNDS))
            if best is None or o.fun < best.fun: best = o
        k = Kernel(*np.exp(best.x)[[0, 1, 2, 3]])
        K = k(x, x) + np.diag(k.noise_std**2 * noise + _JITTER)
        Ki = np.linalg.inv(K); al = Ki @ r; alin = Ki @ rin
        loo_e = al / np.diag(Ki); loo_var = 1 / np.diag(Ki) - k.noise_std**2 * noise + k.noise_std**2
        z = np.abs(loo_e) / np.sqrt(loo_var)
        cal = conformal_90(z) / Z_90
        self.k, self.x, self.al, self.L, self.coef, self.stats, self.cal = k, x, (alin if self.mode=="mixed" else al), np.linalg.cholesky(K), coef, stats, cal
        return {}

    def _model(self, learned):
        def predict(genes):
            m, x, _ = self.inputs(genes, self.coef, self.stats)
            ks = self.k(x, self.x)
            mu = ks @ self.al
            v = solve_triangular(self.L, ks.T, lower=True)
            var = self.k.diag(x) - (v**2).sum(0) + self.k.noise_std**2
            mean = m * np.exp(mu)
            return mean, mean * self.cal * np.sqrt(np.maximum(var,1e-12))
        return predict
