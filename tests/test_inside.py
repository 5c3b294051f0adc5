"""What a model computes on the way: attention weights that are softmaxes, states that lead to the result, those of what was generated."""

import numpy as np
import pytest
from helpers import assert_same_bits
from variants import VARIANTS, tiny_model, tokens

from mini_tfm import ops
from mini_tfm.errors import InvalidValue
from mini_tfm.positions import rotary_frequencies
from mini_tfm.weights import Weights

NAMES = ("encoder_hidden_states", "encoder_attentions", "decoder_hidden_states", "decoder_attentions", "cross_attentions")


def given_to(model, rng, batch=2, source=6, target=5):
    """Arguments of `look_inside` that fit a model, of which the first row is shorter."""
    config = model.config
    ids = tokens(rng, batch, source) if config.has_encoder else None
    inputs = tokens(rng, batch, target) if config.has_decoder else None
    lengths = None if ids is None else np.array([source - 2, *[source] * (batch - 1)])
    return ids, inputs, lengths, None if inputs is None else np.array([target - 1, *[target] * (batch - 1)])


def softmax(scores, seen):
    scores = np.where(seen, scores.astype(np.float64), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def heads(model, x, name):
    """(B, T, d) -> (B, H, T, D), each kv head as often as it is read."""
    y = x @ model.weights[name + ".weight"]
    n_heads, d = model.config.n_heads, model.config.d_head
    split = y.reshape(*y.shape[:2], -1, d).swapaxes(1, 2)
    return np.repeat(split, n_heads // split.shape[1], axis=1)


def rms(model, x, name):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + model.config.norm_eps) * model.weights[name + ".weight"]


def test_the_weights_of_t5_are_softmaxes_of_what_its_layers_are_given():
    model, rng = tiny_model("t5"), np.random.default_rng(0)
    source, inputs, lengths, target_lengths = given_to(model, rng)
    found = model.look_inside(source, inputs, lengths, target_lengths)
    for stack, length in (("encoder", 6), ("decoder", 5)):
        distance = np.arange(length) - np.arange(length)[:, None]
        seen = (np.arange(length) < (lengths if stack == "encoder" else target_lengths)[:, None])[:, None, None]
        seen = seen & ((distance <= 0) if stack == "decoder" else True)
        buckets = ops.relative_buckets(distance, 8, 6, stack == "encoder")
        bias = np.moveaxis(model.weights[f"{stack}.relative_bias.weight"][buckets], 2, 0)
        for i, weights in enumerate(getattr(found, stack + "_attentions")):
            name = f"{stack}.{i}.attention"
            x = rms(model, getattr(found, stack + "_hidden_states")[i], name + "_norm")
            scores = heads(model, x, name + ".q") @ heads(model, x, name + ".k").swapaxes(2, 3) + bias
            np.testing.assert_allclose(weights, softmax(scores, seen), rtol=1e-9, atol=1e-12)


def test_the_weights_of_llama_are_softmaxes_of_what_its_layers_are_given():
    model, rng = tiny_model("decoder only, llama"), np.random.default_rng(0)
    inputs, places = tokens(rng, 2, 7), np.arange(7)
    found = model.look_inside(inputs=inputs)
    frequencies = rotary_frequencies(model.config)
    for i, weights in enumerate(found.decoder_attentions):
        name = f"decoder.{i}.attention"
        x = rms(model, found.decoder_hidden_states[i], name + "_norm")
        q, k = (ops.rotary(heads(model, x, f"{name}.{part}"), places, frequencies) for part in "qk")
        scores = q @ k.swapaxes(2, 3) / np.sqrt(model.config.d_head)
        np.testing.assert_allclose(weights, softmax(scores, places <= places[:, None]), rtol=1e-9, atol=1e-12)
    assert len(found.decoder_attentions) == 2 and found.cross_attentions == found.encoder_attentions == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_lead_to_the_result_and_weights_add_up(variant):
    model, rng = tiny_model(variant), np.random.default_rng(1)
    config, given = model.config, given_to(model, rng)
    found = model.look_inside(*given)
    source, inputs, lengths, target_lengths = given
    if config.has_encoder:
        assert len(found.encoder_hidden_states) == config.n_encoder_layers + 1
        inner = np.where((np.arange(6) < lengths[:, None])[..., None], found.encoder_hidden_states[-1], 0)
        np.testing.assert_allclose(inner, model.encode(source, lengths), rtol=1e-12)
    if config.has_decoder:
        assert len(found.decoder_hidden_states) == config.n_decoder_layers + 1
        target = np.roll(inputs, -1, axis=1)
        first = source[np.arange(2), lengths - 1] if config.continues_source else np.full(2, config.bos_id)
        fed = np.concatenate([first[:, None], target[:, :-1]], axis=1)
        scores = model.logits(source, target, lengths, target_lengths)
        again = model.look_inside(source, fed, lengths, target_lengths).decoder_hidden_states[-1]
        np.testing.assert_allclose(model.output(again, Weights(model.weights)), scores, rtol=1e-9, atol=1e-9)
    for name in NAMES[1::2] + NAMES[4:]:
        for weights in getattr(found, name):
            np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-12)
            keys = lengths if name != "decoder_attentions" else target_lengths
            assert (weights[0, :, :, keys[0] :] == 0).all() and (weights >= 0).all()


def test_a_row_has_what_it_has_alone():
    model = tiny_model("relative")
    source, inputs, lengths, target_lengths = given_to(model, np.random.default_rng(2), batch=3)
    together = model.look_inside(source, inputs, lengths, target_lengths)
    n, t = lengths[0], target_lengths[0]
    alone = model.look_inside(source[:1, :n], inputs[:1, :t])
    for name, queries, keys in (("encoder_attentions", n, n), ("decoder_attentions", t, t), ("cross_attentions", t, n)):
        for a, b in zip(getattr(together, name), getattr(alone, name), strict=True):
            np.testing.assert_allclose(a[:1, :, :queries, :keys], b, rtol=1e-12, atol=1e-14)


# Of what was generated

ENDS = {"t5": [4, 7, 10], "bart": [4, 9], "decoder only, llama": [3, 6]}
EVERYTHING = {"output_scores": True, "output_attentions": True, "output_hidden_states": True}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "seed": 3}])
@pytest.mark.parametrize("variant", ["t5", "bart", "decoder only, llama"])
def test_generated_sequences_have_what_a_pass_over_them_has(variant, options):
    model, source, lengths = tiny_model(variant, seed=1), tokens(np.random.default_rng(0), 3, 5), np.array([5, 2, 4])
    ends = {"max_new_tokens": 6, "eos_token_id": ENDS[variant]}
    made = model.generate(source, lengths, **ends, **options, **EVERYTHING)
    plain = model.generate(source, lengths, **ends, **options)
    assert made.sequences == plain
    stopped = set()
    for b in range(3):
        several = "num_return_sequences" in options
        for n, ids in enumerate(plain[b] if several else [plain[b]]):
            of = {name: getattr(made, name)[b][n] if several else getattr(made, name)[b] for name in NAMES}
            prompt = [1] if model.config.has_encoder else [1, *source[b, : lengths[b]]]
            log_probs = made.log_probs[b][n] if several else made.log_probs[b]
            fed = np.array([[*prompt, *ids][: len(prompt) + len(log_probs) - 1]])
            stopped.add(len(log_probs) - len(ids))
            expected = model.look_inside(source[b : b + 1, : lengths[b]] if model.config.has_encoder else None, fed)
            for name in NAMES:
                assert_same_bits(of[name], [layer[0] for layer in getattr(expected, name)])
            last = model.output(of["decoder_hidden_states"][-1], Weights(model.weights))[len(prompt) - 1 :]
            assert len(last) == len(log_probs)
            if not options:
                assert last.argmax(axis=1)[: len(ids)].tolist() == ids
    assert stopped == {0, 1}, "some end, some do not"


def test_of_given_encoder_outputs():
    model, source, lengths = tiny_model("pre norm"), tokens(np.random.default_rng(0), 2, 5), np.array([5, 3])
    expected = model.generate(source, lengths, max_new_tokens=4, **EVERYTHING)
    found = model.generate(encoder_outputs=model.encode(source, lengths), lengths=lengths, max_new_tokens=4, **EVERYTHING)
    for name in NAMES[2:]:
        assert_same_bits(getattr(found, name), getattr(expected, name))
    assert found.encoder_attentions == found.encoder_hidden_states == [[], []]


def test_only_what_is_asked_for():
    model, source = tiny_model("pre norm"), np.array([[5, 6]])
    made = model.generate(source, max_new_tokens=2, output_scores=True, output_attentions=True)
    assert made.cross_attentions is not None and made.encoder_hidden_states is None
    made = model.generate(source, max_new_tokens=2, output_scores=True, output_hidden_states=True)
    assert made.cross_attentions is None and made.encoder_hidden_states is not None
    assert model.generate(source, max_new_tokens=0, **EVERYTHING).cross_attentions[0][0].shape == (2, 0, 2)


REFUSED = {
    "no scores": (lambda m: m.generate([[5]], output_attentions=True), r"output_attentions: True needs output_scores=True"),
    "no source": (lambda m: m.look_inside(None, [[5]]), "source, inputs: expected source and inputs for this model, got inputs"),
    "nothing": (lambda m: m.look_inside(), "source, inputs: expected source and inputs for this model, got neither"),
    "other sizes": (lambda m: m.look_inside([[5]], [[5], [6]]), "inputs: expected 1 sequences, as source has, got 2"),
    "unknown ids": (lambda m: m.look_inside([[5]], [[50]]), "inputs: expected ids from 0 to"),
    "several segments": (
        lambda m: tiny_model("pre norm", segment_length=4).generate([[5]], max_new_tokens=5, **EVERYTHING),
        r"output_attentions, output_hidden_states: expected a prompt and max_new_tokens of at most 4 tokens together.*got 5",
    ),
    "a long segment": (
        lambda m: tiny_model("decoder only", segment_length=4).look_inside(None, [[5] * 5]),
        "inputs: expected at most segment_length = 4 tokens, .*got 5",
    ),
    "a source for a decoder": (
        lambda m: tiny_model("decoder only").look_inside([[5]], [[5]]),
        "expected inputs for this model, got s",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_looked_at_is_refused(kind):
    call, told = REFUSED[kind]
    with pytest.raises(InvalidValue, match=told):
        call(tiny_model("pre norm"))
