"""Published families beside Transformers itself, where it is installed (extra `peers`): it reads what we save, and we what it saves."""

import numpy as np
import pytest
from published import VARIANTS, outputs, relative_error

import mini_tfm as mt

pytestmark = pytest.mark.filterwarnings("ignore")  # Transformers' and PyTorch's own


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    import peer_models

    return peer_models


@pytest.mark.parametrize("variant", VARIANTS)
def test_either_reads_what_the_other_saves(peers, variant, tmp_path):
    theirs = peers.make(variant, tmp_path / "theirs")
    expected = peers.outputs(variant, theirs)
    model = mt.load(tmp_path / "theirs")
    found = outputs(model, peers.N_NEW)
    assert found.keys() == expected.keys()
    for name in found.keys() - {"greedy"}:
        assert relative_error(found[name], expected[name]) < 1e-5, name
    np.testing.assert_array_equal(found.get("greedy", 0), expected.get("greedy", 0))

    model.save_hugging_face(tmp_path / "ours")
    again = peers.outputs(variant, peers.read(variant, tmp_path / "ours"))
    for name in expected:  # the same numbers; but gemma's norms went through w + 1, and some scales through a root
        if name == "greedy":
            np.testing.assert_array_equal(again[name], expected[name])
        else:
            assert relative_error(again[name], expected[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["t5-v1.1", "bart", "roberta", "gpt2", "llama-llama3"])
def test_what_transformers_saves_in_halves_and_shards(peers, variant, dtype, tmp_path):
    """Computed in float32 by both, from the rounded weights."""
    import torch

    theirs = peers.make(variant, tmp_path / "whole").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "halves", max_shard_size="20KB")
    assert (tmp_path / "halves" / "model.safetensors.index.json").exists()
    expected = peers.outputs(variant, peers.read(variant, tmp_path / "halves", dtype=torch.float32))
    found = outputs(mt.load(tmp_path / "halves"), peers.N_NEW)
    for name in found.keys() - {"greedy"}:
        assert relative_error(found[name], expected[name]) < 1e-5, name
    np.testing.assert_array_equal(found.get("greedy", 0), expected.get("greedy", 0))
