"""Models whose matrices are kept in bfloat16 or int8: `Transformer.pack`, `mt.load(folder, dtype=...)`."""

import numpy as np
import pytest
import variants
from variants import VARIANTS

import mini_tfm as mt
from mini_tfm.errors import InvalidValue
from mini_tfm.model import PACKED
from mini_tfm.stream import Stream
from mini_tfm.weights import Weight

RNG = np.random.default_rng(7)
SOURCE, TARGET = RNG.integers(3, 13, (3, 9)), RNG.integers(3, 13, (3, 8))
LENGTHS = np.array([9, 5, 7])


def tiny_model(variant, **options):
    return variants.tiny_model(variant, **{"dtype": np.float32} | options)


def packed(variant, dtype, seed=1):
    model = tiny_model(variant, seed=seed)
    model.pack(dtype)
    return model


def scores(model):
    if not model.config.has_decoder:
        return model.encode(SOURCE, LENGTHS)
    return model.logits(SOURCE if model.config.has_encoder else None, TARGET, *([LENGTHS] if model.config.has_encoder else []))


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_model_computes_what_its_rounded_weights_say(variant, dtype):
    model = packed(variant, dtype)
    found, exact = scores(model), scores(tiny_model(variant, seed=1))
    np.testing.assert_allclose(found, exact, rtol=0, atol={"bfloat16": 0.03, "int8": 0.06}[dtype] * np.abs(exact).max())
    assert not np.array_equal(found, exact)  # it is not the float32 model that answers


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("variant", ["pre norm", "relative", "rotary", "decoder only", "ssru", "decoder only, llama", "marian"])
def test_a_step_of_a_packed_model_gives_its_scores(variant, dtype):
    """Rows are quantised one by one: those of a step are as those of a whole text."""
    from mini_tfm.generate import Session

    model = packed(variant, dtype)
    stream = Stream(model, None, 3)
    stream.open(SOURCE if model.config.has_encoder else None, np.full(3, 9))
    inputs, session = stream.shifted(TARGET), Session(stream)
    steps = np.stack([session.scores(session.step(inputs[:, i : i + 1])) for i in range(8)], axis=1)
    whole = model.logits(*((SOURCE, TARGET) if model.config.has_encoder else (None, TARGET)))
    np.testing.assert_allclose(steps, whole, rtol=0, atol=2e-2 * np.abs(whole).max())  # a value next to a half may fall either way


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("memory", ["window:size=9,sinks=2", "recurrent:tokens=2", "store:top_k=3,site=decoder"])
def test_a_packed_model_reads_and_answers_with_a_memory(memory, dtype):
    found = []
    for pack in (False, True):
        model = tiny_model("decoder only", seed=2)
        made = mt.memory(memory)
        model.add_memory_weights(made, 1)
        if pack:
            model.pack(dtype)
        stream = Stream(model, made, 3)
        for t in range(2):
            stream.read(SOURCE[:, 4 * t : 4 * t + 4], np.full(3, 4))
        stream.open(None, np.full(3, 8))
        found.append(stream.logits(stream.decode(TARGET, np.full(3, 8))))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=0.06 * np.abs(found[0]).max())


def test_what_a_packed_weight_is_to_others():
    model, plain = packed("pre norm", "int8"), tiny_model("pre norm", seed=1)
    assert model.precision == "int8" and plain.precision is None
    assert model.n_parameters == plain.n_parameters
    for name, value in plain.weights.items():
        kept = Weight(model.weights[name])
        assert kept.shape == value.shape
        np.testing.assert_allclose(kept.array, value, rtol=0, atol=np.abs(value).max() / 127)
    large = mt.Transformer(mt.Config(vocab_size=256, d_model=64, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=128))
    before = large.nbytes
    large.pack("int8")
    assert large.nbytes < 0.5 * before


def test_a_packed_model_is_saved_as_the_values_that_it_has(tmp_path):
    model = packed("pre norm", "int8")
    model.save(tmp_path / "model")
    again = mt.load(tmp_path / "model", dtype="int8")
    np.testing.assert_array_equal(model.generate(SOURCE, LENGTHS, max_new_tokens=5), again.generate(SOURCE, LENGTHS, max_new_tokens=5))


@pytest.mark.parametrize("dtype", PACKED)
def test_only_ids_of_the_tokenizer_are_scored(dtype):
    from mini_tfm.generate import Session

    model = packed("decoder only", dtype)
    stream = Stream(model, None, 2)
    stream.open(None, np.full(2, 3))
    session = Session(stream, n_ids=7)
    hidden = session.step(TARGET[:2, :1] % 7)
    assert session.scores(hidden).shape == (2, 7)
    whole = Session(stream).scores(hidden)
    np.testing.assert_array_equal(session.scores(hidden), whole[:, :7])


def test_what_cannot_be_packed_is_refused_and_stays_as_it_was():
    model = tiny_model("pre norm", seed=1)
    with pytest.raises(InvalidValue, match="dtype: expected 'bfloat16' or 'int8', got 'int4'"):
        model.pack("int4")
    before = dict(model.weights)
    name = "decoder.0.feed_forward.out.weight"
    model.weights[name] = np.where(np.eye(*before[name].shape) > 0, np.nan, before[name]).astype(np.float32)
    with pytest.raises(InvalidValue, match=r"model.weights\['decoder.0.feed_forward.out.weight'\]: holds NaN"):
        model.pack("int8")
    assert model.precision is None
    model.weights[name] = before[name]
    model.add_lora(2)
    with pytest.raises(InvalidValue, match="merge_lora"):
        model.pack("int8")
    model.merge_lora()
    model.pack("int8")
    with pytest.raises(InvalidValue, match="packed in int8 already"):
        model.pack("bfloat16")
    with pytest.raises(InvalidValue, match="is packed in int8"):
        model.add_lora(2)
    with pytest.raises(InvalidValue, match="is packed in int8"):
        mt.Trainer(model)
    with pytest.raises(InvalidValue, match="float32"):
        tiny_model("pre norm", seed=1, dtype=np.float64).pack("int8")


def test_a_folder_is_loaded_packed(tmp_path):
    tiny_model("rotary", seed=1).save(tmp_path / "model")
    assert mt.load(tmp_path / "model", dtype="bfloat16").precision == "bfloat16"
    with pytest.raises(InvalidValue, match="dtype: expected 'float32', 'bfloat16', 'int8'"):
        mt.load(tmp_path / "model", dtype="int3")
