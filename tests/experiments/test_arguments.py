import re

import pytest

from bnlightning.experiments.arguments import read_arguments

RELU = ["+experiment=relu"]


@pytest.fixture
def own(tmp_path):
    """A directory of configuration files of one's own, with a key of its own."""
    for name, text in {
        "experiment/mine.yaml": "# @package _global_\nrate: 0.5\nmodel: {learning_rate: '${rate}', width: '${wide}'}\n",
        "model/own.yaml": "_target_: nobody.knows.Model\nwidths: 3\n",
        "start.yaml": "defaults: [train, {experiment: tanh}, _self_]\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return f"--config-dir={tmp_path}"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["experiment=relu"], RELU),
        (RELU, RELU),
        (["-m", "experiment=relu"], ["+experiment=relu", "-m"]),
        (["+trainer=gpu", "+model.norm=none"], ["trainer=gpu", "model.norm=none"]),
        # Not in the configuration, but an argument of the class.
        (["trainer.limit_val_batches=2"], ["+trainer.limit_val_batches=2"]),
        (["+model.norm_options.affine=false"], ["+model.norm_options.affine=false"]),
        (["~callbacks.gradient_monitor", "++model.depth=2"], ["~callbacks.gradient_monitor", "++model.depth=2"]),
        (["model=classifier", "model.width=[3,4]"], ["model=classifier", "model.width=[3,4]"]),
        (
            ["hydra/launcher=joblib", "hydra.sweeper.params=null"],
            ["hydra/launcher=joblib", "hydra.sweeper.params=null"],
        ),
        (["output_dir=ü", "ckpt_path=a=b.ckpt"], ["output_dir='ü'", "ckpt_path='a=b.ckpt'"]),
        (["--info", "defaults"], ["--info", "defaults"]),
        (["--help", "whatever"], ["--help", "whatever"]),
    ],
)
def test_what_is_plain_is_put_into_hydras_words(typed, read):
    assert read_arguments(typed) == {"": read}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("+experimnt=tanh", r"^experimnt is not known\. Did you mean experiment\? --help lists"),
        ("~experimnt", r"Did you mean experiment\?"),
        ("norm=batchnorm", r"^norm is not known\. Did you mean model\.norm\?"),
        ("++nrom=none", r"Did you mean model\.norm\?"),
        ("+model.nrom=none", r"^model\.nrom is not known\. Did you mean model\.norm\?"),
        ("trainer.limit_val_btches=2", r"Did you mean trainer\.limit_val_batches\?"),
        ("+callbacks.activation_montor.every_n_steps=5", r"Did you mean callbacks\.activation_monitor\.every_n_steps"),
        ("+note=hello", r"^note is not known\."),
        ("hydra.swep.dir=a", r"hydra\.sweep\.dir"),
        ("+experiment=tanhh", r"^experiment=tanhh is not known\. Did you mean tanh\? Choose one of init_scale, "),
        ("+experiment=relu,tanhh", r"^experiment=tanhh is not known\."),
        (
            "trainer=gpuu",
            r"^trainer=gpuu is not known\. Did you mean gpu\? Choose one of cpu, ddp, ddp_cpu, fsdp, gpu\.",
        ),
        ("data=null", r"^data=null is not known\. Choose one of "),
        ("--config-name=trian", r"^--config-name=trian is not known\. Did you mean train\?"),
        ("--config-dir=nowhere", r"^--config-dir=nowhere is not a directory"),
        ("model.norm=[none,custom]", r"^model\.norm=\[none,custom\] is .* a list.*: model\.norm=none,custom\.$"),
        ("seed=[1,2]", r"seed=1,2\.$"),
        ("model.depth=2,[3]", r"model\.depth=3\.$"),
        ("model.norm_options.eps=[1,2]", r"model\.norm_options\.eps=1,2\.$"),
        ("ckpt_path=[a,b]", r"ckpt_path=a,b\.$"),
        ("experiment=[tanh,relu]", r"experiment=tanh,relu\.$"),
        ("data.batch_size=abc", r"^data\.batch_size=abc is not possible: give an integer or null\.$"),
        ("trainer.max_steps=null", r"^trainer\.max_steps=null is not possible: give an integer\.$"),
        ("model.normalize_input=5", r"^model\.normalize_input=5 is not possible: give true or false\.$"),
        ("trainer.precision=17", r"^trainer\.precision=17 is not possible: give one of .*, 32-true, "),
        ("output_dir=a,b", r"^output_dir=a,b is not possible: output_dir is one for all runs"),
        ("~seed", r"^~seed is not possible: every run needs it"),
        ("~model", r"^~model is not possible: every run needs it"),
        ("hydra.run.dir=a", r"^hydra\.run\.dir=a is not possible: give output_dir=PATH\.$"),
        ("hydra.sweep.dir=a", r"^hydra\.sweep\.dir=a is not possible: give output_dir=PATH\.$"),
        ("hydra.sweep.subdir=a", r"is not possible: a run's directory is named by what is swept\.$"),
        ("hydra.job.chdir=true", r"^hydra\.job\.chdir=true is not possible"),
        ("trainer.devices=[1,2]x", r"^trainer\.devices=\[1,2\]x cannot be read \("),
        ("--resolve", r"^--resolve is not possible without --cfg"),
        ("--cfg job -m", r"^--cfg and --multirun are not possible together"),
        ("--cfg job seed=1,2", r"^seed=1,2 is not possible with --cfg"),
        ("--experimental-rerun a.pickle", r"^--experimental-rerun is not possible"),
        ("--config-path a", r"^--config-path is not possible: give --config-dir"),
    ],
)
def test_what_means_nothing_is_refused_in_one_sentence(typed, message):
    with pytest.raises(ValueError) as refusal:
        read_arguments(typed.split())
    assert re.search(message, str(refusal.value)) and "\n" not in str(refusal.value), refusal.value


@pytest.mark.parametrize(
    "typed",
    [
        "--experiment tanh",
        "--experiment=tanh",
        "experiment tanh",
        "experiment = tanh",
        "experiment= tanh",
        "experiment:tanh",
        "experiment/tanh",
        "tanh",
        "tnah",
        "--tanh",
    ],
)
def test_an_experiment_in_another_spelling_is_told_the_right_one(typed):
    with pytest.raises(ValueError, match=r"^'[^']*' is not understood: type experiment=tanh\.$"):
        read_arguments(typed.split())


@pytest.mark.parametrize(
    ("typed", "spelling"),
    [
        ("model.norm none", "type model.norm=none."),
        ("--lr 0.1", "type model.learning_rate=0.1."),
        ("--max_steps=5", "type trainer.max_steps=5."),
        # An experiment has the name of this key.
        ("experiment=tanh --learning_rate=0.1", "type model.learning_rate=0.1."),
        ("experiment=tanh --learning_rate 0.1", "type model.learning_rate=0.1."),
        ("learning_rate = 0.1", "type model.learning_rate=0.1."),
        ("experiment= learning_rate", "type experiment=learning_rate."),
        ("learning_rate seed=3", "type experiment=learning_rate."),
        ("--learning_rate", "type experiment=learning_rate."),
        ("foo", "type KEY=VALUE, such as experiment=tanh."),
    ],
)
def test_so_is_any_other_key(typed, spelling):
    with pytest.raises(ValueError, match=re.escape(spelling)):
        read_arguments(typed.split())


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("experiment=tanh experiment=relu seed=1,2", "experiment is given twice: type experiment=tanh,relu."),
        ("experiment=tanh,relu +experiment=tanh", "experiment is given twice: type experiment=tanh,relu."),
        ("trainer=cpu trainer=cpu", "trainer is given twice: type trainer=cpu."),
        ("hydra/launcher=basic hydra/launcher=joblib", "hydra/launcher is given twice: give it once."),
    ],
)
def test_a_group_is_given_once(typed, message):
    with pytest.raises(ValueError) as refusal:
        read_arguments(typed.split())
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("value", "meant"), [("0,001", "0.001"), ("0,05", "0.05"), ("1,05", "1.05"), ("0,1,0,01", "0.01")]
)
@pytest.mark.parametrize("key", ["model.learning_rate", "+model.norm_options.eps"])
def test_a_decimal_comma_is_told_from_a_sweep(key, value, meant):
    with pytest.raises(ValueError, match=rf"a comma makes a list, .* Decimals take a point: {re.escape(meant)}\.$"):
        read_arguments([f"{key}={value}"])


@pytest.mark.parametrize("value", ["1,2,3", "0,5", "10,100", "0.1,0.01", "1,1e-2", "0,0.5"])
def test_a_sweep_is_no_decimal_comma(value):
    assert read_arguments([f"model.learning_rate={value}"]) == {"": [f"model.learning_rate={value}"]}


def test_files_of_ones_own_bring_keys_of_their_own(own):
    typed = [own, "experiment=mine", "rate=0.1", "+wide=3", "seed=1,2"]
    assert read_arguments(typed) == {"": ["+experiment=mine", "rate=0.1", "+wide=3", "seed=1,2", own]}
    # Nobody can import the class here.
    assert read_arguments([own, "model=own", "model.widths=[3]", "model.new=2"])
    with pytest.raises(ValueError, match=r"^rate is not known"):
        read_arguments([own, "rate=0.1"])
    # There the experiment is among the defaults.
    assert read_arguments([own, "--config-name=start", "+experiment=relu"])[""][0] == "experiment=relu"


def test_each_of_several_experiments_has_a_command_and_a_directory_of_its_own():
    commands = read_arguments(["experiment=tanh,relu", "output_dir=a b", "seed=1,2", "-m"])
    assert commands == {
        name: [f"+experiment={name}", f"output_dir='a b/{name}'", "seed=1,2", "-m"] for name in ("tanh", "relu")
    }
    assert list(read_arguments(["experiment=glob(tanh*)"])) == ["tanh", "tanh_full_batch"]
    with pytest.raises(ValueError, match=r"^experiment=tanh,tanh would train the same run twice"):
        read_arguments(["experiment=tanh,tanh"])
    # Before the first trains.
    with pytest.raises(ValueError, match=r"^model\.depth=0 is not possible"):
        read_arguments(["experiment=tanh,relu", "model.depth=0"])
    with pytest.raises(ValueError, match=r"^data\.num_points is not known"):
        read_arguments(["experiment=tanh,mnist_elu", "data.num_points=100"])
