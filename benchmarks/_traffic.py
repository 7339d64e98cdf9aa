"""What the monitors and the synchronised layers send, by formulas, and how long a network takes for it, by a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NUMBER = 8
"""Bytes of an int64 and of a float64, which is what is reduced, but for the backward pass of a layer."""
_BINS = 4096


# Formulas. Each gives the bytes that a rank puts into every collective, in their order.


def activation_messages(
    layers: Sequence[tuple[int, bool]], effective_rank: bool = False, checks: bool = True
) -> list[int]:
    """Of a publication of ``ActivationMonitor`` while all ranks watch the same and nothing is wrong.

    Args:
        layers: Of each watched call its number of units, 0 without, and whether it has limits of saturation. With
            ``output_gradients`` another one without units for each.
        effective_rank: The monitor's argument.
        checks: Whether it still looks for a non-finite value.
    """
    sums = sum((5 if limits else 3) * units for units, limits in layers)
    seconds = sum(units**2 for units, _ in layers if units <= 1024) if effective_rank else 0
    keys, integers = 2 * NUMBER, (_BINS + 3) * NUMBER * len(layers)
    reals, extrema = (2 * len(layers) + sums + seconds) * NUMBER, 2 * NUMBER * len(layers)
    return [keys, extrema, integers, reals, *([NUMBER] if checks else [])]


def gradient_messages(parameters: int, histograms: int, sharded: bool) -> list[int]:
    """Of a publication of ``GradientMonitor``: of all parameters, and of those with tags of their own."""
    integers = (2 * parameters + _BINS * histograms) * NUMBER
    return [integers, 5 * parameters * NUMBER, 2 * parameters * NUMBER] if sharded else []


def batch_norm_messages(channels: Sequence[int]) -> list[int]:
    """Of a publication of ``BatchNormMonitor``: by layer its channels."""
    return [(9 * sum(channels) + 3 * len(channels)) * NUMBER]


def sync_messages(channels: int) -> list[int]:
    """Of a step of a layer with ``sync=True``: an all-gather in the forward, an all-reduce in the backward pass."""
    return [(2 * channels + 1) * NUMBER, 2 * channels * 4]


# The network.


@dataclass(frozen=True)
class Network:
    """What is assumed of it.

    Args:
        launch: Seconds before anything is sent.
        inside: Seconds from one rank to the next in a node.
        between: Seconds from one node to the next.
        bandwidth: Bytes a second out of each rank, of the slowest link on the way.
        per_node: Ranks of a node.
    """

    launch: float
    inside: float
    between: float
    bandwidth: float
    per_node: int = 8


NVLINK = Network(launch=10e-6, inside=2e-6, between=10e-6, bandwidth=200e9)
INFINIBAND = Network(launch=10e-6, inside=2e-6, between=10e-6, bandwidth=25e9)


def network(ranks: int) -> Network:
    """NVLink within a node of 8; beyond, one that is as slow as InfiniBand everywhere."""
    return NVLINK if ranks <= NVLINK.per_node else INFINIBAND


def ring_all_reduce(size: float, ranks: int, on: Network) -> float:
    """Seconds: 2 (P - 1) steps, each with a P-th of the bytes (Thakur et al., 2005)."""
    steps = ring_all_gather(0, ranks, on) - on.launch
    return on.launch + 2 * steps + 2 * (ranks - 1) / ranks * size / on.bandwidth


def tree_all_reduce(size: float, ranks: int, on: Network) -> float:
    """Seconds: up and down a tree of the nodes, pipelined, two trees at once (Sanders et al., 2009)."""
    nodes = math.ceil(ranks / on.per_node)
    depth = (min(ranks, on.per_node) - 1) * on.inside + math.ceil(math.log2(nodes)) * on.between
    return on.launch + 2 * depth + 2 * size / on.bandwidth


def all_reduce(size: float, ranks: int, on: Network) -> float:
    """Seconds by the better of the two."""
    return min(ring_all_reduce(size, ranks, on), tree_all_reduce(size, ranks, on))


def ring_all_gather(size: float, ranks: int, on: Network) -> float:
    """Seconds, with ``size`` bytes of each rank: P - 1 steps, and all bytes of all others."""
    nodes = math.ceil(ranks / on.per_node)
    return on.launch + (ranks - nodes) * on.inside + (nodes - 1) * on.between + (ranks - 1) * size / on.bandwidth


def network_seconds(messages: Sequence[int], ranks: int) -> float:
    return sum(all_reduce(size, ranks, network(ranks)) for size in messages)
