"""The command line as it is typed, read before Hydra does: what means nothing is refused."""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from bnlightning._conf import CONF_DIR
from bnlightning.experiments import faults
from bnlightning.experiments.checks import check_runs
from bnlightning.experiments.spelling import is_known, keys_of, may_be_added, near, what_fits

CONFIG_NAME = "train"
_EXPERIMENT = "experiment"
_GROUPS = (_EXPERIMENT, "model", "data", "trainer", "callbacks")
# Of the command as a whole: one value each.
_OF_THE_COMMAND = ("output_dir", "resume", "n_jobs")
_SINGLE = (*_OF_THE_COMMAND, "seed", "num_threads", "ckpt_path", "trust_ckpt")
# What Hydra does with them this command does by itself, or cannot do without.
_HYDRAS = {
    "hydra.run.dir": "give output_dir=PATH",
    "hydra.sweep.dir": "give output_dir=PATH",
    "hydra.sweep.subdir": "a run's directory is named by what is swept",
    "hydra.output_subdir": "resume=true reads the configuration of each run in .hydra",
    "hydra.job.name": "nothing is named by it; give output_dir=PATH",
    "hydra.job.chdir": "paths are those of the directory in which the command is given",
}


def read_arguments(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The arguments for Hydra, for each of several experiments; under the empty name those of the only command.

    Args:
        arguments: What is typed behind ``python -m bnlightning.train``.

    Raises:
        ValueError: If something of it means nothing, or asks for what is not possible.
    """
    options, words = _split(arguments)
    asked = get_args_parser().parse_args(options)
    if asked.help or asked.hydra_help or asked.shell_completion:
        return {"": list(arguments)}
    _check_options(asked)
    with _configuration(asked) as (application, name):
        typed = _Typed(application, name, words)
        experiments = typed.experiments()
        commands = {key: typed.command(key) for key in experiments or [""]}
        if asked.cfg is not None or asked.info is not None:
            _check_single(commands)
        elif len(commands) > 1:
            for overrides in commands.values():
                check_runs(application.compose_config(name, overrides, RunMode.MULTIRUN, with_log_configuration=False))
    # Behind: `--info` would take the first of the others for its own.
    return {key: [*overrides, *options] for key, overrides in commands.items()}


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's own options with their values, and everything else."""
    # No abbreviations: `--experiment` would be `--experimental-rerun`.
    known = {option: action for action in get_args_parser()._actions for option in action.option_strings}
    options, words = [], []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        option, _, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif option not in known:
            following = rest[0] if rest and not rest[0].startswith("-") and "=" not in rest[0] else ""
            words.append(f"{word} {following}".strip())
        else:
            options.append(word)
            action = known[option]
            takes = action.nargs is None and not value
            if rest and (takes or (action.nargs == "?" and rest[0] in (action.choices or ()))):
                options.append(rest.pop(0))
    return options, words


def _check_options(asked: argparse.Namespace) -> None:
    if asked.experimental_rerun is not None:
        raise ValueError(faults.RERUN)
    if asked.config_path is not None:
        raise ValueError(faults.CONFIG_PATH)
    shown = {"--cfg": asked.cfg, "--info": asked.info, "--run": asked.run, "--multirun": asked.multirun}
    given = [option for option, value in shown.items() if value]
    if len(given) > 1:
        raise ValueError(faults.options_exclude_each_other(given))
    if asked.resolve and asked.cfg is None:
        raise ValueError(faults.RESOLVE_WITHOUT_CFG)


def _check_single(commands: dict[str, list[str]]) -> None:
    """One configuration is shown, of no sweep."""
    for overrides in commands.values():
        for override in OverridesParser.create().parse_overrides(overrides):
            if override.is_sweep_override():
                raise ValueError(faults.shows_one_configuration(_line(override)))


@contextmanager
def _configuration(asked: argparse.Namespace) -> Iterator[tuple[Hydra, str]]:
    """Hydra as its own main function makes it, to compose with."""
    hydra.version.setbase("1.3")
    search_path = create_automatic_config_search_path(None, None, str(CONF_DIR))
    if asked.config_dir is not None:
        directory = Path(asked.config_dir).resolve()
        if not directory.is_dir():
            raise ValueError(faults.config_dir_is_missing(asked.config_dir))
        search_path.prepend("command-line", f"file://{directory}")
    application = Hydra.create_main_hydra2(CONFIG_NAME, search_path)
    try:
        name = asked.config_name or CONFIG_NAME
        names = [each for each in application.config_loader.get_group_options("") if not each.startswith("_")]
        if name.removesuffix(".yaml") not in names and "/" not in name:
            raise ValueError(faults.unknown(f"--config-name={name}", near(name, names), names))
        yield application, name
    finally:
        GlobalHydra.instance().clear()


class _Typed:
    """The words of one command line, and the configuration that they are about.

    Args:
        application: Hydra.
        name: The name of the primary configuration.
        words: Everything but Hydra's own options.
    """

    def __init__(self, application: Hydra, name: str, words: Sequence[str]) -> None:
        self._application = application
        self._loader = application.config_loader
        self._name = name
        self._parser = OverridesParser.create(config_loader=self._loader)
        primary = self._compose([])
        self._defaults = primary["hydra"]["runtime"]["choices"]
        for index, word in enumerate(words):
            if not re.match(r"(~|\+{0,2}[^\s=-][^\s=]*=)", word):
                self._refuse_word(words, index, primary)
        self._overrides = [self._parse(word) for word in words]
        for override in self._overrides:
            self._check_group(override, primary)
        self._check_given_once()

    def experiments(self) -> list[str]:
        """The experiments, if there are several."""
        for override in self._overrides:
            if override.key_or_group == _EXPERIMENT and override.is_sweep_override():
                names = list(override.sweep_string_iterator())
                if len(set(names)) < len(names):
                    raise ValueError(faults.same_run_twice(_line(override)))
                return names
        return []

    def command(self, experiment: str) -> list[str]:
        """The overrides of the command, or of one of several experiments."""
        overrides = [self._for_experiment(override, experiment) for override in self._overrides]
        contents = self._variants(overrides)
        lines = []
        for override in overrides:
            key = override.key_or_group
            if self._options(key):
                sign = "~" if override.is_delete() else "" if key in self._defaults else "+"
                lines.append(sign + _line(override).lstrip("+~"))
            else:
                lines.append(self._checked(override, contents))
        return lines

    def _compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        config = self._application.compose_config(
            self._name, [*overrides], RunMode.RUN, with_log_configuration=False, validate_sweep_overrides=False
        )
        contents: Any = OmegaConf.to_container(config, resolve=False)
        return dict(contents)

    def _options(self, group: str) -> list[str]:
        return list(self._loader.get_group_options(group)) if re.fullmatch(r"[\w/]+", group) else []

    def _parse(self, word: str) -> Override:
        try:
            return self._parsed(word)
        except HydraException as error:
            # A path with a letter or a sign that means something in Hydra's grammar, or none.
            key, _, value = word.partition("=")
            if value and not re.search(r"[\[\]{}()'\"$\\,]", value):
                return self._parsed(f"{key}={_quoted(value)}")
            raise ValueError(faults.cannot_be_read(word, str(error))) from error

    def _parsed(self, word: str) -> Override:
        # Not by `parse_override`, whose globs know no options.
        return self._parser.parse_overrides([word])[0]

    def _refuse_word(self, words: Sequence[str], index: int, contents: dict[str, Any]) -> None:
        """Say how a word that is no `key=value` is spelt."""
        typed = " ".join(words[index:])
        if index and words[index - 1].endswith("="):
            typed = words[index - 1] + typed
        parts = [part for part in re.split(r"[\s=:]+", typed.lstrip("-+~").strip(" =")) if part]
        word, value = (*parts, "", "")[:2]
        if not value and self._options(word):
            raise ValueError(faults.unknown(f"{word}=", (), self._options(word)))
        known = self._known(word, [contents])
        # `learning_rate` is an experiment, `learning_rate=0.1` is none.
        is_key = _has_value(words, index) and word in {key.rpartition(".")[2] for key in known}
        for group in _GROUPS:
            if word in self._options(group) and not is_key:
                raise ValueError(faults.misspelt(words[index], f"{group}={word}"))
        found = [word] if word in known else near(word, known)
        if not found or not (value or words[index].startswith("-") or word in known):
            group, _, option = word.replace("/", ".").rpartition(".")
            experiments = near(option, self._options(group or _EXPERIMENT))
            raise ValueError(faults.misspelt(words[index], *(f"{group or _EXPERIMENT}={name}" for name in experiments)))
        raise ValueError(faults.misspelt(words[index], *(f"{key}={value or 'VALUE'}" for key in found)))

    def _check_group(self, override: Override, contents: dict[str, Any]) -> None:
        """Refuse what is no option of a group."""
        group = override.key_or_group
        options = self._options(group)
        if not options:
            return
        if override.is_delete():
            if group in _GROUPS[1:]:
                raise ValueError(faults.cannot_be_left_out(_line(override)))
            return
        value = override.value()
        if isinstance(value, list):
            raise ValueError(faults.is_a_list(group, value))
        for name in override.sweep_string_iterator() if override.is_sweep_override() else [value]:
            if not self._is_option(group, name):
                raise ValueError(faults.unknown(faults.assigned(group, name), near(str(name), options), options))

    def _check_given_once(self) -> None:
        """Refuse a group that several words choose from."""
        chosen: dict[str, list[str]] = {}
        for override in self._overrides:
            if not self._options(override.key_or_group) or override.is_delete():
                continue
            key = override.get_key_element().lstrip("+")
            names = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(override.value())]
            if key in chosen:
                raise ValueError(faults.given_twice(key, list(dict.fromkeys(chosen[key] + names))))
            chosen[key] = names

    def _is_option(self, group: str, name: Any) -> bool:
        if not isinstance(name, str):
            return str(name) in self._options(group)
        below, _, last = f"{group}/{name}".rpartition("/")
        return "${" in name or last.removesuffix(".yaml") in self._options(below)

    def _for_experiment(self, override: Override, experiment: str) -> Override:
        """The same for one of several experiments: what is written goes into a directory of its own."""
        if experiment and override.key_or_group == _EXPERIMENT:
            return self._parse(f"{override.get_key_element()}={experiment}")
        if experiment and override.key_or_group == "output_dir" and isinstance(override.value(), str | int | float):
            return self._parse(f"output_dir={_quoted(f'{override.value()}/{experiment}')}")
        return override

    def _variants(self, overrides: Sequence[Override]) -> list[dict[str, Any]]:
        """The configuration for each choice of groups and classes: which other keys there are depends on these."""
        choices = []
        for override in overrides:
            key = override.key_or_group
            if (self._options(key) or key.endswith("._target_")) and not override.is_delete():
                sign = "++" if "." in key else "" if key in self._defaults else "+"
                values = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
                choices.append([f"{sign}{key}={v}" for v in values or [override.get_value_element_as_str()]])
        return [self._compose(chosen) for chosen in product(*choices)]

    def _checked(self, override: Override, variants: Sequence[dict[str, Any]]) -> str:
        """An override of a key as Hydra takes it, after what is wrong with it was refused."""
        key, line = override.key_or_group, _line(override)
        if key in _HYDRAS:
            raise ValueError(faults.hydras_own(line, _HYDRAS[key]))
        asked = override.is_add() or override.is_force_add()
        is_there = any(is_known(key, contents) for contents in variants)
        if not is_there and not any(may_be_added(key, contents, asked=asked) for contents in variants):
            raise ValueError(faults.unknown(key, near(key, self._known(key, variants))))
        if override.is_delete():
            if key in _SINGLE:
                raise ValueError(faults.cannot_be_left_out(line))
            return line
        self._check_values(override, variants)
        if override.is_force_add():
            return line
        return ("" if is_there else "+") + line.removeprefix("+")

    def _known(self, word: str, variants: Sequence[dict[str, Any]]) -> list[str]:
        """The groups and keys that a word may mean; Hydra's own only where it begins like one."""
        known = [*self._loader.list_groups(""), *(key for contents in variants for key in keys_of(contents))]
        return known if word.startswith("hydra") else [key for key in known if not key.startswith("hydra")]

    def _check_values(self, override: Override, variants: Sequence[dict[str, Any]]) -> None:
        key = override.key_or_group
        if override.is_sweep_override():
            if key in _OF_THE_COMMAND:
                raise ValueError(faults.of_the_command(_line(override), key))
            values: list[Any] = list(override.sweep_iterator()) if override.is_choice_sweep() else []
        else:
            values = [override.value()]
        for first, second in pairwise(values):
            if _is_decimal_comma(first, second):
                raise ValueError(faults.decimal_comma(_line(override), str(first), second))
        for value in map(_plain, values):
            if key in _SINGLE and isinstance(value, list | dict):
                raise ValueError(faults.is_a_list(key, value))
            # Of several classes one may take it.
            wanted = [what_fits(key, contents, value) for contents in variants]
            if all(wanted):
                raise ValueError(
                    faults.is_a_list(key, value)
                    if isinstance(value, list)
                    else faults.does_not_fit(key, value, wanted[0])
                )


def _has_value(words: Sequence[str], index: int) -> bool:
    """Whether a word has a value in it, behind it or, as one, behind the key before it."""
    if re.search(r"[\s=:]\S", words[index].lstrip("-+~")) or (index and words[index - 1].endswith("=")):
        return True
    return index + 1 < len(words) and not re.match(r"[^=]+=|-", words[index + 1])


def _line(override: Override) -> str:
    return override.input_line or ""


def _is_decimal_comma(first: Any, second: Any) -> bool:
    """Whether two values of a sweep are one number: no integer begins with a zero, the decimals of many do."""
    # What is quoted is a text, a truth value is no number.
    is_padded = isinstance(second, str) and re.fullmatch(r"0\d+(e[+-]?\d+)?", second, re.IGNORECASE) is not None
    return is_padded and isinstance(first, int) and not isinstance(first, bool)


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _plain(value: Any) -> Any:
    """What Hydra makes of a value: a quoted text is a text."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value
