"""Adapters beside PEFT itself, where it is installed: it reads what we save, and we what it saves."""

import numpy as np
import pytest
from adapters import ADAPTED
from published import VARIANTS, outputs, relative_error

import mini_tfm as mt

pytestmark = pytest.mark.filterwarnings("ignore")  # Transformers' and PyTorch's own


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    transformers.utils.logging.disable_progress_bar()
    import peer_adapters

    return peer_adapters


@pytest.mark.parametrize(
    "variant", [*ADAPTED, "mbart", "pegasus", "m2m100", "roberta", "distilbert", "mt5", "qwen3", "mistral", "gemma2", "gpt2"]
)
def test_either_reads_what_the_other_saves(peers, variant, tmp_path, monkeypatch):
    monkeypatch.setitem(ADAPTED, variant, ADAPTED.get(variant, {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}))
    expected = peers.outputs(variant, peers.make(variant, tmp_path))
    model = mt.load(tmp_path / "model")
    model.load_lora(tmp_path / "adapter")
    n_new = len(expected.get("greedy", ()))
    for ours in (model, merged(tmp_path, "model", "adapter")):
        found = outputs(ours, n_new)
        for name in found.keys() - {"greedy"}:
            assert relative_error(found[name], expected[name]) < 1e-5, name
        np.testing.assert_array_equal(found.get("greedy", 0), expected.get("greedy", 0))
    model.save_lora(tmp_path / "ours")
    again = peers.outputs(variant, peers.read(variant, tmp_path / "model", tmp_path / "ours"))
    for name in expected:
        np.testing.assert_array_equal(again[name], expected[name])


def merged(path, model, adapter):
    ours = mt.load(path / model)
    ours.load_lora(path / adapter)
    ours.merge_lora()
    return ours


@pytest.mark.parametrize("variant", [*(name for name in ADAPTED if VARIANTS[name][1] != "encoder"), "gpt2"])
def test_what_we_have_trained_peft_reads(peers, variant, tmp_path, monkeypatch):
    """New adapters of ours, trained by us, saved, read by PEFT: our outputs."""
    from adapters import trained

    monkeypatch.setitem(ADAPTED, variant, ADAPTED.get(variant, {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}))
    peers.make(variant, tmp_path)
    model = mt.load(tmp_path / "model")
    model.add_lora(3, 5, "all-linear")
    trained(model)
    model.save_lora(tmp_path / "ours")
    found = outputs(model, 12)
    expected = peers.outputs(variant, peers.read(variant, tmp_path / "model", tmp_path / "ours"))
    for name in found.keys() - {"greedy"}:
        assert relative_error(found[name], expected[name]) < 1e-5, name
    np.testing.assert_array_equal(found["greedy"], expected["greedy"])
