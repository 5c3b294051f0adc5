"""What narrower weights, and a narrower cache, cost on trained models: the float32 model and the narrower one see the same tokens, and
what each would say next is compared. The text is Python's own documentation."""

import functools
import pydoc_data.topics

import numpy as np

from . import characters, files, inference

MODELS = ["SmolLM2-135M", "en-pt", "characters", "all-MiniLM-L6-v2"]
KEYS = {"SmolLM2-135M": "smollm2"}  # by which inference.py calls them, where it does so otherwise
DTYPES = ["bfloat16", "int8"]
TRAINED_FOR = 600  # steps, of characters.py


@functools.cache
def character_model():
    """The folder of a character model that was trained here, for half a minute."""
    path = files.FOLDER / f"characters-{TRAINED_FOR}"
    if not path.exists():
        train, _, vocabulary = characters.corpus()
        trainer = characters.trainer(vocabulary, TRAINED_FOR)
        for target in characters.batches(train, TRAINED_FOR):
            trainer.step(None, target)
        with files.made(path) as part:
            trainer.model.save(part)
    return path


def samples(name):
    """Pairs of (source or None, target), arrays (B, S) and (B, T) of tokens without padding, and the bytes of all targets' text."""
    if name == "characters":
        held_out = characters.corpus()[1]
        target = held_out[: 64 * 128].reshape(64, 128)
        return [(None, target)], target.size
    if name == "en-pt":
        pipe, found, n_bytes = inference.our_pipeline(name, "float32"), [], 0
        for text in files.sentences(96, longest=240):
            source = pipe.tokenizer.encode_alone(text, 1000)[None]
            made = pipe.model.generate(source, max_new_tokens=200)
            found.append((source, np.array([[*made[0], pipe.model.config.eos_id]])))
            n_bytes += len(pipe.tokenizer.decode(made[0]).encode())
        return found, n_bytes
    pipe, length = inference.our_pipeline("smollm2", "float32"), 512
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    ids = np.asarray(pipe.tokenizer.encode(text[100_000:120_000]))
    rows = ids[: len(ids) // length * length].reshape(-1, 1, length)[:6]
    return [(None, row) for row in rows], sum(len(pipe.tokenizer.decode(row[0]).encode()) for row in rows)


@functools.cache
def compared(name, dtype):
    """{"equal": share of greedy tokens, "bits": per byte of float32, "narrow": of the narrower}; of an embedder {"cosine": the least}."""
    if name == "all-MiniLM-L6-v2":
        texts = files.sentences(256)
        wide, narrow = (inference.our_pipeline("minilm", each).embed(texts) for each in ("float32", dtype))
        return {"cosine": inference.least_cosine(wide, narrow)}
    return between(name, *(inference.ours(KEYS.get(name, name), each) for each in ("float32", dtype)))


def between(name, wide, narrow):
    """As `compared`, of two models of that name."""
    pairs, n_bytes = samples(name)
    equal, count, nats = 0, 0, np.zeros(2)
    for source, target in pairs:
        scores = [model.logits(source, target) for model in (wide, narrow)]
        equal += int(np.sum(scores[0].argmax(-1) == scores[1].argmax(-1)))
        count += target.size
        nats += [float(np.sum(surprise(each, target))) for each in scores]
    wide_bits, narrow_bits = nats / np.log(2) / n_bytes
    return {"equal": equal / count, "bits": float(wide_bits), "narrow": float(narrow_bits)}


CACHES = ["float32", "bfloat16", "int8"]


def held_out_tokens(name, n):
    """n tokens of text for a decoder-only model."""
    if name == "characters":
        return characters.corpus()[1][:n]
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    return np.asarray(inference.our_pipeline("smollm2", "float32").tokenizer.encode(text[100_000 : 100_000 + 10 * n]))[:n]


PIECE = 100  # tokens at a step: as their keys are read from the cache, the scores are those of one at a step, and sooner there


@functools.cache
def read_through(name, n, cache_dtype):
    """(ids, nats) (n,) of a float32 model that is fed n tokens: the likeliest after each, and the surprise at each."""
    from mini_tfm.generate import Session
    from mini_tfm.stream import Stream

    model = inference.ours(KEYS.get(name, name), "float32")
    stream, tokens = Stream(model, None, 1), held_out_tokens(name, n)[None]
    stream.open(None, np.full(1, n))
    try:
        session, inputs = Session(stream, cache_dtype=cache_dtype), stream.shifted(tokens)
    except TypeError as error:
        raise NotImplementedError(f"cache_dtype: {error}") from None
    ids, nats = [], []
    for i in range(0, n, PIECE):
        scores = session.scores(session.outputs(inputs[:, i : i + PIECE], min(PIECE, n - i))[0])
        ids.append(scores.argmax(-1))
        nats.append(surprise(scores, tokens[0, i : i + PIECE]))
    return np.concatenate(ids), np.concatenate(nats)


def compared_caches(name, n, cache_dtype):
    """{"equal": share of greedy tokens that are those of a float32 cache, "more": share of bits that a token takes more than with one}."""
    (wide, wide_nats), (narrow, narrow_nats) = (read_through(name, n, each) for each in ("float32", cache_dtype))
    return {"equal": float(np.mean(wide == narrow)), "more": float(narrow_nats.sum() / wide_nats.sum() - 1)}


def surprise(scores, target):
    """-log of the probability of each target token, in nats."""
    most = scores.max(-1, keepdims=True)
    sums = np.log(np.sum(np.exp(scores - most, dtype=np.float64), -1)) + most[..., 0]
    return sums - np.take_along_axis(scores, target[..., None], -1)[..., 0]


class Narrower:
    """By commit."""

    params = (["characters"], DTYPES)
    param_names = ["model", "dtype"]
    timeout = 300

    def track_greedy_tokens_equal(self, name, dtype):
        return 100 * compared(name, dtype)["equal"]

    track_greedy_tokens_equal.unit = "% of tokens"

    def track_bits(self, name, dtype):
        return compared(name, dtype)["narrow"]

    track_bits.unit = "bits per byte"


class NarrowerCache:
    """By commit."""

    params = (["characters"], [512], CACHES[1:])
    param_names = ["model", "tokens", "cache_dtype"]
    timeout = 300

    def track_greedy_tokens_equal(self, name, n, dtype):
        return 100 * compared_caches(name, n, dtype)["equal"]

    track_greedy_tokens_equal.unit = "% of tokens"

    def track_bits(self, name, n, dtype):
        return float(read_through(name, n, dtype)[1].mean() / np.log(2))

    track_bits.unit = "bits per token"
