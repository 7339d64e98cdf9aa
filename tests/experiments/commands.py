"""The command, run as a user would, and what it leaves."""

import os
import subprocess
import sys

import numpy as np
import torch
from helpers import read_events
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler as ListSessionGroups

SHORT = ("trainer.max_steps=10", "callbacks.activation_monitor.every_n_steps=5")
"""Options of a command: ten steps, of which three are sampled."""


def start(tmp_path, *arguments, **options):
    """The command in the background."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(
        [sys.executable, "-m", "bnlightning.train", *arguments], cwd=tmp_path, env=environment, **options
    )


def run_directory(tmp_path, experiment):
    """The one directory of the one command that ran."""
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [experiment]
    (directory,) = (tmp_path / "outputs" / experiment).iterdir()
    return directory


def assert_same_results(first, second):
    """Every number and every weight that two runs wrote, bit by bit."""
    one, two = read_events(first), read_events(second)
    assert one.Tags() == two.Tags() and len(one.Tags()["scalars"]) > 5
    for tag in one.Tags()["scalars"]:
        # As lists: what was written twice would not show in a dictionary.
        a, b = ([(item.step, np.float32(item.value).tobytes()) for item in e.Scalars(tag)] for e in (one, two))
        assert a == b, tag
    for tag in one.Tags()["histograms"]:
        a, b = ([(h.step, h.histogram_value) for h in e.Histograms(tag)] for e in (one, two))
        assert a == b, tag
    for tag in one.Tags()["tensors"]:
        a, b = ([(t.step, t.tensor_proto.SerializeToString()) for t in e.Tensors(tag)] for e in (one, two))
        assert a == b, tag
    weights = [torch.load(p / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for p in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())


def read_hparams(directory):
    """What TensorBoard's HParams tab lists of the runs below a directory: by run the values and the last numbers."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(directory))
    context = Context(TBContext(data_provider=provider))
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=100)
    request.allowed_statuses.append(api_pb2.STATUS_SUCCESS)
    request.col_params.add(hparam="model.norm", order=api_pb2.ORDER_ASC)
    handler = ListSessionGroups(RequestContext(), context, "", request)
    runs = {}
    for group in handler.run().session_groups:
        values = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
        runs[group.name] = (values, {metric.name.tag: metric.value for metric in group.metric_values})
    return dict(sorted(runs.items()))
