"""A Gaussian process over the layers: what each costs, told from few measured networks and a known machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.sparse import csr_array

from hwnas.layers import Layer
from hwnas.predictors.base import FloatArray, Model
from hwnas.predictors.features import FEATURE_NAMES, FeatureSums, by_name, from_names, layer_shape
from hwnas.predictors.prior import honest_factor
from hwnas.space import Genes

# How much faster or slower a machine is than a known one, as the standard deviation of a logarithm: anything.
_SPEED_STD = 5.0
# Hyperparameters: median and log standard deviation of log-normal beliefs (what 10 measurements do not tell), and
# the box of the search. The least noise keeps the matrices regular.
_MEDIANS, _LOG_STDS = np.log([0.5, 0.1, 0.1, 0.03, 0.03]), np.array([0.5, 1.0, 1.0, 1.0, 1.5])
_LEAST, _GREATEST = np.log([0.05, 0.005, 0.005, 0.003, 2e-3]), np.log([3.0, 1.5, 1.5, 1.0, 1.0])
# Over how many standard deviations of the networks' size and launch-boundness what they have in common changes.
_LENGTH = 2.0
_GRID = np.stack(np.meshgrid(*[np.linspace(-1.5, 1.5, 5)] * 2), axis=-1).reshape(-1, 2)  # in units of that
# Passes of linearisation from each known machine, and from the best of them; how far rates go in one.
_FIRST_PASSES, _MORE_PASSES = 2, 3
_LONGEST_STEP = 1.5
# Known machines that are kept: so many, and none whose log likelihood is so much worse than the best one's.
_MOST_KEPT, _FAR_WORSE = 3, 2.0
# The search takes the cube of so many measurements at most; predictions use all.
_MAX_SEARCHED = 150
# Degrees of freedom of the Student-t distribution of errors: measurements far off count little.
_FREEDOM = 3
# Likeness to a further machine in units of `smooth_std`, by the logarithm of a layer's cost.
_LIKENESS = 3.0
# Ways in which networks differ that predictions know the covariance of exactly.
_DIRECTIONS = 32
_CHUNK = 1024  # architectures predicted at a time: what is worked out of them stays in the processor's cache
# Features whose rates move together, by what they have in common.
_KINDS = [next((end for end in ("_moved", "_elements", "_macs") if name.endswith(end)), "") for name in FEATURE_NAMES]
_LAUNCHES = [not kind and name != "weights" for kind, name in zip(_KINDS, FEATURE_NAMES, strict=True)]
_SAME_KIND = np.equal.outer(_KINDS, _KINDS).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Standard deviations of logarithms.

    Attributes:
        rate_std: of single rates about those of their kind.
        smooth_std: of how the cost of a kind of layer varies with the logarithm of its size and channels.
        shape_std: of what layers of one shape cost beyond that.
        network_std: of what networks alike in size and in the share of launches have in common.
        noise_std: of the measurements.
    """

    rate_std: float
    smooth_std: float
    shape_std: float
    network_std: float
    noise_std: float


@dataclass(frozen=True, slots=True, eq=False)
class KnownMachine:
    """A machine beside which another is described.

    Attributes:
        costs_ms: of each feature in each layer of the space, (num_layers, num_features).
        kind_std: how far the rates of one kind (arithmetic, memory, launches, ...) of the other machine are together
            from this one's, as the standard deviation of a logarithm.
        others_ms: each layer's cost on further machines that the other may resemble, (num_layers, num_others).
    """

    costs_ms: FloatArray
    kind_std: float
    others_ms: FloatArray

    def scaled(self, factor: float) -> KnownMachine:
        """One so many times as slow."""
        return replace(self, costs_ms=factor * self.costs_ms)


class LayerProcess:
    """The model, linear about given rates, with what was measured.

    A network's latency is the sum over its layers of

        sum_j machine[layer, j] exp(rate_j)  *  exp(smooth(layer) + shape(layer))

    with Gaussian rates (those of one kind move together), `smooth` linear in the logarithms of size and channels for
    each kind of layer and in those of what the layer costs on further machines, and `shape` independent for each
    shape of layer. To first order the logarithm of the latency is linear in all of them, with the layers' shares of
    it as weights: a Gaussian process over networks. Added is a smooth function of the network's size and of its share
    of launches: caches overflow, launches overlap with work. Equation numbers are those of Rasmussen and Williams,
    Gaussian Processes for Machine Learning, 2006.

    Args:
        sums: of the space.
        machine: the known one.
        counts: how often each layer is in each measured network, (num_archs, num_layers).
        latency_ms: (num_archs,).
        log_rates: where the model is linear, (num_features,).
    """

    def __init__(
        self,
        sums: FeatureSums,
        machine: KnownMachine,
        counts: csr_array,
        latency_ms: FloatArray,
        log_rates: FloatArray,
    ) -> None:
        self.log_rates = log_rates
        self._rates_together = _SPEED_STD**2 + machine.kind_std**2 * _SAME_KIND
        self._costs = machine.costs_ms * np.exp(log_rates)
        self._layer_ms = self._costs.sum(axis=1)
        smooth, shapes = _descriptions(sums)
        ratios = np.log(machine.others_ms / machine.costs_ms.sum(axis=1, keepdims=True))
        smooth = np.hstack([smooth, _LIKENESS * (ratios - ratios.mean(axis=0))])
        self._launch_ms = self._costs[:, _LAUNCHES].sum(axis=1)
        self._smooth, self._shapes = self._layer_ms[:, None] * smooth, shapes.multiply(self._layer_ms[:, None]).tocsr()
        total_ms = counts @ self._layer_ms
        self._shares = counts.multiply(1 / total_ms[:, None]).tocsr()
        self._by_feature = self._shares @ self._costs
        self._by_smooth, self._by_shape = self._shares @ self._smooth, (self._shares @ self._shapes).tocsr()
        self.targets = np.log(latency_ms / total_ms) + self._by_feature @ log_rates
        self._fixed = self._by_feature @ self._rates_together @ self._by_feature.T
        raw = self._network(total_ms, counts @ self._launch_ms)
        self._centre, self._spread = raw.mean(axis=0), _LENGTH * np.maximum(raw.std(axis=0), 1e-3)
        self._by_network = self._network_functions(raw)
        self._parts = (
            self._by_feature @ self._by_feature.T,
            self._by_smooth @ self._by_smooth.T,
            (self._by_shape @ self._by_shape.T).toarray(),
            self._by_network @ self._by_network.T,
        )

    @staticmethod
    def _network(total_ms: FloatArray, launch_ms: FloatArray) -> FloatArray:
        """What tells networks apart as a whole, (num_archs, 2)."""
        return np.column_stack([np.log(total_ms), launch_ms / total_ms])

    def _network_functions(self, raw: FloatArray) -> FloatArray:
        """Functions whose products are the correlations of networks, (num_archs, num_functions); equation 8.13."""
        points = (raw - self._centre) / self._spread
        return np.asarray(_matern(points, _GRID) @ _whitening())

    def covariance(self, found: Hyperparameters, noise: FloatArray) -> FloatArray:
        """Of the measurements, (num_archs, num_archs); `noise` is each one's noise variance relative to the usual."""
        variances = np.square([found.rate_std, found.smooth_std, found.shape_std, found.network_std])
        total = self._fixed + np.diag(found.noise_std**2 * noise)
        return np.asarray(total + sum(v * part for v, part in zip(variances, self._parts, strict=True)))

    def search(self, start: Hyperparameters, noise: FloatArray) -> tuple[float, Hyperparameters]:
        """Minus the log likelihood, and the likeliest hyperparameters.

        Equations 5.8 (marginal likelihood) and 5.9 (gradient), with the beliefs.
        """
        some = np.random.default_rng(0).permutation(len(noise))[:_MAX_SEARCHED]
        square, targets, noise = np.ix_(some, some), self.targets[some], noise[some]
        fixed, parts = self._fixed[square], [*(part[square] for part in self._parts), np.diag(noise)]

        def objective(logs: FloatArray) -> tuple[float, FloatArray]:
            terms = [np.exp(2 * log) * part for log, part in zip(logs, parts, strict=True)]
            lower = cholesky(fixed + sum(terms), lower=True)
            inverse = cho_solve((lower, True), np.eye(len(noise)))
            alpha = inverse @ targets
            off = (logs - _MEDIANS) / _LOG_STDS
            value = 0.5 * targets @ alpha + np.log(np.diag(lower)).sum() + 0.5 * off @ off
            change = inverse - np.outer(alpha, alpha)
            return float(value), np.array([(change * term).sum() for term in terms]) + off / _LOG_STDS

        logs = np.log(list(asdict(start).values()))
        bounds = list(zip(_LEAST, _GREATEST, strict=True))
        found = minimize(objective, logs, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 10})
        return float(found.fun), Hyperparameters(*np.exp(found.x).tolist())

    def left_out(self, found: Hyperparameters, noise: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Errors and variances of each measurement predicted from the others, as if it had the usual noise.

        Equation 5.12; (num_archs,) each.
        """
        inverse = np.linalg.inv(self.covariance(found, noise))
        variance = 1 / np.diag(inverse)
        return inverse @ self.targets * variance, variance + found.noise_std**2 * (1 - noise)

    def posterior(self, counts: csr_array, found: Hyperparameters, noise: FloatArray) -> FloatArray:
        """Covariance of the log latencies of other networks, (num_archs, num_archs); equation 2.24.

        Args:
            counts: how often each layer is in each of them, (num_archs, num_layers).
            found: hyperparameters.
            noise: as for `covariance`, of the measured networks.
        """
        total_ms = counts @ self._layer_ms
        shares = counts.multiply(1 / total_ms[:, None]).tocsr()
        functions = self._network_functions(self._network(total_ms, counts @ self._launch_ms))
        by_shape = shares @ self._shapes
        prior = found.shape_std**2 * (by_shape @ by_shape.T).toarray() + found.network_std**2 * functions @ functions.T
        rates, smooth = shares @ self._costs, shares @ self._smooth
        prior += rates @ self._rates_covariance(found) @ rates.T + found.smooth_std**2 * smooth @ smooth.T
        to_measured = shares @ self._to_measured(found) + found.network_std**2 * functions @ self._by_network.T
        lower = cholesky(self.covariance(found, noise), lower=True)
        explained = solve_triangular(lower, to_measured.T, lower=True)
        return np.asarray(prior - explained.T @ explained)

    def rates(self, found: Hyperparameters, noise: FloatArray) -> FloatArray:
        """The most probable log rates, (num_features,); equation 2.25."""
        alpha = np.linalg.solve(self.covariance(found, noise), self.targets)
        return np.asarray(self._rates_covariance(found) @ (self._by_feature.T @ alpha))

    def _rates_covariance(self, found: Hyperparameters) -> FloatArray:
        return np.asarray(self._rates_together + found.rate_std**2 * np.eye(len(FEATURE_NAMES)))

    def _to_measured(self, found: Hyperparameters) -> FloatArray:
        """Covariance of the layers' costs with the measurements, (num_layers, num_archs)."""
        smooth = self._costs @ self._rates_covariance(found) @ self._by_feature.T
        smooth += found.smooth_std**2 * self._smooth @ self._by_smooth.T
        return np.asarray(smooth + found.shape_std**2 * (self._shapes @ self._by_shape.T).toarray())

    def costs_ms(self, found: Hyperparameters, noise: FloatArray) -> FloatArray:
        """What the features cost in each layer after all, (num_layers, num_features)."""
        alpha = np.linalg.solve(self.covariance(found, noise), self.targets)
        correction = self._to_measured(found) @ alpha - self._costs @ self.log_rates
        return np.asarray(self._costs * np.exp(correction / self._layer_ms)[:, None])

    def _probes(self) -> FloatArray:
        """Weights of layers: how the measured networks differ most, and their mean by kind and size."""
        _, _, networks = np.linalg.svd(self._shares.toarray(), full_matrices=False)
        mean = np.asarray(self._shares.mean(axis=0)).reshape(-1, 1)
        by_kind = mean * self._smooth / self._layer_ms[:, None]
        return np.hstack([mean, networks[:_DIRECTIONS].T, by_kind])

    def model(self, sums: FeatureSums, found: Hyperparameters, noise: FloatArray) -> Model:
        """Mean in ms and standard deviation of the logarithm of other networks; equations 2.25 and 2.26.

        All is summed over the layers by table: the latency, the correction of its logarithm, and the layers'
        covariance, exactly where networks differ most (Nystroem: equation 8.2); the rest counts as independent.
        """
        to_measured = self._to_measured(found)
        lower = cholesky(self.covariance(found, noise), lower=True)
        alpha = cho_solve((lower, True), self.targets)
        correction = to_measured @ alpha - self._costs @ self.log_rates
        explained = solve_triangular(lower, to_measured.T, lower=True)
        root = np.hstack(
            [self._costs @ cholesky(self._rates_covariance(found), lower=True), found.smooth_std * self._smooth]
        )
        shapes = found.shape_std * self._shapes
        probes = self._probes()
        seen_by = root @ (root.T @ probes) + shapes @ (shapes.T @ probes) - explained.T @ (explained @ probes)
        values, vectors = np.linalg.eigh(probes.T @ seen_by)
        sure = values > 1e-9 * values[-1]
        directions = seen_by @ (vectors[:, sure] / np.sqrt(values[sure]))
        left_var = (root**2).sum(axis=1) + shapes.power(2).sum(axis=1) - (explained**2).sum(axis=0)
        rest = np.maximum(left_var - (directions**2).sum(axis=1), 0)
        mean = probes[:, 0]  # of which the rest is 0: it counts by how far networks are from it
        # The same for what networks have in common, and its covariance with the layers' costs.
        network_var = found.network_std**2
        weights = network_var * self._by_network.T @ alpha
        seen = network_var * solve_triangular(lower, self._by_network, lower=True)
        told = seen.T @ seen
        shared = -2 * explained.T @ seen
        table = sums.by_layer(
            np.column_stack([self._layer_ms, self._launch_ms, correction, rest, mean * rest, directions, shared])
        )
        num_directions = directions.shape[1]
        of_mean = mean**2 @ rest

        def predict_chunk(genes: Genes) -> tuple[FloatArray, FloatArray]:
            found_sums = table(genes)
            base_ms, launch_ms, corrections, rests, mean_rests = found_sums[:, :5].T
            functions = self._network_functions(self._network(base_ms, launch_ms))
            mean_ms = base_ms * np.exp(corrections / base_ms + functions @ weights)
            known, with_network = np.split(found_sums[:, 5:], [num_directions], axis=1)
            of_layers = _row_products(known, known) / base_ms**2
            of_layers += np.maximum(rests / base_ms**2 - 2 * mean_rests / base_ms + of_mean, 0)
            of_network = network_var - _row_products(functions @ told, functions)
            of_both = _row_products(with_network, functions) / base_ms
            variance = np.maximum(of_layers + of_network + of_both, 0) + found.noise_std**2
            return mean_ms, np.sqrt(variance)

        def predict(genes: Genes) -> tuple[FloatArray, FloatArray]:
            mean_ms, std = np.empty(len(genes)), np.empty(len(genes))
            for start in range(0, len(genes), _CHUNK):
                part = slice(start, start + _CHUNK)
                mean_ms[part], std[part] = predict_chunk(genes[part])
            return mean_ms, std

        return predict


def _row_products(a: FloatArray, b: FloatArray) -> FloatArray:
    """Inner products of rows, (num_rows,)."""
    return np.asarray(np.einsum("ij,ij->i", a, b))


def _matern(a: FloatArray, b: FloatArray) -> FloatArray:
    """The Matern correlation with nu = 5/2 and length 1 between points, (num_a, num_b); equation 4.17."""
    scaled = np.maximum(5 * ((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T), 0)
    np.sqrt(scaled, out=scaled)
    correlation = scaled / 3
    correlation += 1
    correlation *= scaled
    correlation += 1
    correlation *= np.exp(np.negative(scaled, out=scaled), out=scaled)
    return np.asarray(correlation)


@lru_cache(maxsize=1)
def _whitening() -> FloatArray:
    """What makes independent functions of the correlations with the grid, (num_functions, num_functions)."""
    return np.asarray(solve_triangular(cholesky(_matern(_GRID, _GRID), lower=True), np.eye(len(_GRID)), lower=True).T)


@lru_cache(maxsize=8)
def _descriptions(sums: FeatureSums) -> tuple[FloatArray, csr_array]:
    """Smooth functions (num_layers, num_functions) and shapes (num_layers, num_shapes) of the layers."""
    kinds = {"dense": 0, "pointwise": 1, "pooled": 2, "depthwise": 3, "grouped": 4, "other": 5}
    smooth = np.zeros((len(sums.layers), len(kinds), 3))
    shapes: dict[tuple[object, ...], int] = {}
    columns = []
    for row, layer in enumerate(sums.layers):
        logs = np.log([layer.in_size / 16, layer.in_channels / 64, layer.out_channels / 64])
        smooth[row, kinds[_kind(layer)]] = logs
        columns.append(shapes.setdefault(layer_shape(layer), len(shapes)))
    rows = np.arange(len(columns))
    return smooth.reshape(len(columns), -1), csr_array((np.ones(len(columns)), (rows, columns)))


def _kind(layer: Layer) -> str:
    if layer.kind != "conv":
        return "other"
    if layer.groups > 1:
        return "depthwise" if layer.groups == layer.in_channels else "grouped"
    return "dense" if layer.kernel > 1 else "pointwise" if layer.in_size > 1 else "pooled"


@dataclass(frozen=True, slots=True)
class _State:
    log_rates: FloatArray
    hyperparameters: Hyperparameters
    noise: FloatArray
    loss: float = np.inf


def fit_layers(
    sums: FeatureSums,
    machines: Sequence[KnownMachine],
    genes: Genes,
    latency_ms: FloatArray,
    weights: FloatArray,
) -> dict[str, Any]:
    """Describe a measured machine beside known ones, each as probable as it makes the measurements.

    Linearises anew at the most probable rates (Gauss-Newton). Measurements that the others contradict lose weight:
    Student-t errors by iterative reweighting (Lange, Little and Taylor, JASA 1989, section 3).

    Args:
        sums: of the space.
        machines: the known ones, at least one.
        genes: (num_archs, num_genes).
        latency_ms: (num_archs,).
        weights: (num_archs,).

    Returns:
        A JSON object for `process_model` and `process_costs_ms`: the measurements, and for each machine that is worth
        keeping its index, scale, rates where the model is linear, hyperparameters, noise variances relative to the
        usual, and probability; `std_factor`, with which standard deviations are multiplied (see `honest_factor`). And
        `left_out` (see `LatencyPredictor._learn`).
    """
    counts = sums.counts(genes)

    def improve(machine: KnownMachine, state: _State, passes: int) -> _State:
        for _ in range(passes):
            process = LayerProcess(sums, machine, counts, latency_ms, state.log_rates)
            loss, found = process.search(state.hyperparameters, state.noise)
            errors, variances = process.left_out(found, state.noise)
            noise = (_FREEDOM + errors**2 / variances) / (_FREEDOM + 1) / weights
            step = process.rates(found, noise) - state.log_rates
            step *= min(1.0, _LONGEST_STEP / max(np.abs(step).max(), 1e-9))
            state = _State(state.log_rates + step, found, noise, loss)
        return state

    scales = [float(np.median(latency_ms / (counts @ machine.costs_ms.sum(axis=1)))) for machine in machines]
    scaled = [machine.scaled(scale) for machine, scale in zip(machines, scales, strict=True)]
    medians = Hyperparameters(*np.exp(_MEDIANS).tolist())
    start = _State(np.zeros(len(FEATURE_NAMES)), medians, 1 / weights)
    states = [improve(machine, start, _FIRST_PASSES) for machine in scaled]
    losses = np.array([state.loss for state in states])
    kept = [index for index in np.argsort(losses)[:_MOST_KEPT].tolist() if losses[index] < losses.min() + _FAR_WORSE]
    probabilities = np.exp(losses.min() - losses[kept])
    probabilities /= probabilities.sum()
    members, errors, variances = [], np.zeros(len(genes)), np.zeros(len(genes))
    for index, probability in zip(kept, probabilities.tolist(), strict=True):
        state = improve(scaled[index], states[index], _MORE_PASSES)
        process = LayerProcess(sums, scaled[index], counts, latency_ms, state.log_rates)
        left_out, variance = process.left_out(state.hyperparameters, state.noise)
        errors, variances = errors + probability * left_out, variances + probability * variance
        members.append(
            {
                "machine": index,
                "scale": scales[index],
                "probability": probability,
                "log_rates": by_name(state.log_rates),
                "hyperparameters": asdict(state.hyperparameters),
                "noise": state.noise.tolist(),
            }
        )
    return {
        "members": members,
        "std_factor": honest_factor(np.abs(errors) / np.sqrt(variances), num_tuned=len(_MEDIANS)),
        "genes": genes.tolist(),
        "latency_ms": latency_ms.tolist(),
        "left_out": errors,
    }


def process_model(sums: FeatureSums, machines: Sequence[KnownMachine], learned: dict[str, Any]) -> Model:
    """What predicts networks, from what `fit_layers` returned for the same machines."""
    members = [
        (probability, process.model(sums, found, noise))
        for probability, process, found, noise in _members(sums, machines, learned)
    ]
    factor = float(learned["std_factor"])

    def predict(genes: Genes) -> tuple[FloatArray, FloatArray]:
        logs, variances = np.zeros(len(genes)), np.zeros(len(genes))
        for probability, model in members:
            mean_ms, std = model(genes)
            logs, variances = logs + probability * np.log(mean_ms), variances + probability * std**2
        mean_ms = np.exp(logs)
        return mean_ms, factor * np.sqrt(variances) * mean_ms

    return predict


def process_costs_ms(sums: FeatureSums, machines: Sequence[KnownMachine], learned: dict[str, Any]) -> FloatArray:
    """The same for what the features cost in each layer, (num_layers, num_features)."""
    return sum(
        (p * process.costs_ms(found, noise) for p, process, found, noise in _members(sums, machines, learned)),
        start=np.zeros((len(sums.layers), len(FEATURE_NAMES))),
    )


def process_covariance(
    sums: FeatureSums, machines: Sequence[KnownMachine], learned: dict[str, Any], genes: Genes
) -> tuple[FloatArray, float]:
    """Covariance of the log latencies of networks, (num_archs, num_archs), and the variance of a measurement's noise.

    Means over the machines that `fit_layers` kept.
    """
    counts = sums.counts(genes)
    total, noise_var = np.zeros((len(genes), len(genes))), 0.0
    for probability, process, found, noise in _members(sums, machines, learned):
        total += probability * process.posterior(counts, found, noise)
        noise_var += probability * found.noise_std**2
    return total, noise_var


def _members(
    sums: FeatureSums, machines: Sequence[KnownMachine], learned: dict[str, Any]
) -> Iterator[tuple[float, LayerProcess, Hyperparameters, FloatArray]]:
    counts = sums.counts(np.array(learned["genes"], dtype=np.int8))
    latency_ms = np.array(learned["latency_ms"])
    for member in learned["members"]:
        machine = machines[member["machine"]].scaled(float(member["scale"]))
        process = LayerProcess(sums, machine, counts, latency_ms, from_names(member["log_rates"]))
        found = Hyperparameters(**member["hyperparameters"])
        yield float(member["probability"]), process, found, np.array(member["noise"])
