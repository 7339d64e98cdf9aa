"""The numbers of a batch norm layer, each one declaration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from bnlightning.monitors.counting.norms import NormCounts
from bnlightning.monitors.statistic import Catalogue, Statistic, Summary

_AT_STEP = "Running statistics before the sampled step, batch statistics over all its micro-batches and ranks."
_MEAN_DRIFT = "Distance of the running from the batch mean in running standard deviations, largest over the channels."
_VAR_DRIFT = "Logarithm of running over batch variance, in magnitude, largest over the channels; 0.7 is a factor of 2."
_SPREAD = "Standard deviation of the ranks' own batch means, in standard deviations of the batch, largest channel."
_SMALLEST = "Smallest running variance over the channels, before the sampled step."
_NEAR_ZERO = "Share of the entries of the weight below 1e-3 in magnitude, before the sampled step."
_NONFINITE = "Share of the channels with a NaN or an infinity in the input or in the running statistics"
_DRIFT_HEALTH = "0.1 to 0.5. Where it is larger, evaluation differs from training: raise the momentum or the batch."


def norm_catalogue() -> Catalogue[NormCounts, NormCounts]:
    """The numbers of batch norm layers and of all of them together, as loggers are told them."""
    return Catalogue(
        "norm",
        [
            Statistic("mean_drift", attrgetter("mean_drift"), f"{_MEAN_DRIFT} {_AT_STEP}", _DRIFT_HEALTH),
            Statistic("var_drift", attrgetter("var_drift"), f"{_VAR_DRIFT} {_AT_STEP}", "Below about 0.7."),
            Statistic(
                "rank_spread",
                attrgetter("rank_spread"),
                f"{_SPREAD} Only with several ranks.",
                "Small. Where it is large, synchronise the statistics (sync=True) or shuffle better.",
            ),
            Statistic(
                "scale_near_zero",
                attrgetter("scale_near_zero"),
                _NEAR_ZERO,
                "0. A channel with a scale of zero is switched off.",
            ),
            Statistic(
                "min_running_var",
                attrgetter("min_running_var"),
                _SMALLEST,
                "Well above eps. At 0 a channel is constant.",
            ),
            Statistic(
                "nonfinite",
                _nonfinite_channels,
                f"{_NONFINITE}; written only where there are any.",
                "Never written.",
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
        f"{_MEAN_DRIFT} Worst layer. {_AT_STEP}",
        _DRIFT_HEALTH,
    ),
    Summary[NormCounts](
        "norm_var_drift",
        _Extreme("var_drift", max),
        f"{_VAR_DRIFT} Worst layer. {_AT_STEP}",
        "Below about 0.7.",
    ),
    Summary[NormCounts](
        "norm_rank_spread",
        _Extreme("rank_spread", max),
        f"{_SPREAD} Worst layer. Only with several ranks.",
        "Small.",
    ),
    Summary[NormCounts](
        "norm_min_running_var",
        _Extreme("min_running_var", min),
        f"{_SMALLEST} Smallest of all layers.",
        "Well above eps.",
    ),
    Summary[NormCounts]("norm_scale_near_zero", _near_zero, f"{_NEAR_ZERO} Over the weights of all layers.", "0."),
    Summary[NormCounts]("norm_nonfinite", _nonfinite, f"{_NONFINITE}, over the channels of all layers.", "0."),
)
