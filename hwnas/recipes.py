"""Training configurations: a recipe is a function that returns a complete one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from pydantic import ConfigDict, with_config

from hwnas.config import check


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a training run computes.

    Attributes:
        epochs: passes over the training images; fractions are allowed.
        batch_size: images a step.
        lr: peak learning rate at `lr_batch_size` images a step; it scales linearly with `batch_size`.
        lr_batch_size: see `lr`.
        warmup_epochs: over which the learning rate rises linearly from 0.
        decay_rate: factor of the exponential decay, applied at once every `decay_epochs`.
        decay_epochs: see `decay_rate`.
        final_lr: floor of the learning rate, as a share of the peak: BigNAS's constant ending.
        optimizer: `rmsprop` in TensorFlow's form (eps inside the root), or `sgd` with Nesterov momentum.
        momentum: of either.
        rmsprop_decay: of RMSProp's mean of squared gradients.
        rmsprop_eps: added to that mean inside the root.
        clip_norm: gradients longer than this are scaled down to it; None for never.
        weight_decay: L2 on the weights of convolutions and classifier, once a step: on the biggest child, which
            holds them all.
        dropout: on the classifier's input, of the biggest child only.
        label_smoothing: of the biggest child's labels; the others see its soft labels only.
        num_random: random children a step, beside the biggest and the smallest (the sandwich rule).
        loss_reduction: `sum` (BigNAS) or `mean` of the children's gradients.
        augment: what is done to training images: `none`, `standard` (crop and flip), or that and a policy.
        seed: of initialisation, order of the images, augmentation, children and dropout.
        threads: of torch; None measures at the start which number is fastest here.
    """

    epochs: float
    batch_size: int
    lr: float
    lr_batch_size: int
    warmup_epochs: float
    decay_rate: float
    decay_epochs: float
    final_lr: float = 0.05
    optimizer: Literal["rmsprop", "sgd"] = "rmsprop"
    momentum: float = 0.9
    rmsprop_decay: float = 0.9
    rmsprop_eps: float = 1e-3
    clip_norm: float | None = None
    weight_decay: float = 1e-5
    dropout: float = 0.2
    label_smoothing: float = 0.1
    num_random: int = 2
    loss_reduction: Literal["sum", "mean"] = "sum"
    augment: Literal["none", "standard", "autoaugment", "randaugment"] = "standard"
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "must be over 0": ("epochs", "lr", "decay_epochs", "rmsprop_eps"),
            "must be at least 1": ("batch_size", "lr_batch_size"),
            "must be at least 0": ("warmup_epochs", "weight_decay", "num_random", "seed"),
            "must be at least 0 and under 1": ("dropout", "label_smoothing", "momentum", "rmsprop_decay"),
            "must be over 0 and at most 1": ("decay_rate", "final_lr"),
        }
        holds = {
            "must be over 0": lambda v: v > 0,
            "must be at least 1": lambda v: v >= 1,
            "must be at least 0": lambda v: v >= 0,
            "must be at least 0 and under 1": lambda v: 0 <= v < 1,
            "must be over 0 and at most 1": lambda v: 0 < v <= 1,
        }
        for rule, names in rules.items():
            for name in names:
                if not holds[rule](getattr(self, name)):
                    raise ValueError(f"{name}={getattr(self, name)}: {rule}")
        for name in ("threads", "clip_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: must be over 0, or null")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up, at this batch size."""
        return self.lr * self.batch_size / self.lr_batch_size

    def learning_rate(self, epoch: float) -> float:
        """The learning rate at a time counted in epochs."""
        if epoch < self.warmup_epochs:
            return self.peak_lr * epoch / self.warmup_epochs
        decayed: float = self.decay_rate ** (epoch // self.decay_epochs)
        return self.peak_lr * max(decayed, self.final_lr)

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


def bignas() -> TrainConfig:
    """BigNAS on ImageNet (Yu et al., arXiv 2003.11142; batch 4096, 360 epochs as its reproductions train)."""
    return TrainConfig(
        epochs=360,
        batch_size=4096,
        lr=0.256,
        lr_batch_size=4096,
        warmup_epochs=5,
        decay_rate=0.97,
        decay_epochs=2.4,
    )


def short() -> TrainConfig:
    """BigNAS's schedule squeezed into a few epochs on small images: minutes on a desktop processor.

    The learning rate reaches its floor after two thirds of the run, as BigNAS's does. Small batches and SGD with a
    high rate learn most from so few images.
    """
    epochs = 1.4
    return TrainConfig(
        epochs=epochs,
        batch_size=32,
        lr=0.2,
        lr_batch_size=32,
        warmup_epochs=0.05,
        decay_rate=0.97,
        decay_epochs=0.66 * epochs / 98.4,  # 0.97 ** 98.4 is the floor of 5%
        optimizer="sgd",
        dropout=0.1,
        label_smoothing=0.0,
    )


RECIPES = {"bignas": bignas, "short": short}
