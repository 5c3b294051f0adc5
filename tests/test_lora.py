"""LoRA: adapters beside weights, trained in their place, merged for decoding, and known to all that walks the weights."""

import numpy as np
import pytest
from helpers import assert_same_bits
from variants import VARIANTS, assert_gradients, tiny_model, tokens

import mini_tfm as mt
from mini_tfm import lora
from mini_tfm.checkpoint.header import read_header
from mini_tfm.data.batches import Batch, fields
from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.fingerprint import Fingerprint
from mini_tfm.generate.session import Session, packed_weights
from mini_tfm.stream import Stream
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.train import Trainer
from mini_tfm.train.average import average_models
from mini_tfm.transformer import Transformer
from mini_tfm.weights import LORA_SCALE, Weights

SOME = ("pre norm", "t5", "marian", "gated", "bart", "decoder only, llama", "decoder only, qwen", "decoder only, gemma")


def adapted(variant="pre norm", *, dtype=np.float64, filled=True, targets="all-linear", rank=2, alpha=3, **changes):
    """A tiny model whose adapters add something, unless they are not filled."""
    model = tiny_model(variant, dtype=dtype, **changes)
    model.add_lora(rank, alpha, targets)
    rng = np.random.default_rng(5)
    for name, weight in model.weights.items():
        if filled and name.startswith("lora.") and name.endswith(".b"):
            model.weights[name] = (rng.standard_normal(weight.shape) / 2).astype(dtype)
    return model


def batch_of(config, n=3):
    rng = np.random.default_rng(2)
    source = tokens(rng, 2, n, 4) if config.has_encoder else None
    return Batch(source, tokens(rng, 2, n, 4))


def outputs(model):
    """All that a model computes of fixed tokens, without gradients: states, scores, those of a session's packed weights."""
    rng = np.random.default_rng(1)
    source, target = tokens(rng, 2, 5), tokens(rng, 2, 6)
    found = [model.encode(source)] if model.config.has_encoder else []
    if model.config.has_decoder:
        found.append(model.logits(source if model.config.has_encoder else None, target))
        stream = Stream(model, None, 2)
        stream.open(source if model.config.has_encoder else None, np.array([5, 5]))
        session = Session(stream)
        found += [session.scores(session.step(target[:, i : i + 1])) for i in range(3)]
    return found


def factored(model, batch):
    """The loss with the adapters as products of their own, as a step computes it."""
    trainer = Trainer(model, learning_rate=0.0, weight_decay=0.0)
    return trainer.step(*fields(batch))


# ------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("variant", VARIANTS)
def test_new_adapters_change_no_bit(variant):
    """Added to the weights, and as products of their own."""
    base, model = tiny_model(variant, dtype=np.float32), adapted(variant, dtype=np.float32, filled=False)
    assert_same_bits(outputs(model), outputs(base))
    if model.config.has_decoder:
        batch = batch_of(model.config)
        expected = Trainer(base, learning_rate=0.0, weight_decay=0.0).step(*fields(batch))
        assert factored(model, batch) == expected
    for layer in lora.adapted_layers(model.weights):
        bound = lora.linear_layers(model.config)[layer][0] ** -0.5
        a = model.weights[f"lora.{layer}.a"]
        assert (np.abs(a) <= bound).all() and np.ptp(a) > bound / 2


def test_products_rounded_to_bfloat16_leave_the_sum_alone():
    """New adapters change no bit there either, and a validation is that of the merged model."""
    batch, losses, measured = batch_of(tiny_model("gated").config), [], []
    merged = adapted("gated", dtype=np.float32)
    merged.merge_lora()
    for model in (tiny_model("gated", dtype=np.float32), adapted("gated", dtype=np.float32, filled=False)):
        losses.append(Trainer(model, bfloat16=True).step(*fields(batch)))
    for model in (merged, adapted("gated", dtype=np.float32)):
        measured.append(Trainer(model, bfloat16=True).evaluate(batch))
    assert losses[0] == losses[1] and measured[0] == measured[1]


def test_adapters_are_a_function_of_the_seed_and_their_layer():
    few, many, other = tiny_model(), tiny_model(), tiny_model()
    few.add_lora(4, targets=("v",))
    many.add_lora(4, targets=("q", "v"))
    other.add_lora(4, targets=("v",), seed=1)
    for name in few.weights:
        assert_same_bits(many.weights[name], few.weights[name])
    assert not np.array_equal(other.weights["lora.encoder.0.attention.v.a"], few.weights["lora.encoder.0.attention.v.a"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_adapters_compute_the_same_bits(variant):
    """Streams, sessions, and the equation in plain NumPy."""
    model, base = adapted(variant, dtype=np.float32), tiny_model(variant, dtype=np.float32)
    expected = outputs(adapted(variant, dtype=np.float32))  # another model: a session's packed weights are kept with it
    assert not np.array_equal(expected[0], outputs(base)[0])
    model.merge_lora()
    assert model.weights.keys() == base.weights.keys()
    assert_same_bits(outputs(model), expected)
    parts = adapted(variant, dtype=np.float32).weights
    for layer in lora.linear_layers(model.config):
        update = (parts[f"lora.{layer}.b"] @ parts[f"lora.{layer}.a"]).T * (3 / 2)
        np.testing.assert_allclose(model.weights[layer + ".weight"], base.weights[layer + ".weight"] + update, rtol=1e-5, atol=1e-6)
        assert np.abs(update).max() > 0.01


@pytest.mark.parametrize("variant", SOME)
def test_products_of_their_own_are_the_merged_ones(variant):
    model = adapted(variant)
    batch, whole = batch_of(model.config), adapted(variant)
    whole.merge_lora()
    loss = factored(model, batch)
    np.testing.assert_allclose(loss, Trainer(whole).evaluate(batch), rtol=1e-12)
    np.testing.assert_allclose(loss, Trainer(model).evaluate(batch), rtol=1e-12)
    assert abs(loss - Trainer(tiny_model(variant)).evaluate(batch)) > 1e-3


@pytest.mark.parametrize("memory", ["window:size=6,site=decoder", "store:top_k=3,site=decoder,gradient=none"])
@pytest.mark.parametrize("variant", ["decoder only, llama", "decoder only, qwen"])
def test_memories_see_adapted_keys_and_values(variant, memory):
    """Rows are projected, and searched for, by what the weights and their adapters add up to."""
    found = []
    for merge in (False, True):
        model = adapted(variant, dtype=np.float32, vocab_size=ByteTokenizer.vocab_size)
        if merge:
            model.merge_lora()
        pipe = mt.Pipeline(model, ByteTokenizer(), memory, segment_length=5)
        pipe.read("rows that are kept, and looked at again")
        found.append((pipe.score("and looked at"), pipe.generate("kept", max_new_tokens=8)))
    assert found[0] == found[1]


def test_a_weight_that_lies_the_other_way_round_has_the_same_bits():
    model = adapted("gated", dtype=np.float32)
    turned = Transformer(model.config, weights=dict(model.weights))
    for name in lora.linear_layers(model.config):
        turned.weights[name + ".weight"] = np.asfortranarray(model.weights[name + ".weight"])
    assert_same_bits(outputs(turned), outputs(model))
    name = "decoder.0.feed_forward.gate.weight"
    assert Weights(turned.weights)[name].array.flags.f_contiguous
    assert_same_bits(np.ascontiguousarray(Weights(turned.weights)[name].array), Weights(model.weights)[name].array)


# ------------------------------------------------------------------------- training


@pytest.mark.parametrize("memory", [None, "recurrent:tokens=2"])
@pytest.mark.parametrize("variant", SOME)
def test_gradients_equal_differences(variant, memory):
    """Of A and B, and of a memory's parameters, which are trained with them; of nothing else there is one."""
    trainer = Trainer(adapted(variant), None if memory is None else mt.memory(memory))
    model, batch = trainer.model, trainer._batch(*fields(batch_of(trainer.model.config)))
    assert set(trainer.optimizer.weights) == {n for n in model.weights if n.startswith(("lora.", "memory.")) and n != LORA_SCALE}
    assert trainer.optimizer.arena.size == sum(weight.size for weight in trainer.optimizer.weights.values())
    trainer.optimizer.zero_grad()
    trainer._backward(batch, trainer._dropout())

    def loss(weights):
        return Trainer(Transformer(model.config, dtype=np.float64, weights={**model.weights, **weights}), trainer.memory).evaluate(batch)

    assert_gradients(loss, {name: w.copy() for name, w in trainer.optimizer.weights.items()}, trainer.optimizer.grads)
    assert min(np.abs(grad).max() for name, grad in trainer.optimizer.grads.items()) > 0


@pytest.mark.parametrize("trainable", ["decoder.*", "*"])
def test_gradients_of_weights_beside_adapters_equal_differences(trainable):
    """Frozen adapters are a part of the weight; with trained ones both have gradients."""
    trainer = Trainer(adapted("gated"), trainable=trainable)
    model, batch = trainer.model, trainer._batch(*fields(batch_of(trainer.model.config)))
    assert LORA_SCALE not in trainer.optimizer.weights
    trainer.optimizer.zero_grad()
    trainer._backward(batch, trainer._dropout())

    def loss(weights):
        return Trainer(Transformer(model.config, dtype=np.float64, weights={**model.weights, **weights})).evaluate(batch)

    some = {name: w.copy() for name, w in trainer.optimizer.weights.items() if ".0." in name or name == "embedding.weight"}
    assert_gradients(loss, some, trainer.optimizer.grads)


def test_a_step_trains_adapters_and_leaves_the_weights_alone():
    trainer = Trainer(adapted("gated", filled=False), learning_rate=1e-2)
    before = {name: weight.copy() for name, weight in trainer.model.weights.items()}
    batch = batch_of(trainer.model.config)
    first = trainer.step(*fields(batch))
    for _ in range(20):
        trainer.step(*fields(batch))
    assert trainer.losses[-1] < first - 0.05
    for name, weight in trainer.model.weights.items():
        assert np.array_equal(weight, before[name]) == (not name.endswith((".a", ".b"))), name


def test_a_trainer_does_not_go_on_with_other_adapters_than_it_was_made_for():
    """It would train other weights than the run that is resumed from its folder."""
    batch = batch_of(tiny_model("gated").config)
    early, late = Trainer(tiny_model("gated")), Trainer(adapted("gated"))
    early.model.add_lora()
    late.model.merge_lora()
    for trainer in (early, late):
        with pytest.raises(InvalidValue, match="adapters came, or were merged, after this Trainer was made; make a new Trainer"):
            trainer.step(*fields(batch))
        assert trainer.step_count == 0


def test_dropout_is_of_what_trained_adapters_read():
    """A function of the seed; new adapters and frozen ones, and what is measured, have none."""
    batch = batch_of(tiny_model("gated").config)
    losses = []
    for seed, rate in ((0, 0.0), (0, 0.5), (0, 0.5), (1, 0.5)):
        losses.append(Trainer(adapted("gated"), lora_dropout=rate, seed=seed).step(*fields(batch)))
    assert losses[1] == losses[2] and len(set(losses)) == 3
    for layer in ("q", "cross.v", "in", "gate", "out"):
        alone = [Trainer(adapted("gated", targets=(layer,)), lora_dropout=rate).step(*fields(batch)) for rate in (0.0, 0.5)]
        assert alone[0] != alone[1], layer
    new = Trainer(adapted("gated", filled=False), lora_dropout=0.5)
    assert new.step(*fields(batch)) == Trainer(tiny_model("gated")).step(*fields(batch))  # B is zero
    assert not np.array_equal(new.optimizer.grad, 0)
    trained = Trainer(adapted("gated"), lora_dropout=0.5)
    assert trained.evaluate(batch) == Trainer(adapted("gated")).evaluate(batch)
    frozen = [Trainer(adapted("gated"), lora_dropout=rate, trainable="decoder.*").step(*fields(batch)) for rate in (0.0, 0.5)]
    assert frozen[0] == frozen[1]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_stopped_run_goes_on_bit_for_bit(recompute, tmp_path):
    def made():
        model = adapted("gated", dtype=np.float32, filled=False)
        return Trainer(model, mt.memory("recurrent:tokens=2"), learning_rate=1e-2, dropout=0.1, lora_dropout=0.2, recompute=recompute)

    batch = batch_of(tiny_model("gated").config)
    whole, first = made(), made()
    for _ in range(4):
        whole.step(*fields(batch))
    for _ in range(2):
        first.step(*fields(batch))
    first.save(tmp_path / "run")
    again = Trainer.resume(tmp_path / "run")
    assert set(again.optimizer.weights) == set(whole.optimizer.weights) and again.options.lora_dropout == 0.2
    for _ in range(2):
        again.step(*fields(batch))
    assert again.losses == whole.losses
    for name, weight in whole.model.weights.items():
        assert_same_bits(again.model.weights[name], weight)


# ------------------------------------------------------------------------- all that walks the weights


def test_a_session_packs_what_the_adapters_have_become():
    """Weights and adapters are packed once, and anew when a step has changed an adapter."""
    trainer = Trainer(adapted("gated", dtype=np.float32, filled=False), learning_rate=0.3)
    model, base = trainer.model, tiny_model("gated", dtype=np.float32)
    source = tokens(np.random.default_rng(3), 2, 5)
    chosen = {"max_new_tokens": 12, "stop_at_eos": False}
    assert model.generate(source, **chosen) == base.generate(source, **chosen)
    for _ in range(3):
        trainer.step(*fields(batch_of(model.config)))
    found = model.generate(source, **chosen)
    assert found != base.generate(source, **chosen)
    for name, weight in packed_weights(model, model.config.vocab_size).items():
        if name in model.weights:
            assert_same_bits(weight.array, Weights(model.weights)[name].array)
    copy = Transformer(model.config, weights={name: weight.copy() for name, weight in model.weights.items()})
    copy.merge_lora()
    assert copy.generate(source, **chosen) == found
    target = np.array(found)
    scores = copy.logits(source, target)  # cached decoding equals full decoding
    np.testing.assert_array_equal(scores.argmax(-1), target)


def test_rows_are_named_by_the_adapters_below_them():
    """Not by new ones, which add nothing; a merged model has the rows of the adapted one."""
    base, new, model = (each() for each in (tiny_model, lambda: adapted(filled=False), adapted))
    places = [("encoder", 0), ("encoder", 1), ("cross", 0), ("decoder", 0), ("decoder", 1)]
    named = lambda model: [Fingerprint(model.config, model.weights)(*place) for place in places]  # noqa: E731
    before = named(base)
    assert named(new) == before
    after = named(model)
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, False, True, False]
    model.weights["lora.encoder.1.attention.k.b"] += 1  # of the second layer, above its own rows
    changed = named(model)
    assert [a == b for a, b in zip(changed, after, strict=True)] == [True, True, False, True, False]
    model.merge_lora()
    assert named(model) == changed


def test_a_change_of_an_adapter_or_its_scale_is_noticed():
    model = adapted()
    made_of = Fingerprint(model.config, model.weights)
    for name in ("lora.encoder.0.attention.v.a", "lora.encoder.0.attention.v.b", LORA_SCALE):
        assert not made_of.changed([("encoder", 1)])
        model.weights[name][...] *= 2
        assert made_of.changed([("encoder", 1)]), name
        made_of.renew()
    model.weights["lora.encoder.1.attention.v.a"] *= 2
    assert not made_of.changed([("encoder", 1)])


def test_a_memory_of_another_adapter_is_not_read():
    model = adapted("decoder only", dtype=np.float32, vocab_size=ByteTokenizer.vocab_size)
    pipe = mt.Pipeline(model, ByteTokenizer(), "window:size=6,site=decoder", segment_length=5)
    pipe.read("what is kept")
    pipe.score("kept")
    model.merge_lora()
    pipe.score("kept")  # the same rows
    model.weights["decoder.0.attention.v.weight"] = model.weights["decoder.0.attention.v.weight"] + np.float32(1)
    with pytest.raises(InvalidValue, match="the model's weights are not those"):
        pipe.score("kept")


def test_a_saved_model_has_its_adapters(tmp_path):
    model = adapted("gated", dtype=np.float32)
    model.save(tmp_path / "model")
    again = mt.load(tmp_path / "model")
    assert again.weights.keys() == model.weights.keys()
    assert_same_bits(outputs(again), outputs(model))
    header = read_header(tmp_path / "model")
    assert not header.faults and header.n_parameters == model.n_parameters
    assert header.adapters == f"LoRA of rank 2 beside {len(lora.linear_layers(model.config))} layers"


@pytest.mark.parametrize(
    "name, tensor, fault",
    [
        ("lora.decoder.0.attention.q.a", None, "tensor 'lora.decoder.0.attention.q.a' is missing"),
        ("lora.decoder.0.attention.q.b", None, "tensor 'lora.decoder.0.attention.q.b' is missing"),
        (LORA_SCALE, None, "tensor 'lora.scale' is missing"),
        ("lora.decoder.0.attention.v.a", np.zeros((3, 8), "f4"), r"lora.decoder.0.attention.v.a': expected shape \(2, 8\), got \(3, 8\)"),
        ("lora.decoder.0.attention.v.b", np.zeros((7, 2), "f4"), r"expected shape \(8, 2\), got \(7, 2\)"),
        ("lora.decoder.9.attention.v.b", np.zeros((8, 2), "f4"), "'lora.decoder.9.attention.v.b' is no adapter of a layer"),
        ("lora.embedding.a", np.zeros((2, 8), "f4"), "'lora.embedding.a' is no adapter of a layer"),
    ],
)
def test_a_folder_whose_adapters_do_not_fit_is_refused(name, tensor, fault, tmp_path):
    model = adapted(dtype=np.float32, targets=("q", "v"))
    model.weights.pop(name, None)
    if tensor is not None:
        model.weights[name] = tensor
    model.save(tmp_path / "model")
    with pytest.raises(InvalidValue, match=fault):
        mt.load(tmp_path / "model")


def test_the_average_is_of_what_weights_and_adapters_add_up_to(tmp_path):
    """Not the product of the means of A and B; beside a plain model, too."""
    models = [adapted("gated", dtype=np.float32), adapted("gated", dtype=np.float32, rank=3), tiny_model("gated", dtype=np.float32)]
    models[1].weights[LORA_SCALE] *= 2
    for number, model in enumerate(models):
        model.save(tmp_path / str(number))
        model.merge_lora()
    average_models([tmp_path / str(number) for number in range(3)], tmp_path / "mean")
    mean = mt.load(tmp_path / "mean").weights
    assert mean.keys() == models[2].weights.keys()
    for name, weight in mean.items():
        expected = sum(model.weights[name].astype(np.float64) for model in models) / 3
        np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-7)


def test_a_model_saved_for_transformers_has_them_merged(tmp_path):
    model = adapted("decoder only, llama", dtype=np.float32, gated=True, d_ff=12, context_length=64)
    model.save_hugging_face(tmp_path / "merged")
    assert lora.adapted_layers(model.weights)  # it keeps its own
    assert_same_bits(mt.load(tmp_path / "merged").logits(None, np.array([[3, 4, 5]])), model.logits(None, np.array([[3, 4, 5]])))


def test_streams_take_adapters_that_a_caller_gives():
    """Weights by name, as a trainer and the kit for authors of memories hand them in."""
    model = adapted("gated")
    given = Stream(tiny_model("gated"), None, 1, weights=model.weights)
    own = Stream(model, None, 1)
    for stream in (given, own):
        stream.open(np.array([[3, 4]]), np.array([2]))
    assert_same_bits(given.encoded.hidden, own.encoded.hidden)


# ------------------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    "targets, layers",
    [
        (None, ["encoder.0.attention.q", "encoder.0.attention.v", "decoder.0.attention.q", "decoder.0.attention.v", "decoder.0.cross.q",
                "decoder.0.cross.v"]),
        (("cross.k",), ["decoder.0.cross.k"]),
        (["out", "encoder.0.attention.o"], ["encoder.0.attention.o", "encoder.0.feed_forward.out", "decoder.0.feed_forward.out"]),
        (r"decoder\.\d+\.(attention|cross)\.[kv]", ["decoder.0.attention.k", "decoder.0.attention.v", "decoder.0.cross.k",
                                                    "decoder.0.cross.v"]),
    ],
)  # fmt: skip
def test_targets_are_ends_of_names_or_a_pattern(targets, layers):
    model = tiny_model(n_encoder_layers=1, n_decoder_layers=1)
    model.add_lora(2, targets=targets)
    assert sorted(lora.adapted_layers(model.weights)) == sorted(layers)


def test_all_linear_layers_are_those_of_attention_and_feed_forward_networks():
    model = tiny_model("bert")
    model.add_lora(2, targets="all-linear")
    parts = {layer.partition(".")[2].partition(".")[2] for layer in lora.adapted_layers(model.weights)}
    assert parts == {"attention.q", "attention.k", "attention.v", "attention.o", "feed_forward.in", "feed_forward.out"}


@pytest.mark.parametrize(
    "options, error, fault",
    [
        ({"rank": 0}, InvalidValue, "rank: expected an integer from 1 to 65536, got 0"),
        ({"rank": 1 << 16, "alpha": 0}, InvalidValue, "alpha: expected a number above 0"),
        ({"rank": 10**5000}, InvalidValue, "rank: .* got an integer of thousands of digits"),
        ({"rank": 2.0}, InvalidType, "rank: expected an integer from 1 to 65536, got 2.0"),
        ({"rank": True}, InvalidType, "rank: .* got True"),
        ({"alpha": float("nan")}, InvalidValue, "alpha: expected a number above 0, at most 1e30, got nan"),
        ({"alpha": "16"}, InvalidType, "alpha: expected a number above 0, got '16'"),
        ({"seed": -1}, InvalidValue, "seed: expected an integer of at least 0"),
        ({"targets": ("q", "q_proj", "lm_head")}, InvalidValue, "targets: 'q_proj', 'lm_head' fits no layer .* end in q, k, v, o, in, out"),
        ({"targets": ("embedding",)}, InvalidValue, "targets: 'embedding' fits no layer"),
        ({"targets": "q"}, InvalidValue, r"targets: 'q' fits no layer .*; a text is a pattern .* give a tuple: \('q',\)$"),
        ({"targets": "(q"}, InvalidValue, r"targets: '\(q' is no regular expression: "),
        ({"targets": ()}, InvalidType, "targets: expected ends of layers' names, .* got "),
        ({"targets": 3}, InvalidType, "targets: expected ends of layers' names, .* got 3"),
    ],
)
def test_bad_arguments_change_nothing(options, error, fault):
    model = tiny_model()
    names = set(model.weights)
    with pytest.raises(error, match=fault):
        model.add_lora(**options)
    assert set(model.weights) == names


def test_adapters_larger_than_the_machine_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(lora, "ram_bytes", lambda: 1 << 20)
    model = tiny_model()
    with pytest.raises(InvalidValue, match=r"rank: adapters of rank 65536 take .* bytes, more than this machine's RAM"):
        model.add_lora(1 << 16)
    assert not lora.adapted_layers(model.weights)


def test_a_merge_that_is_interrupted_leaves_the_same_sums():
    """After the first step, and after each adapter that is taken away."""
    expected = outputs(adapted("gated", dtype=np.float32))

    class Interrupted(dict):
        def __delitem__(self, name):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            super().__delitem__(name)

    for left in range(0, 70, 7):
        model = adapted("gated", dtype=np.float32)
        model.weights = Interrupted(model.weights)
        model.weights.left = left
        try:
            model.merge_lora()
        except KeyboardInterrupt:
            assert any(name.startswith("lora.") for name in model.weights)
        assert_same_bits(outputs(model), expected)


def test_a_model_has_one_set_of_adapters(tmp_path):
    model = adapted()
    for call in (model.add_lora, lambda: model.load_lora(tmp_path)):
        with pytest.raises(InvalidValue, match=r"model: has adapters already, beside 32 layers; merge_lora\(\)"):
            call()
    model.merge_lora()
    model.merge_lora()  # nothing is left to merge
    model.add_lora()
    assert len(lora.adapted_layers(model.weights)) == 12
