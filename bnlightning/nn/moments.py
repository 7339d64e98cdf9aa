r"""Means and variances of values that lie in several batches or on several ranks.

Part :math:`r` has :math:`n_r` values with mean :math:`\mu_r` and biased variance :math:`\sigma_r^2`. All values have

.. math::
    n = \sum_r n_r \qquad
    \mu = \frac1n \sum_r n_r \mu_r \qquad
    \sigma^2 = \frac1n \sum_r n_r \big(\sigma_r^2 + (\mu_r - \mu)^2\big)

(Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979). An average
of :math:`x^2` would be simpler, but it loses the variance of values far from zero.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Moments:
    """The number, mean and biased variance of all values added so far, in float64.

    Args:
        like: Tensor of shape ``(C,)`` on the device of the values.

    Attributes:
        n: Number of values per channel, without dimensions.
        mean: Mean of shape ``(C,)``.
        var: Biased variance of shape ``(C,)``.

    Example:
        >>> moments = Moments(torch.zeros(1))
        >>> moments.add(mean=torch.tensor([1.0]), var=torch.tensor([0.0]), n=1)
        >>> moments.add(mean=torch.tensor([4.0]), var=torch.tensor([0.0]), n=2)
        >>> moments.mean.item(), moments.var.item()
        (3.0, 2.0)
    """

    def __init__(self, like: Tensor) -> None:
        self.n = torch.zeros((), dtype=torch.float64, device=like.device)
        self.mean = torch.zeros(len(like), dtype=torch.float64, device=like.device)
        self.var = torch.zeros_like(self.mean)

    def add(self, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        """Merge ``n`` more values by the formula of this module. ``n`` may be 0."""
        total = self.n + n
        share = torch.where(total > 0, n / total.clamp(min=1), 0.0)
        # Without values, their mean and variance are not used: they may be NaN.
        none = share == 0
        delta = torch.where(none, 0.0, mean.double() - self.mean)
        var = torch.where(none, 0.0, var.double())
        self.mean = self.mean + share * delta
        self.var = (1 - share) * self.var + share * var + share * (1 - share) * delta.square()
        self.n = total


def world_size(process_group: Any = None) -> int:
    """Return the number of ranks in ``process_group``, by default of all; 1 if ``torch.distributed`` is not in use."""
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def merge_over_ranks(
    n: int | Tensor, mean: Tensor, var: Tensor, process_group: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the moments of all ranks, in float64 and with one collective. Every rank must call it.

    Args:
        n: Number of values per channel on this rank, one number for all channels. It may be 0.
        mean: Their mean, of shape ``(C,)``.
        var: Their biased variance, of shape ``(C,)``.
        process_group: The ranks to merge; by default all.

    Returns:
        The number of values per channel (no dimensions), their mean and their biased variance (shape ``(C,)``), over
        all ranks.
    """
    own = torch.cat([mean.double(), var.double(), torch.as_tensor(n, device=mean.device).double().view(1)])
    gathered = own.new_empty(world_size(process_group) * len(own))
    # torch 2.14 warns where the older name is called.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, own, group=process_group)
    means, variances, counts = torch.split(gathered.view(-1, len(own)), [len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    shares = counts / total.clamp(min=1)
    mean = (shares * means).sum(dim=0)
    return total, mean, (shares * (variances + (means - mean).square())).sum(dim=0)
