import sys

import pytest
import torch
from helpers import quiet_trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from bnlightning import TrainingProgressBar

pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")]


def shown(monkeypatch, capsys, is_terminal):
    """What a fit with two evaluations prints."""
    torch.manual_seed(0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    trainer = quiet_trainer(
        callbacks=[TrainingProgressBar(refresh_rate=1)],
        enable_progress_bar=True,
        max_epochs=2,
        limit_train_batches=4,
        limit_val_batches=2,
    )
    trainer.fit(BoringModel())
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_a_terminal_shows_the_training_and_no_evaluation(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, True)
    assert "Epoch 1: 100%" in text and "4/4" in text
    assert "Validation" not in text


def test_a_file_shows_no_bar(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, False)
    assert "Epoch" not in text and "it/s" not in text
