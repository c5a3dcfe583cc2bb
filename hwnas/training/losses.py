"""What children learn from: labels, or the biggest child's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's soft labels: summed over the classes, mean over the images.

    A mean over both, a known bug of published code, would make it vanish beside the label loss.

    Args:
        logits: (n, num_classes).
        teacher: logits without gradient, (n, num_classes).
    """
    return F.cross_entropy(logits, teacher.softmax(dim=1))


def alpha_divergence(logits: Tensor, teacher: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """AlphaNet's divergence of a student q from its teacher p, for every image (Wang et al., arXiv 2102.07954, 3.1).

        D(p || q) = sum over classes of q (t^alpha - 1) / (alpha (alpha - 1)),  t = p / q;  at alpha = 1: KL(p || q)

    Its gradient is that of -sum of q t^alpha / alpha log q with q and t held fixed: t^alpha is clipped there without
    the gradient vanishing.

    Args:
        logits: the student's, (n, num_classes).
        teacher: the teacher's, without gradient, (n, num_classes).
        alpha: not 0.
        clip: the most that t^alpha counts; at alpha = 1 it is not clipped, as in the released code.

    Returns:
        D, (n,), without gradient, and what to differentiate, (n,).
    """
    log_q, log_p = logits.log_softmax(dim=1), teacher.log_softmax(dim=1)
    q = log_q.detach().exp()
    log_t = log_p - log_q.detach()
    if alpha == 1:
        ratio = log_t.exp()
        divergence = (log_p.exp() * log_t).sum(1)
    else:
        ratio = (alpha * log_t).exp().clamp(max=clip)
        divergence = (q * (ratio - 1)).sum(1) / (alpha * (alpha - 1))
    return divergence, -(q * ratio * log_q).sum(1) / alpha


def adaptive_alpha_divergence(logits: Tensor, teacher: Tensor, alpha: tuple[float, float], clip: float) -> Tensor:
    """For every image the larger of two alpha-divergences, mean over the images: neither over- nor underestimates.

    Args:
        logits: (n, num_classes).
        teacher: logits without gradient, (n, num_classes).
        alpha: the two.
        clip: see `alpha_divergence`.

    Returns:
        A scalar with the divergence's value and gradient.
    """
    (low, low_slope), (high, high_slope) = (alpha_divergence(logits, teacher, a, clip) for a in alpha)
    first = low > high
    slope = torch.where(first, low_slope, high_slope).mean()
    return torch.where(first, low, high).mean() + slope - slope.detach()
