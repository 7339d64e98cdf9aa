"""The application behind ``python -m bnlightning.train``, and what its configuration names."""

from bnlightning.experiments.command import CompareRuns as CompareRuns
from bnlightning.experiments.trainer_parts import CheckpointFiles as CheckpointFiles
from bnlightning.experiments.trainer_parts import RunLogger as RunLogger
