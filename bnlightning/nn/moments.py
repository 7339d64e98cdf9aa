r"""Means and variances of values that lie in several batches or on several ranks.

With :math:`n_r` values in part :math:`r`, of mean :math:`\mu_r` and biased variance :math:`\sigma_r^2`, all values have

.. math::
    n = \sum_r n_r \qquad
    \mu = \frac1n \sum_r n_r \mu_r \qquad
    \sigma^2 = \frac1n \sum_r n_r \big(\sigma_r^2 + (\mu_r - \mu)^2\big)

(Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979). An average
of :math:`x^2` would lose the variance of values far from zero.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Moments:
    """Number, mean and biased variance, of shape ``(C,)``, of all values added so far, in float64."""

    def __init__(self, like: Tensor) -> None:
        self.n = torch.zeros((), dtype=torch.float64, device=like.device)
        self.mean = torch.zeros(len(like), dtype=torch.float64, device=like.device)
        self.var = torch.zeros_like(self.mean)

    def add(self, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        """Merge ``n`` more values (Chan, Golub and LeVeque, 1979), of which there may be none."""
        total = self.n + n
        share = torch.where(total > 0, n / total.clamp(min=1), 0.0)
        # With no values, what their mean and variance are is nobody's business: they may be NaN.
        none = share == 0
        delta = torch.where(none, 0.0, mean.double() - self.mean)
        var = torch.where(none, 0.0, var.double())
        self.mean = self.mean + share * delta
        self.var = (1 - share) * self.var + share * var + share * (1 - share) * delta.square()
        self.n = total


def world_size(process_group: Any = None) -> int:
    """The number of ranks in ``process_group``, by default all; 1 where nothing is distributed."""
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def merge_over_ranks(
    n: int | Tensor, mean: Tensor, var: Tensor, process_group: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The number of values, their mean and their biased variance over all ranks, from each rank's own; float64.

    ``mean`` and ``var`` have shape ``(C,)``, and ``n``, one number for all channels, may be 0. One collective.
    """
    own = torch.cat([mean.double(), var.double(), torch.as_tensor(n, device=mean.device).double().view(1)])
    gathered = own.new_empty(world_size(process_group) * len(own))
    # The newer name, of which torch 2.14 warns where the older one is called.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, own, group=process_group)
    means, variances, counts = gathered.view(-1, len(own)).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    shares = counts / total.clamp(min=1)
    mean = (shares * means).sum(dim=0)
    return total, mean, (shares * (variances + (means - mean).square())).sum(dim=0)
