"""What a GGUF file says beside its weights: several ends of an answer, frequencies of its own."""

import broken_models
import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.config import RotaryScaling
from mini_tfm.errors import InvalidValue
from mini_tfm.positions import rotary_frequencies


def loaded(tmp_path, *changes, **more):
    (tmp_path / "model.gguf").write_bytes(broken_models.gguf(*changes, **more))
    return mt.load(tmp_path / "model.gguf")


def test_an_answer_may_end_in_several_ways(tmp_path):
    assert loaded(tmp_path).generation == {}
    ends = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 5}
    model = loaded(tmp_path, ends)
    assert model.generation == {"eos_token_id": [5, 7]} and model.config.eos_id == 5
    free = model.generate([[1, 2, 3]], max_new_tokens=40, stop_at_eos=False)[0]
    made = model.generate([[1, 2, 3]], max_new_tokens=40, eos_token_id=[free[4]])[0]
    assert made == free[: free.index(free[4])]
    model.generation = {"eos_token_id": [free[4]]}
    assert model.generate([[1, 2, 3]], max_new_tokens=40, eos_token_id=None)[0] == made  # None is what the command line has
    assert model.generate([[1, 2, 3]], max_new_tokens=40, stop_at_eos=False)[0] == free
    assert loaded(tmp_path, {**ends, "tokenizer.ggml.eot_token_id": 10**6}).generation == {}  # it is no token


@pytest.mark.parametrize("change", [0.0, 0.01])
def test_the_factors_of_llama_3_are_its_scaling(tmp_path, monkeypatch, change):
    scaling = RotaryScaling(kind="llama3", factor=32.0, original_positions=8192)
    config = mt.Config(vocab_size=59, d_model=8, n_heads=2, d_head=4, positions="rotary", rotary_base=5e9)
    factors = rotary_frequencies(config) / rotary_frequencies(config.replace(rotary_scaling=scaling)) + [0, change]
    made = broken_models.tensor
    monkeypatch.setattr(
        broken_models, "tensor", lambda name, shape: factors.astype(np.float32) if name == "rope_freqs.weight" else made(name, shape)
    )
    changes = {"llama.rope.freq_base": 5e9}, {"rope_freqs.weight": (2,)}
    if change:
        monkeypatch.setattr(
            broken_models, "tensor", lambda name, shape: np.full(2, 1.7, np.float32) if "freqs" in name else made(name, shape)
        )
        with pytest.raises(InvalidValue, match=r"'rope_freqs.weight': expected the factors of Llama 3's .*, got 2 from 1.7 to 1.7"):
            loaded(tmp_path, *changes)
        return
    assert loaded(tmp_path, *changes).config.rotary_scaling == scaling
