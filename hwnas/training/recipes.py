"""Training configurations: a recipe is a function that returns a complete one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, TypeAlias

from pydantic import ConfigDict, with_config

from hwnas.config import check

Role: TypeAlias = Literal["biggest", "smallest", "random"]
Augmentation: TypeAlias = Literal["none", "standard", "autoaugment", "randaugment"]


def _require(record: object, rule: str, holds: bool, *names: str) -> None:
    values = ", ".join(f"{name}={getattr(record, name)!r}" for name in names)
    if not holds:
        raise ValueError(f"{values}: {rule}")


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Regularisation:
    """What keeps one kind of child from overfitting. Images (augmentation, mixup, cutmix) are the same for all.

    Attributes:
        label_smoothing: of the labels; no effect on a child that learns from soft labels alone.
        dropout: share of the classifier's input that is set to zero.
        drop_connect: share of the images for which a block's residual branch is left out (stochastic depth, Huang et
            al., arXiv 1603.09382), rising linearly with depth to this value, as EfficientNet does; in the last
            `TrainConfig.drop_connect_stages` stages.
    """

    label_smoothing: float = 0.0
    dropout: float = 0.0
    drop_connect: float = 0.0

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "dropout", "drop_connect"):
            _require(self, "must be at least 0 and under 1", 0 <= getattr(self, name) < 1, name)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a training run computes, and a few things that do not (the last group).

    Attributes:
        epochs: passes over the training images; fractions are allowed.
        batch_size: images a step, of all processes together.
        lr: peak learning rate at `lr_batch_size` images a step; it scales linearly with `batch_size`.
        lr_batch_size: see `lr`.
        warmup_epochs: over which the learning rate rises linearly from 0.
        schedule: `exponential`, or `cosine` from the peak to `final_lr` at the end.
        decay_rate: factor of the exponential schedule, applied at once every `decay_epochs`.
        decay_epochs: see `decay_rate`; None for a 150th of `epochs`, as BigNAS's 2.4 of 360.
        final_lr: floor of the learning rate, as a share of the peak: BigNAS's constant ending.
        optimizer: `rmsprop` in TensorFlow's form (eps inside the root), or `sgd` with Nesterov momentum.
        momentum: of either.
        rmsprop_decay: of RMSProp's mean of squared gradients.
        rmsprop_eps: added to that mean inside the root.
        clip_norm: gradients (of all parameters together) longer than this are scaled down to it; None for never.
        clip_value: every element of the gradient is cut to +- this; None for never.
        weight_decay: L2 on the weights of convolutions and classifier, once a step, as if on the biggest child, which
            holds them all; never on biases and batch norm.
        ema: decay of an exponential moving average of the weights, which is then what is evaluated and saved; None
            for the weights themselves.
        gamma_zero: start with gamma = 0 in the last batch norm of every residual branch.

        children: who learns in a step, in this order. BigNAS's sandwich rule: the biggest, the smallest, two random.
        sampling: how a random child is drawn: `layer` (every choice of the space by itself), `stage` (one kernel and
            one expand ratio a stage), `macs` (multiply-adds uniform over the space's range), or `attentive` (of
            `num_candidates` with about equal multiply-adds, the one with the least loss on the batch).
        num_candidates: see `sampling`.
        distillation: what every child after a first `biggest` learns from: that child's output (`soft-labels`:
            cross-entropy; `alpha-divergence`: AlphaNet's), or `none`: from the labels, as the biggest child does.
        alpha: least and greatest alpha of the divergence, of which each image takes the one that is larger.
        alpha_clip: the most that an importance ratio to the power of alpha counts.
        loss_reduction: `sum` (BigNAS) or `mean` of the children's gradients.
        biggest: regularisation of the biggest child.
        others: of all others; none in BigNAS.
        drop_connect_stages: how many of the last stages drop-connect reaches.

        augment: of the images: `none`, `standard` (random crop and mirror), or standard and `autoaugment` or
            `randaugment`. All children see the same.
        mixup: alpha of the Beta distribution by which two images and their labels are mixed; 0 for never.
        cutmix: the same for a rectangle of one image put into another; with both, each step takes one by chance.

        precision: `fp32`, or autocast to `bf16` or `fp16` (with loss scaling); weights and their sums stay fp32.
        sync_bn: with several processes, batch norm over the images of all of them.
        seed: of initialisation, order of the images, augmentation, children and dropout.

        device: `auto` takes a GPU if there is one.
        threads: of torch; None measures at the start which number is fastest here.
        evaluate_every: epochs between evaluations of the children in `watch`; 0 for none, not even at the end.
        watch: children to evaluate: `smallest`, `biggest`, or files with an architecture.
        watch_images: validation images to evaluate them on, at most.
        checkpoint_every_s: time between checkpoints, seconds.
        keep_checkpoints: the last so many are kept.
    """

    epochs: float
    batch_size: int
    lr: float
    lr_batch_size: int
    warmup_epochs: float
    schedule: Literal["exponential", "cosine"] = "exponential"
    decay_rate: float = 0.97
    decay_epochs: float | None = None
    final_lr: float = 0.05
    optimizer: Literal["rmsprop", "sgd"] = "rmsprop"
    momentum: float = 0.9
    rmsprop_decay: float = 0.9
    rmsprop_eps: float = 1e-3
    clip_norm: float | None = None
    clip_value: float | None = None
    weight_decay: float = 1e-5
    ema: float | None = None
    gamma_zero: bool = True

    children: tuple[Role, ...] = ("biggest", "smallest", "random", "random")
    sampling: Literal["layer", "stage", "macs", "attentive"] = "layer"
    num_candidates: int = 3
    distillation: Literal["soft-labels", "alpha-divergence", "none"] = "soft-labels"
    alpha: tuple[float, float] = (-1.0, 1.0)
    alpha_clip: float = 5.0
    loss_reduction: Literal["sum", "mean"] = "sum"
    biggest: Regularisation = Regularisation(label_smoothing=0.1, dropout=0.2)
    others: Regularisation = Regularisation()
    drop_connect_stages: int = 2

    augment: Augmentation = "standard"
    mixup: float = 0.0
    cutmix: float = 0.0

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sync_bn: bool = False
    seed: int = 0

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    evaluate_every: float = 1.0
    watch: tuple[str, ...] = ("smallest", "biggest")
    watch_images: int = 2000
    checkpoint_every_s: float = 30.0
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        def each(rule: str, holds: Any, *names: str) -> None:
            for name in names:
                value = getattr(self, name)
                _require(self, rule, value is None or holds(value), name)

        each("must be over 0", lambda v: v > 0, "epochs", "lr", "rmsprop_eps", "alpha_clip")
        each("must be over 0, or null", lambda v: v > 0, "decay_epochs", "threads", "clip_norm", "clip_value")
        each("must be at least 1", lambda v: v >= 1, "batch_size", "lr_batch_size", "num_candidates")
        each("must be at least 1", lambda v: v >= 1, "keep_checkpoints", "watch_images")
        each("must be at least 0", lambda v: v >= 0, "warmup_epochs", "weight_decay", "seed", "mixup", "cutmix")
        each("must be at least 0", lambda v: v >= 0, "drop_connect_stages", "evaluate_every", "checkpoint_every_s")
        each("must be at least 0 and under 1", lambda v: 0 <= v < 1, "momentum", "rmsprop_decay", "ema")
        each("must be over 0 and at most 1", lambda v: 0 < v <= 1, "decay_rate")
        each("must be at least 0 and at most 1", lambda v: 0 <= v <= 1, "final_lr")
        _require(self, "must be two numbers, the least first", self.alpha[0] <= self.alpha[1], "alpha")
        _require(self, "must name at least one child", len(self.children) > 0, "children")
        _require(
            self,
            "the child that the others learn from must come first: put biggest first, or set distillation=none",
            self.distillation == "none" or self.children[0] == "biggest",
            *("children", "distillation"),
        )

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up, at this batch size."""
        return self.lr * self.batch_size / self.lr_batch_size

    def learning_rate(self, epoch: float) -> float:
        """The learning rate at a time counted in epochs."""
        if epoch < self.warmup_epochs:
            return self.peak_lr * epoch / self.warmup_epochs
        if self.schedule == "cosine":
            share = min(1.0, (epoch - self.warmup_epochs) / max(1e-9, self.epochs - self.warmup_epochs))
            return self.peak_lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * share)) / 2)
        decayed: float = self.decay_rate ** (epoch // (self.decay_epochs or self.epochs / 150))
        return self.peak_lr * max(decayed, self.final_lr)

    def differences(self, other: TrainConfig) -> list[str]:
        """What would make two runs end with different weights, as `lr=0.1 there, 0.2 now`; `other` is there."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{name}={theirs[name]} there, {mine[name]} now" for name in mine if mine[name] != theirs[name]
                and name not in WITHOUT_EFFECT]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: object, source: str = "training configuration") -> Self:
        """The inverse of `to_dict`.

        Raises:
            InputError: a value that breaks a rule, or an unknown key.
        """
        return check(cls, value, source=source)


# Fields that may change when a training goes on: on the same kind of processor the weights end up the same.
WITHOUT_EFFECT = (
    *("device", "threads", "evaluate_every", "watch", "watch_images"),
    *("checkpoint_every_s", "keep_checkpoints"),
)


def bignas() -> TrainConfig:
    """BigNAS on ImageNet (Yu et al., arXiv 2003.11142; batch 4096, 360 epochs as its reproductions train)."""
    return TrainConfig(
        epochs=360,
        batch_size=4096,
        lr=0.256,
        lr_batch_size=4096,
        warmup_epochs=5,
        augment="autoaugment",
    )


def sgd_cosine() -> TrainConfig:
    """AttentiveNAS's (arXiv 2011.09011; facebookresearch/AttentiveNAS, configs/train_attentive_nas_models.yml).

    Nesterov momentum, cosine to 0, gradients cut to +-1, drop-connect of the biggest child. Its BestUp-3 sampling is
    `-o train.sampling=attentive`.
    """
    return TrainConfig(
        epochs=360,
        batch_size=2048,
        lr=0.1,
        lr_batch_size=2048,
        warmup_epochs=5,
        schedule="cosine",
        final_lr=0.0,
        optimizer="sgd",
        clip_value=1.0,
        biggest=Regularisation(label_smoothing=0.1, dropout=0.2, drop_connect=0.2),
        augment="autoaugment",
    )


def alphanet() -> TrainConfig:
    """AlphaNet's (arXiv 2102.07954; facebookresearch/AlphaNet): `sgd_cosine` with its adaptive alpha-divergence."""
    return replace(sgd_cosine(), distillation="alpha-divergence")


def short() -> TrainConfig:
    """A few epochs on small images: minutes on a desktop processor.

    Small batches and SGD with a high rate learn most from so few images; augmentation and gamma-zero cost more than
    they give in an epoch or two. Children in the middle of the space gain most from the cosine and the weight decay:
    undecayed, the weights that all children share grew fastest, which may slow them down behind batch norm
    (benchmarks/results/bignas_claim_notes.md).
    """
    return TrainConfig(
        epochs=1.4,
        batch_size=32,
        lr=0.2,
        lr_batch_size=32,
        warmup_epochs=0.05,
        schedule="cosine",
        final_lr=0.0,
        optimizer="sgd",
        weight_decay=5e-4,
        gamma_zero=False,
        biggest=Regularisation(dropout=0.1),
        augment="none",
    )


RECIPES = {"bignas": bignas, "sgd_cosine": sgd_cosine, "alphanet": alphanet, "short": short}
