"""The names of what rows are made of: they change with it, and with nothing else."""

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.fingerprint import Fingerprint

PLACES = [("encoder", 0), ("encoder", 1), ("cross", 0), ("decoder", 0), ("decoder", 1), ("decoder", 2)]


def model(dtype=np.float32, **fields):
    return mt.Transformer(mt.Config(**{"vocab_size": 20, "d_model": 8, "n_heads": 2, **fields}), seed=0, dtype=dtype)


def names(model):
    made_of = Fingerprint(model.config, model.weights)
    return {place: made_of(*place) for place in PLACES}


def changed_by(name, **fields):
    """The places whose rows are made of other things when a weight changes."""
    one = model(**fields)
    before = names(one)
    one.weights[name] = one.weights[name] + np.float32(0.5)
    after = names(one)
    return {place for place in PLACES if before[place] != after[place]}


@pytest.mark.parametrize(
    "weight, places",
    [
        ("embedding.weight", set(PLACES)),
        ("encoder.0.attention_norm.weight", {*PLACES} - {("decoder", 0)}),
        ("encoder.0.attention.k.weight", {("encoder", 1), ("cross", 0), ("decoder", 1), ("decoder", 2)}),
        ("encoder.1.feed_forward.out.bias", {("cross", 0), ("decoder", 1), ("decoder", 2)}),
        ("encoder.norm.bias", {("cross", 0), ("decoder", 1), ("decoder", 2)}),
        ("decoder.0.cross.k.weight", {("decoder", 1), ("decoder", 2)}),
        ("decoder.1.attention_norm.weight", {("decoder", 1), ("decoder", 2)}),
        ("decoder.1.attention.k.weight", {("decoder", 2)}),
        ("decoder.norm.weight", {("decoder", 2)}),
    ],
)
def test_rows_are_named_by_the_weights_below_them(weight, places):
    assert changed_by(weight) == places


def test_other_kinds_of_models():
    assert changed_by("output.weight", tie_embeddings=False) == set()
    assert changed_by("decoder.relative_bias.weight", positions="relative") == {("decoder", 1), ("decoder", 2)}
    assert ("encoder", 0) in changed_by("encoder.positions.weight", positions="learned")
    assert ("encoder", 0) not in changed_by("encoder.0.attention_norm.weight", norm_position="post")


def test_what_no_row_depends_on_is_not_named():
    one = model()
    before = names(one)
    same = [
        one.config.replace(segment_length=7, pad_id=3, bos_id=4, eos_id=5),
        one.config.replace(max_positions=7, rotary_base=7.0, relative_buckets=8, relative_max_distance=9),
    ]
    for config in same:
        assert names(mt.Transformer(config, weights=one.weights)) == before
    assert names(mt.Transformer(one.config, dtype=np.float64, weights={n: w.astype(np.float64) for n, w in one.weights.items()})) == before
    one.add_memory_weights(mt.memory("recurrent:tokens=2"))
    assert names(one) == before
    assert names(mt.Transformer(one.config.replace(activation="gelu"), weights=one.weights))["cross", 0] != before["cross", 0]
    assert names(mt.Transformer(one.config.replace(norm_eps=1e-3), weights=one.weights))["encoder", 0] != before["encoder", 0]


def test_it_tells_when_a_weight_has_changed():
    one = model()
    made_of = Fingerprint(one.config, one.weights)
    assert not made_of.changed([("decoder", 0)])
    one.weights["decoder.0.attention.k.weight"][0, 0] += 1
    assert not made_of.changed([("decoder", 0)])
    one.weights["embedding.weight"][0, 0] += 1
    assert made_of.changed([("decoder", 0)]) and made_of.changed([("decoder", 0)])
    made_of.renew()
    assert not made_of.changed([("decoder", 0)])
    made_of("cross", 0)
    one.weights["encoder.norm.weight"][0] += 1
    assert made_of.changed([("cross", 0)])  # since it was named
