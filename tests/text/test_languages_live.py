"""Translations between many languages are Transformers': its tokenizer, its source language, its forced first token. Needs `peers`."""

import pytest
from vocabularies import TIDY, model_of, theirs_of

import mini_tfm as mt
from mini_tfm.text.tokenizers import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # Transformers' and PyTorch's own


@pytest.mark.parametrize(
    "name, variant, source, target",
    [("m2m100", "m2m100", "zh", "en"), ("m2m100-unigram", "m2m100", None, "de"), ("nllb", "m2m100", "zul_Latn", "fra_Latn"),
     ("mbart50", "mbart", "ar_AR", "en_XX")],
)  # fmt: skip
def test_a_folder_translates_as_transformers_does(name, variant, source, target, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from peer_models import make

    model_of(name, tmp_path / "m")
    theirs = theirs_of(tmp_path / "m", name)
    size = load_tokenizer(tmp_path / "m").vocab_size
    model = make(variant, tmp_path / "m", vocab_size=size, max_position_embeddings=400)
    pipe = mt.Pipeline.load(tmp_path / "m")
    first = theirs.get_lang_id(target) if variant == "m2m100" and name != "nllb" else theirs.convert_tokens_to_ids(target)
    if source is not None:
        theirs.src_lang = source
    for text in TIDY[3:9]:
        asked = theirs(text, return_tensors="pt")
        made = model.generate(**asked, forced_bos_token_id=first, max_new_tokens=10, do_sample=False, num_beams=1)[0].tolist()
        assert made[1] == first
        told = {"src_lang": source, "tgt_lang": target, "max_new_tokens": 10}
        ids = made[1:-1] if made[-1] == pipe.model.config.eos_id else made[1:]
        assert pipe.generate(text, **told) == pipe.tokenizer.decode(ids), repr(text)
