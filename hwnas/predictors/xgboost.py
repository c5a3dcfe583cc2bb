"""The analytic prior with boosted trees on what it leaves unexplained: for hundreds of measurements."""

from __future__ import annotations

import json
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwnas.predictors.base import FloatArray, Model
from hwnas.predictors.features import FEATURE_NAMES, by_name, feature_sums, from_names
from hwnas.predictors.metrics import fold_masks
from hwnas.predictors.prior import NUM_TUNED, PriorPredictor, fit_prior, relative_std
from hwnas.space import Genes

_PARAMETERS = {
    "objective": "reg:squarederror", "base_score": 0.0, "learning_rate": 0.1, "max_depth": 3,
    "min_child_weight": 3, "subsample": 0.8, "nthread": 1, "seed": 0, "verbosity": 0,
}  # fmt: skip
# Numbers of trees that cross-validation picks from; none leaves the prior alone.
_NUM_TREES = (0, 5, 10, 20, 40, 80, 160)
_FOLDS = 5
_CHUNK = 8192  # architectures evaluated at a time: they stay in the processor's cache

# A leaf's value, or [input, threshold, tree where the input is less, tree where it is not].
Tree: TypeAlias = float | list[Any]


class XgboostPredictor(PriorPredictor):
    """The analytic prior times the exponential of boosted trees over features and genes.

    The trees learn the prior's cross-validated errors. How many there are, and the standard deviation, come from
    cross-validation. Single layers cost what the prior says: the trees know whole networks only.

    What is saved are the trees as plain lists, which numpy evaluates. xgboost's own JSON would tie the file to its
    version, and a damaged one crashes the whole process (xgboost 3.2).
    """

    kind: ClassVar[str] = "xgboost"
    min_samples: ClassVar[int] = 20

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        import xgboost

        fit = fit_prior(feature_sums(self.space)(genes), latency_ms, weights)
        data = xgboost.DMatrix(
            self._inputs(genes),
            label=fit.log_errors,
            weight=fit.trust,
            feature_names=self._input_names(),
            nthread=1,
        )
        errors = np.tile(fit.log_errors, (len(_NUM_TREES), 1))
        for test in fold_masks(len(genes), _FOLDS, np.random.default_rng(0)):
            booster = xgboost.train(_PARAMETERS, data.slice(np.flatnonzero(~test)), _NUM_TREES[-1])
            left_out = data.slice(np.flatnonzero(test))
            for row, num_trees in enumerate(_NUM_TREES[1:], 1):
                errors[row, test] -= booster.predict(left_out, iteration_range=(0, num_trees))
        best = int(np.argmin((fit.trust * errors**2).sum(axis=1)))
        trees: list[Tree] = []
        if _NUM_TREES[best]:
            booster = xgboost.train(_PARAMETERS, data, _NUM_TREES[best])
            trees = [plain_tree(json.loads(tree)) for tree in booster.get_dump(dump_format="json")]
        return {
            "coefficients_ms": by_name(fit.coefficients),
            "trees": trees,
            "relative_std": relative_std(errors[best], NUM_TUNED + 1),
            "left_out": errors[best],
        }

    def _model(self, learned: dict[str, Any]) -> Model:
        prior = feature_sums(self.space).weighted(from_names(learned["coefficients_ms"]))
        std, trees = float(learned["relative_std"]), list(learned["trees"])
        names = self._input_names()

        def predict(genes: Genes) -> tuple[FloatArray, FloatArray]:
            mean_ms = prior(genes)[:, 0]
            for start in range(0, len(genes) if trees else 0, _CHUNK):
                part = slice(start, start + _CHUNK)
                columns = dict(zip(names, np.ascontiguousarray(self._inputs(genes[part]).T), strict=True))
                mean_ms[part] *= np.exp(sum(evaluate(tree, columns) for tree in trees))
            return mean_ms, std * mean_ms

        return predict

    def _inputs(self, genes: Genes) -> NDArray[np.float32]:
        return np.hstack([feature_sums(self.space)(genes), genes]).astype(np.float32)

    def _input_names(self) -> list[str]:
        return [*FEATURE_NAMES, *(gene.name for gene in self.space.genes)]


def plain_tree(node: dict[str, Any]) -> Tree:
    """A node of xgboost's JSON dump, and all below it."""
    if "leaf" in node:
        return float(node["leaf"])
    below = {child["nodeid"]: plain_tree(child) for child in node["children"]}
    return [node["split"], node["split_condition"], below[node["yes"]], below[node["no"]]]


def evaluate(tree: Tree, columns: dict[str, NDArray[np.float32]]) -> FloatArray | float:
    """A tree's value for inputs of shape (num_archs,) each, by name."""
    if not isinstance(tree, list):
        return float(tree)
    name, threshold, less, other = tree
    return np.where(columns[name] < np.float32(threshold), evaluate(less, columns), evaluate(other, columns))
