"""What the accuracy of a child probably is, from those evaluated: a Gaussian process on its genes.

Equation numbers are those of Rasmussen and Williams, Gaussian Processes for Machine Learning (MIT Press, 2006).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from hwnas.layers import LayerSums
from hwnas.space import FloatArray, Genes, SearchSpace

MAX_SEARCHED = 256  # children from which the hyperparameters are found
MAX_CERTAIN = 400  # children that make `predict` certain; the mean comes from all
ITERATIONS = 40
OUTLIER = 3.0  # a child as far below the median as that many times the best is above it counts as no further below

# Beliefs about the hyperparameters, of an accuracy with standard deviation 1: the medians of log-normal priors.
LINEAR, ADDITIVE, SMOOTH, NOISE = 0.7, 0.5, 0.7, 0.2
LENGTH = 2.0  # times the square root of the number of features, as distances grow with it
LOG_STD = 1.0


class Features:
    """Children as numbers: what they cost, and of each stage the width, depth, mean kernel and expand ratio.

    Args:
        space: the search space.
        size: the share of the limits used, (num_archs,) for genes (num_archs, num_genes).
        sample: genes of children like those to come: features have mean 0 and standard deviation 1 over them.
    """

    def __init__(self, space: SearchSpace, size: Callable[[Genes], FloatArray], sample: Genes) -> None:
        self._size = size
        self._costs = LayerSums(space, lambda layer: (layer.macs, layer.params))
        groups: dict[str, list[int]] = {}
        for index, gene in enumerate(space.genes):
            if len(gene.choices) > 1:
                stage, _, attribute = gene.name.rpartition(".")
                groups.setdefault(f"{stage.partition('.')[0]}.{attribute}", []).append(index)
        self._groups = list(groups.values())
        self._scale = np.array([max(1, len(gene.choices) - 1) for gene in space.genes])
        self._starts = np.cumsum([0, *(len(gene.choices) + 1 for gene in space.genes)])
        self._varied = [index for index, gene in enumerate(space.genes) if len(gene.choices) > 1]
        self._mean, self._std = np.zeros(1), np.ones(1)
        raw = self(sample)
        self._mean, std = raw.mean(axis=0), raw.std(axis=0)
        self._std = np.where(std > 1e-6, std, np.inf)

    def __call__(self, genes: Genes) -> FloatArray:
        """(num_archs, num_features)."""
        columns = [np.log(np.maximum(self._size(genes), 1e-9)), *np.log(self._costs(genes)).T]
        for group in self._groups:
            present = genes[:, group] >= 0
            total = np.where(present, genes[:, group] / self._scale[group], 0).sum(axis=1)
            columns.append(total / np.maximum(present.sum(axis=1), 1))
        return np.asarray((np.stack(columns, axis=1) - self._mean) / self._std)

    def choices(self, genes: Genes) -> FloatArray:
        """1 for each choice that was made, also that of an absent block, else 0; (num_archs, num_choices).

        Scaled, so that a child's product with itself is 1.
        """
        found = np.zeros((len(genes), int(self._starts[-1])))
        for index in self._varied:
            found[np.arange(len(genes)), self._starts[index] + genes[:, index] + 1] = 1
        return np.asarray(found / np.sqrt(len(self._varied)))


class AccuracyModel:
    """A Gaussian process: linear in the features, additive over the choices, and smooth in all features together.

    The smooth part (Matern, nu = 5/2, a length for each feature; equation 4.17) is what knows of stages that depend on
    each other; the other two need few children. Hyperparameters are the most probable ones (5.8, 5.9, with priors).

    Args:
        features: of the space.
        genes: the evaluated children, (num_archs, num_genes).
        accuracies: theirs, (num_archs,).
    """

    def __init__(self, features: Features, genes: Genes, accuracies: FloatArray) -> None:
        self.features = features
        middle, best = np.median(accuracies), accuracies.max()
        clipped = np.maximum(accuracies, middle - OUTLIER * max(best - middle, accuracies.std()))
        self.mean, self.std = float(clipped.mean()), float(max(clipped.std(), 1e-6))
        targets = (clipped - self.mean) / self.std
        self._points, self._choices = features(genes), features.choices(genes)
        self._search(targets)
        self._lower = cholesky(self._noisy_covariance(self._points, self._choices), lower=True)
        self._alpha = cho_solve((self._lower, True), targets)
        self._some = np.random.default_rng(0).permutation(len(targets))[:MAX_CERTAIN]
        some = self._points[self._some], self._choices[self._some]
        self._lower_some = cholesky(self._noisy_covariance(*some), lower=True)

    # ------------------------------------------------------------ hyperparameters

    def _search(self, targets: FloatArray) -> None:
        num_features = self._points.shape[1]
        some = np.random.default_rng(0).permutation(len(targets))[:MAX_SEARCHED]
        points, targets = self._points[some], targets[some]
        linear = points @ points.T / num_features
        additive = self._choices[some] @ self._choices[some].T
        medians = np.log([LINEAR, ADDITIVE, SMOOTH, NOISE, *[LENGTH * np.sqrt(num_features)] * num_features])

        def objective(logs: FloatArray) -> tuple[float, FloatArray]:
            variances = np.exp(2 * logs[:4])
            scaled = points / np.exp(logs[4:])
            distances = np.sqrt(5 * _squares(scaled, scaled))
            decay = np.exp(-distances)
            smooth = variances[2] * (1 + distances + distances**2 / 3) * decay
            noise = variances[3] * np.eye(len(targets))
            terms = [variances[0] * linear, variances[1] * additive, smooth, noise]
            lower = cholesky(sum(terms) + 1e-8 * np.eye(len(targets)), lower=True)
            inverse = cho_solve((lower, True), np.eye(len(targets)))
            alpha = inverse @ targets
            off = (logs - medians) / LOG_STD
            value = 0.5 * targets @ alpha + np.log(np.diag(lower)).sum() + 0.5 * off @ off
            change = inverse - np.outer(alpha, alpha)
            by_length = change * (5 / 6) * variances[2] * (1 + distances) * decay
            squares = 2 * (by_length.sum(axis=1) @ scaled**2 - (scaled * (by_length @ scaled)).sum(axis=0))
            gradient = np.concatenate([[(change * term).sum() for term in terms], squares])
            return float(value), gradient + off / LOG_STD

        bounds = [(median - 4 * LOG_STD, median + 4 * LOG_STD) for median in medians]
        found = minimize(
            objective, medians, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS}
        )
        self._linear, self._additive, self._smooth, self._noise = np.exp(2 * found.x[:4])
        self._lengths = np.exp(found.x[4:])

    # ------------------------------------------------------------ prediction

    def _covariance(
        self, points: FloatArray, choices: FloatArray, others: FloatArray, other_choices: FloatArray
    ) -> FloatArray:
        distances = np.sqrt(5 * _squares(points / self._lengths, others / self._lengths))
        found = np.exp(-distances)
        found *= self._smooth + self._smooth * distances * (1 + distances / 3)
        found += points @ (self._linear / points.shape[1] * others).T
        found += choices @ (self._additive * other_choices).T
        return np.asarray(found)

    def _noisy_covariance(self, points: FloatArray, choices: FloatArray) -> FloatArray:
        found = self._covariance(points, choices, points, choices)
        return np.asarray(found + (self._noise + 1e-8) * np.eye(len(points)))

    def predict(self, genes: Genes) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of the accuracy without noise, (num_archs,) each; equations 2.25 and 2.26.

        With many evaluated children the deviation is what some of them leave, which is a little more.
        """
        points, choices = self.features(genes), self.features.choices(genes)
        cross = self._covariance(self._points, self._choices, points, choices)
        explained = solve_triangular(self._lower_some, cross[self._some], lower=True)
        variance = self._prior(points) - (explained**2).sum(axis=0)
        return self.mean + self.std * (self._alpha @ cross), self.std * np.sqrt(np.maximum(variance, 1e-12))

    def _prior(self, points: FloatArray) -> FloatArray:
        """Variances of children before anything is evaluated, (num_archs,)."""
        return np.asarray(self._linear * (points**2).mean(axis=1) + self._additive + self._smooth)


class Posterior:
    """What is believed of some children, and would be believed if others of them were evaluated as expected.

    Args:
        model: of the accuracy.
        genes: the children, (num_archs, num_genes).
    """

    def __init__(self, model: AccuracyModel, genes: Genes) -> None:
        self._model = model
        self._points, self._choices = model.features(genes), model.features.choices(genes)
        cross = model._covariance(model._points, model._choices, self._points, self._choices)
        self.mean = model.mean + model.std * (model._alpha @ cross)
        self._explained = solve_triangular(model._lower, cross, lower=True)
        self._variance = np.maximum(model._prior(self._points) - (self._explained**2).sum(axis=0), 1e-12)

    @property
    def std(self) -> FloatArray:
        """Standard deviations, (num_archs,)."""
        return np.asarray(self._model.std * np.sqrt(self._variance))

    def observe(self, index: int) -> None:
        """Count a child as evaluated: what resembles it becomes as certain as that makes it."""
        model, at = self._model, slice(index, index + 1)
        prior = model._covariance(self._points[at], self._choices[at], self._points, self._choices)[0]
        covariance = prior - self._explained[:, index] @ self._explained
        explained = covariance / np.sqrt(self._variance[index] + model._noise)
        self._explained = np.vstack([self._explained, explained])
        self._variance = np.maximum(self._variance - explained**2, 1e-12)


def _squares(a: FloatArray, b: FloatArray) -> FloatArray:
    """Squared distances between points, (num_a, num_b)."""
    return np.asarray(np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0))
