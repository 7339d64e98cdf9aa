"""The site: it builds without a warning, has every public name and every tag, and its examples run."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from helpers import python_blocks, quiet_trainer, read_events, run_example
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnlightning
from bnlightning import ActivationMonitor, BatchNorm1d, BatchNormMonitor, GradientMonitor

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
IN_README = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
# A page's examples that README has are run there.
EXAMPLES = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in PAGES.items()
    for number, code in enumerate(python_blocks(text))
    if code not in IN_README
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, its notebook not run: tests/test_notebooks.py runs it, and CI's build of the site."""
    missing = [name for name in ("mkdocs", "mkdocstrings", "mkdocs_jupyter", "latex2mathml") if not _is_installed(name)]
    if missing and "CI" not in os.environ:
        pytest.skip(f'{", ".join(missing)} not installed: pip install -e ".[docs]"')
    directory = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
        cwd=ROOT,
        env={**os.environ, "BNLIGHTNING_DOCS_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout
    return directory


def _is_installed(name):
    return importlib.util.find_spec(name) is not None


def test_every_page_is_built_and_can_be_found(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    notebooks = [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")]
    for name in [*PAGES, *notebooks]:
        if name != "index":
            assert (site / name / "index.html").is_file()
            assert f'href="{name}/"' in home, f"{name} is not in mkdocs.yml's nav"


def test_nothing_comes_from_elsewhere(site):
    # What a browser fetches by itself; a link that a reader clicks may lead anywhere.
    fetched = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
    found = {url for page in site.rglob("*.html") for url in fetched.findall(page.read_text(encoding="utf-8"))}
    # Of a link element, the page's own address does not load anything.
    assert {url for url in found if not url.startswith("https://bnlightning.github.io/bnlightning")} == set()


def test_the_api_has_every_public_name(site):
    api = "".join(path.read_text(encoding="utf-8") for path in (site / "api").rglob("*.html"))
    identifiers = set(re.findall(r'id="(bnlightning\.[\w.]+)"', api))

    def places(name):
        thing = getattr(bnlightning, name)
        return {f"bnlightning.{name}", f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"}

    missing = [name for name in bnlightning.__all__ if not places(name) & identifiers]
    assert missing == [], "add them to the page of their room in docs/api"


def test_docstrings_are_shown_as_markdown(site):
    api = "".join(path.read_text(encoding="utf-8") for path in (site / "api").rglob("*.html"))
    assert re.findall(r":(?:func|class|meth|attr|data|mod|math):|\.\. math::", api) == []
    assert "<math" in api


class Everything(lightning.LightningModule):
    """What brings out every tag: batch norm, bounded and unbounded activations, an evaluation, at last a NaN."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.global_step >= 3:
            x = x * float("nan")
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def tags(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tags")
    callbacks = [
        ActivationMonitor(1, output_gradients=True, effective_rank=True),
        GradientMonitor(1),
        BatchNormMonitor(1),
    ]
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=10)
    trainer = quiet_trainer(directory, max_epochs=2, callbacks=callbacks)
    with pytest.warns(UserWarning):
        trainer.fit(Everything(), loader, loader)
    return {tag for kind in read_events(directory).Tags().values() if isinstance(kind, list) for tag in kind}


def test_the_page_of_the_monitors_has_every_tag(tags):
    def name(tag):
        # What a tag is called on the page: of an evaluation as in training, of a layer or parameter without its path.
        group = tag.partition("/")[0]
        if group in ("health", "train", "val"):
            return tag.removesuffix("/text_summary").replace("/val_", "/")
        return re.sub(r"_(val|test)_", "_", group)

    named = set(re.findall(r"`([\w/]+)`", PAGES["monitors"]))
    own = {tag for tag in tags if not re.fullmatch(r"epoch|hp_metric|_hparams_.*|custom_scalars__.*", tag)}
    assert len(own) > 100
    assert sorted({name(tag) for tag in own} - named) == []


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run_as_they_stand(code, tmp_path):
    run_example(code, tmp_path)


def test_experiments_that_are_named_exist():
    known = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    for page, text in PAGES.items():
        # A recipe may write a file of its own.
        written = set(re.findall(r"Write `conf/experiment/(\w+)\.yaml`", text))
        assert set(re.findall(r"\+experiment=(\w+)", text)) - written <= known, page
