"""A cache of prompts: answers are those without one, what is damaged or another model's is not used."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import in_a_process

import mini_tfm as mt
from mini_tfm.errors import FileProblem, InvalidValue
from mini_tfm.prompt_cache import PromptCache
from mini_tfm.text import ByteTokenizer

LLAMA = {"norm": "rms", "gated": True, "activation": "silu", "bias": False, "n_kv_heads": 2, "positions": "rotary"}
KINDS = {
    "llama": {**LLAMA, "framed_by_tokenizer": True},
    "learned positions": {"positions": "learned", "max_positions": 300},
    "segments": {"positions": "rotary", "segment_length": 64},
    "a window": {**LLAMA, "window": 9},
}
DOCUMENT = "A long document, which is read once. " * 4


def pipeline(kind="llama", pack=None, seed=1):
    tokenizer = ByteTokenizer()
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_heads": 4, "n_encoder_layers": 0, "n_decoder_layers": 2, "d_ff": 64}
    model = mt.Transformer(mt.Config(**sizes | KINDS[kind]), seed=seed)
    if pack is not None:
        model.pack(pack)
    return mt.Pipeline(model, tokenizer)


@pytest.fixture
def restored(monkeypatch):
    """How many tokens each call has restored."""
    found, restore = [], PromptCache.restore

    def noted(self, cache, tokens):
        found.append(restore(self, cache, tokens))
        return found[-1]

    monkeypatch.setattr(PromptCache, "restore", noted)
    return found


@pytest.mark.parametrize("pack", [None, "int8", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_without_a_cache(tmp_path, restored, kind, pack):
    for question in ("And?", "And?", "What is it?", "And? And then?", ""):
        pipe = pipeline(kind, pack)  # each as another process would
        text = DOCUMENT[:40] + question if kind == "segments" else DOCUMENT + question
        assert pipe.generate(text, max_new_tokens=12, prompt_cache=tmp_path) == pipe.generate(text, max_new_tokens=12)
    assert restored[0] == 0 and sum(n >= 39 for n in restored) == 4  # a second segment begins with nothing
    assert len(list(tmp_path.iterdir())) == 1  # questions about a document that is there are not kept


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "seed": 3, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 5},
        {"cache_dtype": "bfloat16"},
        {"cache_dtype": "int8"},
    ],
    ids=lambda options: " ".join(map(str, next(iter(options.items())))),
)
def test_every_search_finds_the_same(tmp_path, restored, options):
    pipe = pipeline()
    expected = pipe.generate(DOCUMENT, max_new_tokens=9, **options)
    for _ in range(2):
        assert pipe.generate(DOCUMENT, max_new_tokens=9, prompt_cache=tmp_path, **options) == expected
    assert restored[1] > 100


def test_keys_of_one_dtype_are_not_those_of_another(tmp_path, restored):
    pipe = pipeline()
    for dtype in (None, "bfloat16", "int8"):
        pipe.generate(DOCUMENT, max_new_tokens=1, prompt_cache=tmp_path, cache_dtype=dtype)
    assert restored == [0, 0, 0] and len(list(tmp_path.iterdir())) == 3


def test_another_model_has_its_own_files(tmp_path, restored):
    pipe, other = pipeline(), pipeline(seed=2)
    for each in (pipe, other, pipe):
        expected = each.generate(DOCUMENT, max_new_tokens=5)
        assert each.generate(DOCUMENT, max_new_tokens=5, prompt_cache=tmp_path) == expected
    pipe.model.weights["embedding.weight"][:] *= 1.5  # and so has one whose weights have changed
    assert pipe.generate(DOCUMENT, max_new_tokens=5, prompt_cache=tmp_path) == pipe.generate(DOCUMENT, max_new_tokens=5)
    assert restored[:2] == [0, 0] and restored[2] > 100 and restored[3] == 0


def test_a_file_under_another_models_name_is_not_used(tmp_path, restored):
    pipe, other = pipeline(), pipeline(seed=2)
    for each in (pipe, other):
        each.generate(DOCUMENT, max_new_tokens=1, prompt_cache=tmp_path / str(id(each)))
    mine, others = (next((tmp_path / str(id(each))).iterdir()) for each in (pipe, other))
    mine.write_bytes(others.read_bytes())
    expected = pipe.generate(DOCUMENT, max_new_tokens=5)
    with pytest.warns(UserWarning, match="is damaged and is not used; delete it"):
        assert pipe.generate(DOCUMENT, max_new_tokens=5, prompt_cache=mine.parent) == expected


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_file_is_never_used(tmp_path, restored, seed):
    pipe, rng = pipeline(), np.random.default_rng(seed)
    expected = pipe.generate(DOCUMENT, max_new_tokens=5, prompt_cache=tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if seed < 3:
        del data[[0, 5, len(data) // 2][seed] :]
    else:
        at = int(rng.integers(len(data) if seed % 2 else 2000))
        data[at] ^= int(rng.integers(1, 256))
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="is damaged"):
        assert pipe.generate(DOCUMENT, max_new_tokens=5, prompt_cache=tmp_path) == expected
    assert restored == [0, 0]
    pipe.generate(DOCUMENT, max_new_tokens=5, prompt_cache=tmp_path)  # it was written anew
    assert restored[2] > 100


def test_a_conversation_goes_on_where_it_was(tmp_path, restored):
    """What grows to twice as much is kept again, so all files together are no more than a few times the last."""
    pipe, text = pipeline(), ""
    for _ in range(9):
        text += "Some more. "
        assert pipe.generate(text, max_new_tokens=3, prompt_cache=tmp_path) == pipe.generate(text, max_new_tokens=3)
    assert restored[0] == 0 and restored[-1] >= len(text) // 2 - 1
    assert len(list(tmp_path.iterdir())) == 4  # of 1, 2, 4 and 8 turns


PROGRAM = """
import sys, mini_tfm as mt
from mini_tfm.prompt_cache import PromptCache
restore = PromptCache.restore
def noted(self, cache, tokens):
    n = restore(self, cache, tokens)
    print(n)
    return n
PromptCache.restore = noted
print(mt.Pipeline.load(sys.argv[1]).generate(sys.argv[3], max_new_tokens=9, prompt_cache=sys.argv[2]).encode())
"""


def test_other_processes_go_on_from_it_and_write_at_once(tmp_path):
    pipe = pipeline("a window", "int8")
    pipe.save(tmp_path / "model")
    expected = str(pipe.generate(DOCUMENT, max_new_tokens=9).encode())
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(tmp_path / "cache"), DOCUMENT]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].splitlines()[1] for process in both] == [expected] * 2
    n, text = in_a_process(PROGRAM, tmp_path / "model", tmp_path / "cache", DOCUMENT).stdout.splitlines()
    assert int(n) > 100 and text == expected


def test_what_has_no_such_cache_is_refused(tmp_path):
    pipe = pipeline("segments")
    with pytest.raises(InvalidValue, match="prompt_cache: expected None beside a memory"):
        mt.Pipeline(pipe.model, pipe.tokenizer, "window:size=8").generate("x", prompt_cache=tmp_path)
    sizes = {"vocab_size": 300, "d_model": 16, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1}
    with pytest.raises(InvalidValue, match="prompt_cache: expected None for this model"):
        mt.Pipeline(mt.Transformer(mt.Config(**sizes)), pipe.tokenizer).generate("x", prompt_cache=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem, match=r"prompt_cache: .*file cannot be made"):
        pipe.generate("x", prompt_cache=tmp_path / "file")
