"""The numbers of a batch norm layer, each one declaration."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from bnlightning.monitors.counting.norms import NormCounts
from bnlightning.monitors.statistic import Alarm, Catalogue, Look, Statistic, Summary

_AT_STEP = (
    "Running statistics are those of rank 0 before the sampled step. Batch statistics are over all micro-batches and "
    "ranks of the step."
)
_MEAN_DRIFT = (
    "Distance of the running mean from the batch mean, in running standard deviations. The largest channel counts."
)
_VAR_DRIFT = (
    "Natural logarithm of running variance over batch variance, without its sign: 0.7 is a factor of 2. The largest "
    "channel counts."
)
_SPREAD = (
    "Standard deviation over the ranks of their own batch means, in standard deviations of the whole batch of the "
    "sampled step. The largest channel counts. Only with several ranks."
)
_SMALLEST = "Smallest running variance among the channels, on rank 0 before the sampled step."
_NEAR_ZERO = "Share of the entries of `weight`, the scale, that are below 1e-3 in magnitude before the sampled step."
_NONFINITE = (
    "Share of the channels with a NaN or an infinity in the input of the sampled step, on any rank, or in the running "
    "statistics."
)
_MEAN_HEALTH = (
    "0.1 to 0.5. By chance alone it is never 0. Above 0.5, evaluation differs from training. Raise `momentum` if the "
    "running statistics lag behind, or the batch size if the batch statistics are noisy."
)
_VAR_HEALTH = "Below about 0.7. Above it, evaluation differs from training. The cures are those of `norm_mean_drift`."
_SPREAD_HEALTH = "Small. Where it is large, synchronise the statistics over the ranks (`sync=True`), or shuffle better."
_SMALLEST_HEALTH = (
    "Well above the layer's `eps`. At 0 a channel is constant in training, and any change of it is blown up in "
    "evaluation."
)
_NEAR_ZERO_HEALTH = "0. A channel with a scale of zero is switched off. Weight decay on the scale may be the cause."
# Of drifts and spreads in standard deviations.
_SMALL = (0.0, 0.5)
_NONFINITE_HEALTH = "Try a lower learning rate or a warm-up, and look at `health/first_nonfinite_layer`."


def norm_catalogue() -> Catalogue[NormCounts, NormCounts]:
    """The numbers of single batch norm layers and of all of them together, with their descriptions."""
    return Catalogue(
        "norm",
        [
            Statistic(
                "nonfinite",
                _nonfinite_channels,
                f"{_NONFINITE} Written only where there are any.",
                f"This chart does not exist. {_NONFINITE_HEALTH}",
                look=Look("NaN or inf", ticks={}, absent=0.0),
                alarm=Alarm(
                    "of the channels have a NaN or an infinity in their input or their running statistics",
                    "a lower learning rate, a warm-up, or `skip_nonfinite_batches`",
                ),
            ),
            Statistic(
                "mean_drift",
                attrgetter("mean_drift"),
                f"{_MEAN_DRIFT} {_AT_STEP}",
                _MEAN_HEALTH,
                look=Look(
                    "mean drift",
                    low=0.05,
                    high=5.0,
                    ticks={0.05: "0.05", 0.5: "0.5", 5.0: "5"},
                    log=True,
                    healthy=_SMALL,
                ),
                alarm=Alarm(
                    "the running mean is {value} running standard deviations away from the batch mean, so evaluation "
                    "differs from training",
                    "a larger `momentum`, larger batches, or `recompute_statistics` before an evaluation",
                ),
            ),
            Statistic(
                "var_drift",
                attrgetter("var_drift"),
                f"{_VAR_DRIFT} {_AT_STEP}",
                _VAR_HEALTH,
                look=Look("variance drift", high=4.0, ticks={0.0: "0", 0.7: "0.7", 4.0: "4"}, healthy=(0.0, 0.7)),
                alarm=Alarm(
                    "the logarithm of the running over the batch variance is {value} in magnitude, so evaluation "
                    "differs from training",
                    "a larger `momentum`, larger batches, or `recompute_statistics` before an evaluation",
                ),
            ),
            Statistic(
                "rank_spread",
                attrgetter("rank_spread"),
                _SPREAD,
                _SPREAD_HEALTH,
                look=Look("rank spread", high=2.0, ticks={0.0: "0", 0.5: "0.5", 2.0: "2"}, healthy=_SMALL),
            ),
            Statistic(
                "scale_near_zero",
                attrgetter("scale_near_zero"),
                _NEAR_ZERO,
                _NEAR_ZERO_HEALTH,
                look=Look("scale near zero"),
            ),
            Statistic(
                "min_running_var",
                attrgetter("min_running_var"),
                _SMALLEST,
                _SMALLEST_HEALTH,
                look=Look(
                    "smallest variance",
                    "low",
                    1e-8,
                    1.0,
                    {1e-8: "1e-8", 1e-4: "1e-4", 1.0: "1"},
                    log=True,
                    healthy=(1e-4, math.inf),
                ),
            ),
        ],
        _HEALTH,
    )


@dataclass(frozen=True)
class _Extreme:
    """The largest or the smallest of a number over the layers that have it."""

    name: str
    choose: Callable[[list[float]], float]

    def __call__(self, layers: Sequence[NormCounts]) -> float | None:
        values = [value for layer in layers if (value := getattr(layer, self.name)) is not None]
        return self.choose(values) if values else None


def _nonfinite_channels(layer: NormCounts) -> float | None:
    return layer.nonfinite or None


def _near_zero(layers: Sequence[NormCounts]) -> float | None:
    scales = sum(layer.scales for layer in layers)
    return sum((layer.scale_near_zero or 0.0) * layer.scales for layer in layers) / scales if scales else None


def _nonfinite(layers: Sequence[NormCounts]) -> float | None:
    channels = sum(layer.channels for layer in layers)
    return sum(layer.nonfinite * layer.channels for layer in layers) / channels if channels else None


_HEALTH = (
    Summary[NormCounts](
        "norm_mean_drift",
        _Extreme("mean_drift", max),
        f"{_MEAN_DRIFT} The worst layer of the network. {_AT_STEP}",
        _MEAN_HEALTH,
    ),
    Summary[NormCounts](
        "norm_var_drift",
        _Extreme("var_drift", max),
        f"{_VAR_DRIFT} The worst layer of the network. {_AT_STEP}",
        _VAR_HEALTH,
    ),
    Summary[NormCounts](
        "norm_rank_spread",
        _Extreme("rank_spread", max),
        f"{_SPREAD} The worst layer of the network.",
        _SPREAD_HEALTH,
    ),
    Summary[NormCounts](
        "norm_min_running_var",
        _Extreme("min_running_var", min),
        f"{_SMALLEST} The smallest of all layers.",
        _SMALLEST_HEALTH,
    ),
    Summary[NormCounts](
        "norm_scale_near_zero", _near_zero, f"{_NEAR_ZERO} Over the entries of all layers.", _NEAR_ZERO_HEALTH
    ),
    Summary[NormCounts](
        "norm_nonfinite", _nonfinite, f"{_NONFINITE} Over the channels of all layers.", f"0. {_NONFINITE_HEALTH}"
    ),
)
