"""The promise of callbacks that LightningCLI can save them: the saved configuration makes the same callbacks."""

import sys

import lightning
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

import bnlightning

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def by_name(path, module):
    return path.startswith("net.")


def make_norm(num_features, **options):
    return nn.GroupNorm(1, num_features)


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])


RULE = f"{__name__}.by_name"


def cli(callbacks):
    arguments = {"trainer": {"callbacks": callbacks, "logger": False}}
    return LightningCLI(
        BoringModel, run=False, save_config_callback=None, seed_everything_default=False, args=arguments
    )


def saved(made):
    """As LightningCLI itself saves it."""
    return yaml.safe_load(made.parser.dump(made.config, skip_none=False))["trainer"]


def callback(made, name):
    (found,) = [one for one in made.trainer.callbacks if type(one).__name__ == name]
    return found


CASES = [
    ("ActivationMonitor", {}),
    ("ActivationMonitor", {"modules": "net.*"}),
    ("ActivationMonitor", {"modules": ["net.*"]}),
    ("ActivationMonitor", {"modules": ["net.*", "head"], "every_n_steps": 7, "tau": 0.1, "warn_dead_above": 0.5}),
    ("ActivationMonitor", {"modules": "torch.nn.ReLU"}),
    ("ActivationMonitor", {"modules": ["torch.nn.ReLU", RULE, "net.*"], "check_finite_every_n_steps": None}),
    ("ActivationMonitor", {"modules": RULE, "output_gradients": True, "effective_rank": True}),
    ("GradientMonitor", {}),
    ("GradientMonitor", {"parameters": "*.weight"}),
    ("GradientMonitor", {"parameters": ["*.weight", "head.bias"], "max_parameters": 3}),
    ("GradientMonitor", {"parameters": RULE}),
    ("BatchNormMonitor", {"modules": ["net.*"], "max_layers": 3}),
    ("BatchNormMonitor", {"modules": ["torch.nn.BatchNorm1d"]}),
    ("BatchNormMonitor", {"modules": RULE}),
    ("SwapNorm", {"to": "none"}),
    ("SwapNorm", {"to": f"{__name__}.make_norm", "strict": False}),
    ("PredictionMonitor", {"every_n_steps": 3, "max_points": 10}),
    ("PublishedValues", {"values": {"acc": 0.9}, "step": 3}),
    ("PublishedCurve", {"metric": "val/acc", "values": [0.1, 0.2], "every_n_steps": 5}),
    ("PreemptionCheckpoint", {"path": "stopped.ckpt"}),
    ("TrainingProgressBar", {"refresh_rate": 3}),
]


def arguments_of(made):
    return {name: value for name, value in vars(made).items() if not name.startswith("_")}


@pytest.mark.parametrize(("name", "given"), CASES)
def test_a_saved_configuration_makes_the_same_callback(name, given):
    first = cli([{"class_path": f"bnlightning.{name}", "init_args": given}])
    config = saved(first)["callbacks"]
    found = config[0]["init_args"]
    assert {name: found[name] for name in given} == given
    second = cli(config)
    one, other = callback(first, name), callback(second, name)
    assert arguments_of(other) == arguments_of(one)
    assert other.state_key == one.state_key


def test_import_paths_are_types_and_functions():
    made = cli(
        [{"class_path": "bnlightning.ActivationMonitor", "init_args": {"modules": ["torch.nn.ReLU", RULE, "a.b"]}}]
    )
    assert callback(made, "ActivationMonitor").modules == [nn.ReLU, by_name, "a.b"]


def test_options_of_a_swap_are_saved():
    options = {"momentum": 0.25, "convention": "keras"}
    made = cli([{"class_path": "bnlightning.SwapNorm", "init_args": {"to": "custom"}, "dict_kwargs": options}])
    again = cli(saved(made)["callbacks"])
    assert callback(again, "SwapNorm").options == options


def test_every_public_callback_has_a_case(tmp_path):
    kinds = {
        name
        for name in bnlightning.__all__
        if isinstance(getattr(bnlightning, name), type) and issubclass(getattr(bnlightning, name), lightning.Callback)
    }
    # The file of initial weights must exist.
    assert kinds == {name for name, _ in CASES} | {"InitialWeights"}
    path = tmp_path / "weights.npz"
    path.touch()
    made = cli([{"class_path": "bnlightning.InitialWeights", "init_args": {"path": str(path)}}])
    assert saved(made)["callbacks"][0]["init_args"] == {"path": str(path)}


def test_a_plugin_can_be_saved():
    plugin = {"class_path": "bnlightning.BatchNormSync", "init_args": {"strict": False}}
    arguments = {"trainer": {"plugins": [plugin], "logger": False, "accelerator": "cpu"}}
    made = LightningCLI(
        BoringModel, run=False, save_config_callback=None, seed_everything_default=False, args=arguments
    )
    assert saved(made)["plugins"] == [{"class_path": "bnlightning.BatchNormSync", "init_args": {"strict": False}}]
