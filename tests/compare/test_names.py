import ast
import sys
from pathlib import Path

import pytest

from bnlightning.compare import names
from bnlightning.compare.names import (
    KINDS,
    NORMS,
    RunName,
    Tag,
    health_tag,
    parse_run_directory,
    parse_tag,
    published_tag,
    run_directory,
    sort_key,
    title_of,
    written,
)
from bnlightning.nn import NORM_LAYERS


@pytest.mark.parametrize("phase", ["train", "val", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tag_that_was_composed_is_taken_apart(kind, phase):
    tag = Tag(kind, "first_nonfinite", "net.0/weight#2", phase)
    assert parse_tag(str(tag)) == tag


@pytest.mark.parametrize(
    ("tag", "parts"),
    [
        ("layer_dead/net.act1", ("layer", "dead", "net.act1", "train")),
        ("layer_val_dead/net.act1#2", ("layer", "dead", "net.act1#2", "val")),
        ("param_grad_norm/net.0.weight", ("param", "grad_norm", "net.0.weight", "train")),
        ("norm_test_mean_drift/net.norm", ("norm", "mean_drift", "net.norm", "test")),
    ],
)
def test_tags_have_parts(tag, parts):
    assert parse_tag(tag) == Tag(*parts)


@pytest.mark.parametrize("tag", ["val/loss", "health/dead", "layer_dead", "layers/x", "player_dead/x", "published/acc"])
def test_other_tags_have_none(tag):
    assert parse_tag(tag) is None


def test_numbers_for_the_whole_network_and_published_ones():
    assert [health_tag("dead"), health_tag("dead", "test")] == ["health/dead", "health/test_dead"]
    assert published_tag("val/acc") == "published/val/acc"


# What a user of the command reads on disk, by what it was made of.
DIRECTORIES = {
    "custom": ("custom", {}, None),
    "custom_seed-2": ("custom", {}, 2),
    "none_depth-10_learning_rate-0.1": ("none", {"depth": "10", "learning_rate": "0.1"}, None),
    "torch_learning_rate-1e-05_seed-3": ("torch", {"learning_rate": "1e-05"}, 3),
    "run_model.depth-2_data.depth-3": ("run", {"model.depth": "2", "data.depth": "3"}, None),
    "custom_offset--0.5_job-12": ("custom", {"offset": "-0.5", "job": "12"}, None),
    "custom_norm_placement-conv_after": ("custom", {"norm_placement": "conv_after"}, None),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directorys_name_is_composed_and_taken_apart(name):
    variant, settings, seed = DIRECTORIES[name]
    swept = settings | ({} if seed is None else {"seed": seed})
    assert run_directory(variant, swept) == name
    assert parse_run_directory(name) == RunName(variant, settings, seed)
    assert parse_run_directory(name).without_seed == run_directory(variant, settings)


def test_the_seed_may_stand_anywhere():
    assert parse_run_directory("none_seed-1_depth-3") == RunName("none", {"depth": "3"}, 1)
    assert parse_run_directory("custom/seed-1") == RunName("custom", {}, 1)
    assert parse_run_directory("seed-1/custom") == RunName("custom", {}, 1)
    assert parse_run_directory("seed-3") == RunName("seed-3", {}, 3)


def test_a_known_value_ends_where_it_does():
    name = "custom_activation-leaky_relu_batch_size-10"
    assert parse_run_directory(name, {"activation": "leaky_relu"}).settings == {
        "activation": "leaky_relu",
        "batch_size": "10",
    }
    # Another value of this name, such as the data's.
    assert parse_run_directory("custom_depth-10", {"depth": 1}).settings == {"depth": "10"}


@pytest.mark.parametrize(
    "name", ["version_0", "resnet-50", "2026-01-31_10-00-00", "custom_deep", "custom_x-1_x-2", "-"]
)
def test_other_directories_stay_as_they_are(name):
    parsed = parse_run_directory(f"above/{name}_seed-2")
    assert (parsed.variant, parsed.settings, parsed.seed, parsed.folder) == (name, {}, 2, "above")
    assert parsed.in_words == parsed.without_seed == f"above/{name}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "no norm"),
        ("custom_seed-2", "batch norm (ours)"),
        ("torch_depth-10_learning_rate-0.1", "batch norm (torch), depth 10, learning rate 0.1"),
        ("run", "run"),
        ("run_convention-keras", "convention keras"),
        ("sweep/1/none_depth-2", "sweep/1/no norm, depth 2"),
    ],
)
def test_people_read_words(name, words):
    assert parse_run_directory(name).in_words == words


def test_every_normalisation_has_words():
    assert [*NORMS] == [*NORM_LAYERS]
    assert len({*NORMS.values()}) == len(NORMS)


def test_variants_without_normalisation_come_first_and_numbers_rise():
    variants = ["custom_rate-10", "torch", "custom_rate-2", "none_rate-1", "custom_rate-1e-05", "custom_rate-0.001"]
    assert sorted(variants, key=sort_key) == [
        "none_rate-1", "custom_rate-1e-05", "custom_rate-0.001", "custom_rate-2", "custom_rate-10", "torch"
    ]  # fmt: skip


def test_an_experiment_is_above_the_time():
    assert title_of("2026-01-31_10-00-00", "tanh") == title_of("tanh", "outputs") == "tanh"


def test_it_imports_the_standard_library_alone():
    """So that every room can import it without a cycle."""
    imported = [node for node in ast.walk(ast.parse(Path(names.__file__).read_text())) if hasattr(node, "names")]
    modules = [getattr(node, "module", None) or node.names[0].name for node in imported]
    assert "re" in modules and {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "path", ["layer{i}", "100%", "a b", "a/b", "$x_$", "a\nb", "ünï", "%s", "a%2", "\\frac{", "..", "*"]
)
def test_a_path_of_any_characters_is_found_in_its_tag(path):
    assert written(path) == path
    assert parse_tag(str(Tag("layer", "dead", path, "val"))).path == path


def test_paths_that_look_like_calls_and_outputs_are_told_apart():
    paths = ["a", "a#1", "a%231", "a:0", "a%3A0", "a%25", "a%2525", "#", ":", ""]
    labels = {label for path in paths for label in (written(path), written(path) + "#1", written(path) + ":0")}
    assert len(labels) == 3 * len(paths)
    assert all(parse_tag(str(Tag("layer", "dead", label))).path == label for label in labels)


def test_a_run_is_called_by_its_variant_and_its_seed():
    assert parse_run_directory("custom_depth-2_seed-3").in_words_with_seed == "batch norm (ours), depth 2, seed 3"
    assert parse_run_directory("none").in_words_with_seed == "no norm"
