"""Config: every field has a type, a range and its relations, and says which one is at fault."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm.config import MAX_WEIGHT_COUNT, Config, RotaryScaling
from mini_tfm.errors import InvalidValue
from mini_tfm.model import weight_shapes

GOOD = {"vocab_size": 100}


def test_the_defaults_are_the_paper_but_for_pre_norm():
    config = Config(vocab_size=37_000, d_model=512, n_heads=8, n_encoder_layers=6, n_decoder_layers=6)
    assert (config.d_ff, config.d_head, config.n_kv_heads, config.attention_scale) == (2048, 64, 8, 1 / 8)  # table 3, base
    assert (config.activation, config.positions, config.norm, config.tie_embeddings, config.bias) == (
        "relu", "sinusoidal", "layer", True, True,
    )  # fmt: skip
    assert config.norm_position == "pre"


def test_what_is_derived_can_be_given():
    config = Config(**GOOD, d_model=10, n_heads=4, d_head=3, n_kv_heads=2, d_ff=7, attention_scale=1)
    assert (config.d_head, config.n_kv_heads, config.d_ff, config.attention_scale) == (3, 2, 7, 1)


BAD = {
    "vocab_size": [0, -1, 1 << 23, 1.0, "100", None, True],
    "d_model": [0, -8, 1 << 17, 128.0, True, None],
    "n_heads": [0, 1 << 11, "4", 2.5],
    "n_encoder_layers": [-1, 1 << 11, None, False],
    "n_decoder_layers": [-1, 1 << 11, 0.0],
    "d_ff": [0, (1 << 20) + 1, "no"],
    "n_kv_heads": [0, 3, 8, 2.0],
    "d_head": [0, 1 << 13, 32.0],
    "attention_scale": [0, -1.0, float("inf"), float("nan"), "1", 10**400, False],
    "activation": ["Relu", "", None, 3, "swish"],
    "norm": ["batch", None, 1],
    "norm_position": ["before", True],
    "norm_eps": [0, -1e-5, float("nan"), None, "1e-5"],
    "bias": [1, 0, None, "true", ("q", "queries")],
    "positions": ["alibi", None],
    "max_positions": [0, 1 << 25, 10.5],
    "rotary_base": [0.0, -1, float("inf")],
    "relative_buckets": [0, 1 << 13],
    "relative_max_distance": [0, 1 << 21],
    "tie_embeddings": [None, 1],
    "embedding_scale": ["yes", 0],
    "pad_id": [-1, 100, 0.0],
    "bos_id": [-1, 100, None],
    "eos_id": [100, True],
    "segment_length": [0, -5, (1 << 20) + 1, 64.0],
    "gated": [None, 1, "silu"],
    "decoder_n_heads": [0, 1 << 11, "8"],
    "decoder_n_kv_heads": [0, 2.0, 3],
    "decoder_d_head": [0, 1 << 13],
    "decoder_attention_scale": [0, -1.0, float("nan")],
    "decoder_mixer": ["gru", None, True],
    "decoder_d_ff": [0, (1 << 20) + 1, 8.0],
    "embedding_norm": [None, "layer"],
    "final_norm": [1, "yes"],
    "qk_norm": [None, 0],
    "sinusoids": ["paper", None],
    "position_offset": [-1, 1 << 13, None, 2.0],
    "rotary_dims": [0, 1 << 13, 64],
    "rotary_scaling": ["linear", 2.0],
    "window": [0, -1, 1 << 25, 2.0],
    "local_layers": [(0,), (2.0,)],
    "local_rotary_base": [0, -1.0, 10.0],
    "attention_cap": [0, float("nan"), "50"],
    "token_types": [-1, 1 << 13, None],
    "output_bias": [None, 1],
    "output_scale": [0, float("inf")],
    "output_cap": [0.0, -30],
    "context_length": [0, 1 << 25, 512.0],
    "continues_source": [None, 1],
    "framed_by_tokenizer": [None, 0],
}


LATER = set(list(BAD)[list(BAD).index("gated") :])


def test_every_field_has_bad_values_here():
    assert set(BAD) == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(InvalidValue, match=rf"^Config: {name}: expected .*, got "):
        Config(**{**GOOD, name: value})
    with pytest.raises(InvalidValue):
        Config.from_dict({**GOOD, name: value})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"d_model": 10, "n_heads": 4}, r"d_model: expected a multiple of n_heads = 4 \(or a given d_head\), got 10"),
        ({"n_encoder_layers": 0, "n_decoder_layers": 0}, "n_encoder_layers, n_decoder_layers: expected at least one"),
        ({"n_encoder_layers": 0, "continues_source": True}, "continues_source: expected False without an encoder and a decoder, got True"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads: expected a divisor of n_heads = 4, got 3"),
        ({"d_model": 10, "n_heads": 5, "decoder_n_heads": 4}, r"d_model: expected a multiple of decoder_n_heads = 4 \(or a given"),
        ({"positions": "rotary", "decoder_n_heads": 8}, r"decoder_d_head: expected d_head = \d+ with rotary positions, got \d+"),
        ({"positions": "rotary", "d_head": 5}, "d_head: expected an even number with rotary positions, got 5"),
        ({"positions": "relative", "relative_buckets": 6}, "relative_buckets: expected a multiple of 4, got 6"),
        ({"positions": "relative", "relative_max_distance": 16}, "relative_max_distance: expected more than .* 16, got 16"),
        ({"window": 4, "local_layers": (0, 2)}, "local_layers: expected 0 to n_decoder_layers - 1 = 1"),
        ({"positions": "rotary", "rotary_dims": 3}, "rotary_dims: expected an even number of at most d_head = 32, got 3"),
        ({"decoder_mixer": "ssru", "n_decoder_layers": 0}, "decoder_mixer: expected 'attention' without decoder layers, got 'ssru'"),
        ({"decoder_mixer": "ssru", "window": 4}, "window: expected None with decoder_mixer='ssru', which has no keys, got 4"),
        ({"vocab_size": 2}, "eos_id: expected 0 to vocab_size - 1 = 1, got 2"),
        ({"n_encoder_layers": 1 << 10, "d_model": 1 << 15, "d_ff": 1 << 15}, f"expected at most {MAX_WEIGHT_COUNT} weights"),
        ({"positions": "learned", "d_model": 1 << 16, "max_positions": 1 << 20}, "max_positions, layers: expected at most"),
        ({"tie_embeddings": False, "d_model": 1 << 14, "vocab_size": 1 << 22}, "expected at most"),
    ],
)
def test_fields_must_fit_each_other(fields, told):
    with pytest.raises(InvalidValue, match=told):
        Config(**{**GOOD, **fields})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kind": "ntk", "factor": 2.0}, "kind: expected linear, llama3 or yarn, got 'ntk'"),
        ({"kind": "linear", "factor": 0.5}, "factor: expected a number of at least 1, got 0.5"),
        ({"kind": "linear", "factor": "2"}, "factor: expected float, got '2'"),
        ({"kind": "llama3", "factor": 2.0, "low_factor": 4.0}, "low_factor, high_factor: expected 0 < low_factor < high_factor"),
        ({"kind": "yarn", "factor": 2.0, "original_positions": 0}, "original_positions: expected 1 to"),
        ({"kind": "yarn", "factor": 2.0, "mscale": 1}, "unknown field 'mscale'"),
        ({"kind": "yarn"}, "field 'factor' is missing"),
    ],
)
def test_a_wrong_scaling_is_refused_by_name(fields, told):
    with pytest.raises(InvalidValue, match=f"^Config: rotary_scaling: {told}"):
        Config.from_dict({**GOOD, "rotary_scaling": fields})


def test_a_file_names_later_fields_only_where_they_say_something():
    """So that earlier releases read what they can, and a fingerprint of the config stays what it was."""
    assert set(Config(**GOOD).to_dict()) == set(dataclasses.asdict(Config(**GOOD))) - LATER
    changed = Config(**GOOD, gated=True, final_norm=False)
    assert {*changed.to_dict()} & LATER == {"gated", "final_norm"} and "gated=True" in repr(changed)
    assert not any(name in repr(Config(**GOOD)) for name in LATER)


def test_all_faults_are_told_at_once():
    with pytest.raises(InvalidValue, match=r"d_model.*n_heads.*activation"):
        Config(vocab_size=100, d_model=-1, n_heads=0, activation="x")
    with pytest.raises(InvalidValue, match=r"pad_id.*eos_id"):
        Config(vocab_size=100, pad_id=100, eos_id=200)


def test_the_largest_allowed_are_counted_as_they_are():
    """The bound is on real weights: what it counts is never less than what would be allocated."""
    for fields in ({}, {"tie_embeddings": False}, {"positions": "learned"}, {"n_encoder_layers": 0}, {"d_head": 64, "n_heads": 8}):
        config = Config(**{**GOOD, "d_model": 64, **fields})
        matrices = sum(a * b for a, b in (shape for shape in weight_shapes(config).values() if len(shape) == 2))
        layer = 64 * (4 * config.n_heads * config.d_head + 2 * config.d_ff)
        tables = config.vocab_size * (1 if config.tie_embeddings else 2) + (2 * 4096 if config.positions == "learned" else 0)
        assert matrices <= tables * 64 + layer * (config.n_encoder_layers + 2 * config.n_decoder_layers)


def test_an_unknown_field_is_named_with_a_hint():
    with pytest.raises(InvalidValue, match=r"unknown field 'n_layer_encoder', 'dmodel' \(did you mean 'd_model'\?\)|unknown field"):
        Config.from_dict({**GOOD, "n_layer_encoder": 3, "dmodel": 4})
    with pytest.raises(InvalidValue, match="did you mean 'd_model'"):
        Config.from_dict({**GOOD, "d_modle": 4})
    with pytest.raises(InvalidValue, match="field 'vocab_size' is missing"):
        Config.from_dict({"d_model": 8})
    for value in (None, [("vocab_size", 5)], "vocab_size=5"):
        with pytest.raises(InvalidValue, match="expected a mapping"):
            Config.from_dict(value)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "d_model": st.sampled_from([4, 128, 512]),
            "norm_eps": st.floats(1e-12, 1),
            "segment_length": st.none() | st.integers(1, 1000),
            "positions": st.sampled_from(["sinusoidal", "rotary", "relative"]),
            "n_kv_heads": st.sampled_from([None, 1, 2, 4]),
            "bias": st.sampled_from([True, False, ("q", "k")]),
            "rotary_scaling": st.sampled_from([None, RotaryScaling(kind="linear", factor=2.0)]),
            "final_norm": st.sampled_from([None, True, False]),
        },
    ).filter(lambda fields: fields.get("positions") != "rotary" or fields.get("d_model") != 4)
)
def test_a_config_comes_back_from_json(fields):
    config = Config(**GOOD, **fields)
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


def test_it_is_frozen_and_replaced():
    config = Config(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3
    assert config.replace(norm="rms").norm == "rms" and config.norm == "layer"
    with pytest.raises(InvalidValue, match="norm: expected"):
        config.replace(norm="none")


def test_what_a_config_has():
    assert Config(**GOOD, n_encoder_layers=0).has_decoder and not Config(**GOOD, n_encoder_layers=0).has_encoder
    assert Config(**GOOD, n_decoder_layers=0).has_encoder and not Config(**GOOD, n_decoder_layers=0).has_decoder
