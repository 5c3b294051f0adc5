"""Training beside PyTorch: the same model from the same weights on the same batches has the same losses."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


@pytest.fixture
def training(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield __import__("benchmarks.training", fromlist=["training"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["encoder-decoder", "recurrent memory"])
def test_losses_of_200_steps_are_pytorchs(training, kind):
    """To 1e-4 of each: forward, backward, AdamW, and the gradient through four segments and their memory."""
    import torch

    row = {
        "encoder-decoder": training.encoder_decoder(32, 2, 4, 64, 50, 4, 9, 0.0),
        "recurrent memory": training.recurrent(32, 2, 4, 64, 50, 4, 4, 6, 3),
    }[kind]
    ours, theirs = training.make_step(row), training.torch_step(torch, row)
    batches = [training.make_batch(row, seed) for seed in range(200)]
    losses = np.array([[step(*batch) for batch in batches] for step in (ours, theirs)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0, -20:].mean() < losses[0, 0]


@pytest.mark.long
def test_a_character_model_reaches_pytorchs_loss_on_real_text(training):
    """After the 2,000 steps of benchmarks/benchmarks/characters.py, on text that neither has seen. The first losses are the
    same; later ones drift apart by rounding alone."""
    characters = __import__("benchmarks.characters", fromlist=["characters"])
    ours, theirs = characters.losses("mini_tfm"), characters.losses("torch")
    np.testing.assert_allclose(ours[0][:100], theirs[0][:100], rtol=1e-3)
    assert ours[0][-100:].mean() < 0.35 * ours[0][0]
    assert ours[1] < 1.02 * theirs[1]
