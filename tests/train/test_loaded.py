"""Training what was loaded: published layouts, mapped and read-only weights, weights that are frozen."""

import hashlib

import numpy as np
import pytest
from helpers import assert_same_bits
from variants import assert_gradients, tiny_model, tokens

import mini_tfm as mt
from mini_tfm.autodiff import Var
from mini_tfm.config import Config
from mini_tfm.data import NextSegment, Pairs
from mini_tfm.data.batches import Batch, fields
from mini_tfm.errors import InvalidValue
from mini_tfm.stream import Stream
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.train import Trainer
from mini_tfm.train.average import average_models
from mini_tfm.train.loop import check_data
from mini_tfm.train.parallel import Alone
from mini_tfm.transformer import Transformer

SIZES = {"vocab_size": 40, "d_model": 16, "n_heads": 2, "d_ff": 24, "n_encoder_layers": 1, "n_decoder_layers": 1}
LLAMA = {"n_encoder_layers": 0, "n_kv_heads": 1, "gated": True, "activation": "silu", "norm": "rms", "bias": False, "positions": "rotary",
         "embedding_scale": False, "tie_embeddings": False, "context_length": 64, "norm_eps": 1e-6}  # fmt: skip
PUBLISHED = {
    "t5": {"attention_scale": 1.0, "norm": "rms", "norm_eps": 1e-6, "bias": False, "positions": "relative", "embedding_scale": False,
           "output_scale": 0.25, "bos_id": 0, "eos_id": 1},
    "marian": {"norm_position": "post", "sinusoids": "halves", "activation": "silu", "output_bias": True, "context_length": 64},
    "llama": LLAMA,
    "gpt2": {"n_encoder_layers": 0, "positions": "learned", "max_positions": 64, "activation": "gelu_tanh", "embedding_scale": False,
             "pad_id": 2, "bos_id": 2},
}  # fmt: skip


def published(folder, family, seed=3):
    Transformer(Config(**{**SIZES, **PUBLISHED[family]}), seed=seed).save_hugging_face(folder)
    return folder


def data_of(config):
    rng = np.random.default_rng(0)
    ids = {"eos_id": config.eos_id, "pad_id": config.pad_id, "has_encoder": config.has_encoder}
    if config.has_encoder:
        return Pairs([(tokens(rng, 4, vocab_size=40), tokens(rng, n, vocab_size=40)) for n in (3, 5, 4, 6)], batch_size=4, **ids)
    return NextSegment([tokens(rng, 22, vocab_size=40), tokens(rng, 9, vocab_size=40)], segment_length=5, n_segments=2, batch_size=2,
                       bos_id=config.bos_id, **ids)  # fmt: skip


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def copied(model):
    """The same model with weights of its own, which lie as NumPy makes them."""
    return Transformer(model.config, weights={name: np.array(weight, order="C") for name, weight in model.weights.items()})


@pytest.mark.parametrize("trainable", [None, ("*.q.*", "*norm*")])
@pytest.mark.parametrize("family", PUBLISHED)
def test_a_loaded_model_is_trained_as_its_copy_in_ram(family, trainable, tmp_path):
    """Mapped weights may not be written to, and linear layers lie the other way round; saved, resumed, and saved as published."""
    folder = published(tmp_path / "published", family)
    loaded = mt.load(folder)
    assert not any(weight.flags.writeable for weight in loaded.weights.values())
    before, data = digest(folder), data_of(loaded.config)
    other = Trainer(copied(loaded), learning_rate=1e-2, trainable=trainable)
    trainer = Trainer(loaded, learning_rate=1e-2, trainable=trainable)
    options = {"progress": False, "validation": data, "validation_batches": 1, "validate_every": 2}
    other.fit(data, 6, **options)
    trainer.fit(data, 4, folder=tmp_path / "run", **options)
    trainer = Trainer.resume(tmp_path / "run")
    trainer.fit(data, 6, **options)
    assert (trainer.losses, trainer.validations) == (other.losses, other.validations)
    assert digest(folder) == before
    trainer.model.save_hugging_face(tmp_path / "again")
    again = mt.load(tmp_path / "again")
    assert again.config == mt.load(folder).config
    for name, weight in again.weights.items():
        assert_same_bits(np.array(weight, order="C"), np.array(other.model.weights[name], order="C"))


@pytest.mark.filterwarnings("ignore")  # PyTorch's own
@pytest.mark.parametrize("family", PUBLISHED)
def test_losses_are_those_of_transformers(family, tmp_path):
    """Twenty steps of AdamW from one folder, on texts and pairs; Transformers never trains the bias of Marian's output."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = published(tmp_path / "published", family)
    names = {"t5": "T5ForConditionalGeneration", "marian": "MarianMTModel", "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
    theirs, ours = getattr(transformers, names[family]).from_pretrained(folder).eval(), mt.load(folder)
    if family == "marian":
        for stack in (theirs.model.encoder, theirs.model.decoder):
            stack.embed_positions.weight.requires_grad_(False)  # sinusoids, which Transformers 5 trains once they are loaded
    rate = {"betas": (0.9, 0.98), "eps": 1e-9, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, **rate)
    trainer = Trainer(ours, learning_rate=1e-3, schedule="constant", clip=None, trainable="[!o]*" if family == "marian" else None, **rate)
    rng = np.random.default_rng(0)
    target, losses = tokens(rng, 4, 9, vocab_size=40), []
    source = tokens(rng, 4, 7, vocab_size=40) if ours.config.has_encoder else None
    for _ in range(20):
        loss = theirs(input_ids=torch.tensor(target if source is None else source), labels=torch.tensor(target)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        trainer.step(source, target)
    np.testing.assert_allclose(trainer.losses, losses, rtol=3e-6)


def test_models_of_a_published_layout_are_averaged(tmp_path):
    """The first of them was written into, and its weights are a file, mapped."""
    folders = [published(tmp_path / name, "llama", seed) for seed, name in enumerate("ab")]
    average_models(folders, tmp_path / "out")
    one, two, mean = (mt.load(folder).weights for folder in (*folders, tmp_path / "out"))
    for name, weight in mean.items():
        np.testing.assert_allclose(weight, (one[name].astype(np.float64) + two[name]) / 2, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------- texts before which no bos stands


def framed(**changes):
    return Config(**{**SIZES, **LLAMA, "vocab_size": ByteTokenizer.vocab_size, "framed_by_tokenizer": True, **changes})


def test_the_loss_of_a_text_is_its_score():
    """A first token that nobody predicts when a text is read is predicted by nobody in training."""
    text, model = "what is trained on is what is read", Transformer(framed(), seed=1)
    scored = mt.Pipeline(model, ByteTokenizer(), segment_length=64).score(text)
    ids = ByteTokenizer().encode(text)
    batch = Batch(None, ids[None, None])
    trainer = Trainer(model)
    assert trainer.weight_of(batch) == scored["tokens"] == len(ids) - 1
    np.testing.assert_allclose(trainer.evaluate(batch) / np.log(2), scored["bits_per_token"], rtol=1e-6)
    trainer.step(*fields(batch))
    assert trainer.tokens_seen == len(ids) - 1


def test_documents_in_one_row_begin_with_a_given_token_each():
    """Rows, segments and weights: the mean over documents read alone."""
    model, rng = Transformer(framed(vocab_size=40), seed=1), np.random.default_rng(0)
    a, b, c = (tokens(rng, n, vocab_size=40) for n in (6, 4, 3))
    target = np.zeros((2, 3, 4), np.int64)
    target[0, 0], target[0, 1, :2], target[0, 2] = a[:4], a[4:], b
    target[1, 1, :3] = c  # this row waits for a segment
    lengths, begins = np.array([[4, 2, 4], [0, 3, 0]]), np.array([[True, False, True], [False, True, False]])
    weights = rng.random(target.shape).astype(np.float32)
    trainer = Trainer(model)
    total, weighed = 0.0, 0.0
    for ids, own in ((a, [*weights[0, 0], *weights[0, 1, :2]]), (b, weights[0, 2]), (c, weights[1, 1, :3])):
        stream = Stream(model, None, 1)
        rest = stream.begin(ids[None])
        start = 0
        for n in (3, 2) if ids is a else (len(rest[0]),):
            part, at = rest[:, start : start + n], np.arange(n)
            stream.open(None, np.array([n]), part)
            log_probs = stream.log_probs(stream.decode(part, np.array([n])))[0]
            total -= float(log_probs[at, part[0]] @ np.array(own[1 + start : 1 + start + n]))
            stream.finish()
            start += n
        weighed += float(np.sum(own[1:]))
    batch = Batch(None, target, None, lengths, weights, begins)
    np.testing.assert_allclose(trainer.evaluate(batch), total / weighed, rtol=1e-5)


# ------------------------------------------------------------------------- weights that are frozen


def stream_of(config, n=3):
    rng = np.random.default_rng(2)
    source = tokens(rng, 2, n, 4) if config.has_encoder else None
    return Batch(source, tokens(rng, 2, n, 4))


@pytest.mark.parametrize("variant", ["pre norm", "t5", "marian", "decoder only, qwen", "decoder only, gemma"])
@pytest.mark.parametrize("memory", ["recurrent:tokens=2", "store:top_k=2,merge=gate,gradient=none"])
def test_memories_alone_are_trained_beside_a_frozen_model(variant, memory):
    """Their gradients are those of training all; nothing else has a gradient, a moment or a new value."""
    if memory.startswith("store") and variant.startswith("decoder"):
        memory = memory.replace("gradient", "site=decoder,gradient")
    trainers = []
    for trainable in (None, "memory.*"):
        trainers.append(Trainer(tiny_model(variant), mt.memory(memory), trainable=trainable, learning_rate=1e-2, weight_decay=0.1))
    everything, alone = trainers
    before = {name: weight.copy() for name, weight in alone.model.weights.items()}
    assert list(alone.optimizer.weights) and all(name.startswith("memory.") for name in alone.optimizer.weights)
    size = sum(before[name].size for name in alone.optimizer.weights)
    assert alone.optimizer.arena.size == alone.optimizer.grad.size == alone.optimizer.m.size == alone.optimizer.v.size == size
    batch = stream_of(alone.model.config)
    assert everything.step(*fields(batch)) == alone.step(*fields(batch))
    for name, grad in alone.optimizer.grads.items():
        np.testing.assert_allclose(grad, everything.optimizer.grads[name], rtol=1e-9, atol=1e-15)
    assert any(np.abs(grad).max() > 0 for grad in alone.optimizer.grads.values())
    for name, weight in alone.model.weights.items():
        assert (name in alone.optimizer.weights) or weight.tobytes() == before[name].tobytes(), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "trainable", ["memory.*", "decoder.*.q.*", "decoder.0.attention.k.bias", ("encoder.*", "embedding.weight"), "*_norm.*"]
)
def test_gradients_of_a_part_equal_differences(trainable, recompute):
    trainer = Trainer(tiny_model("gated"), mt.memory("recurrent:tokens=2"), trainable=trainable, recompute=recompute)
    batch = trainer._batch(*fields(stream_of(trainer.model.config)))
    trainer.optimizer.zero_grad()
    trainer._backward(batch, trainer._dropout())
    model = trainer.model

    def loss(weights):
        return Trainer(Transformer(model.config, dtype=np.float64, weights={**model.weights, **weights}), trainer.memory).evaluate(batch)

    assert_gradients(loss, {name: w.copy() for name, w in trainer.optimizer.weights.items()}, trainer.optimizer.grads)


def test_a_frozen_weight_is_never_part_of_a_graph(monkeypatch):
    """No product computes a gradient that nobody asked for: below the lowest weight that is trained, nothing is recorded."""
    trainer = Trainer(tiny_model("decoder only"), trainable=("decoder.1.feed_forward.out.*",))
    made, new = [], Var.__init__
    monkeypatch.setattr(Var, "__init__", lambda self, *given: made.append(1) or new(self, *given))
    from mini_tfm import autodiff

    recorded, record = [], autodiff._new
    monkeypatch.setattr(autodiff, "_new", lambda value, *given: recorded.append(1) or record(value, *given))
    trainer.step(None, tokens(np.random.default_rng(0), 2, 5))
    assert len(made) == 2  # the matrix and its bias
    assert 0 < len(recorded) < 10


def test_a_part_of_the_loss_may_have_no_weight_that_is_trained():
    """The gate of an empty store: the first segment's loss is plain."""
    trainer = Trainer(tiny_model("pre norm"), mt.memory("store:top_k=2,merge=gate,gradient=none"), trainable="memory.*")
    trainer.step(*fields(stream_of(trainer.model.config, 1)))
    assert trainer.losses == [trainer.losses[0]] and not trainer.optimizer.grad.any()


def test_a_run_of_a_part_is_saved_and_resumed(tmp_path):
    def made():
        return Trainer(tiny_model("pre norm", dtype=np.float32), mt.memory("recurrent:tokens=2"), trainable=["memory.*", "*.q.*"],
                       learning_rate=1e-2, dropout=0.1)  # fmt: skip

    batch = stream_of(tiny_model("pre norm").config)
    whole, first = made(), made()
    for _ in range(4):
        whole.step(*fields(batch))
    first.step(*fields(batch))
    first.step(*fields(batch))
    first.save(tmp_path / "run")
    again = Trainer.resume(tmp_path / "run")
    assert again.options.trainable == ("memory.*", "*.q.*")
    for _ in range(2):
        again.step(*fields(batch))
    assert again.losses == whole.losses
    for name, weight in whole.model.weights.items():
        assert_same_bits(again.model.weights[name], weight)


class Rank(Alone):
    """One of two, which sends what it shares, or receives what another one has sent."""

    size = 2

    def __init__(self, sent):
        self.sent, self.at = sent, 0
        self.rank = 1 if sent else 0

    def share(self, array):
        if self.rank:
            array[...] = self.sent[self.at]
            self.at += 1
        else:
            self.sent.append(np.array(array))


def test_frozen_weights_become_those_of_rank_0(tmp_path):
    """Mapped ones, too, of another file; what is the same already stays where it is."""
    sent, trainers = [], []
    for seed in (3, 3, 4):
        model = mt.load(published(tmp_path / f"{len(trainers)}", "llama", seed))
        trainer = Trainer(model, trainable="*.q.*", communicator=Rank(sent))
        check_data(trainer, data_of(model.config), False)
        trainers.append(trainer.model.weights)
    first, same, other = trainers
    for name, weight in first.items():
        np.testing.assert_array_equal(other[name], weight)
        assert name.endswith(".q.weight") or not same[name].flags.writeable


def test_patterns_that_fit_no_weight_are_refused():
    with pytest.raises(InvalidValue, match=r"trainable: .*'lora\.\*', 'Q'.* fits none; names are embedding.weight"):
        Trainer(tiny_model(), trainable=["lora.*", "Q", "*.q.*"])
    for wrong in ("", [], [1], 3):
        with pytest.raises(InvalidValue, match="trainable: expected a name"):
            Trainer(tiny_model(), trainable=wrong)


def test_what_is_trained_is_chosen_when_a_trainer_is_made():
    """Its optimizer has moments of these weights alone: other patterns would be ignored."""
    trainer = Trainer(tiny_model(), trainable="*.q.*")
    trainer.options = trainer.options.replace(trainable=None)
    with pytest.raises(InvalidValue, match=r"trainable: .*make a new Trainer"):
        trainer.step(*fields(stream_of(trainer.model.config)))
    assert trainer.step_count == 0
