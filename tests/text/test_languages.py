"""Languages of models that translate between many: a text says which it is in, and the translation begins with its own."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import mini_tfm as mt
from mini_tfm.cli import main
from mini_tfm.errors import InvalidValue
from mini_tfm.generate import GenerationOptions
from mini_tfm.text.languages import CODES, in_languages, languages_of
from mini_tfm.text.tokenizers import ByteTokenizer, load_tokenizer

VOCABULARIES = json.loads(Path(__file__).with_name("vocabularies.json").read_text())


def pipe_of(name, folder, generation=None):
    """A small model with the tokenizer of a golden."""
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(VOCABULARIES[name]["about"]))
    for file, content in VOCABULARIES[name]["files"].items():
        (folder / file).write_bytes(base64.b64decode(content))
    tokenizer = load_tokenizer(folder)
    config = mt.Config(
        vocab_size=tokenizer.vocab_size, d_model=16, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, pad_id=1, bos_id=2, eos_id=2,
        framed_by_tokenizer=True,
    )  # fmt: skip
    model = mt.Transformer(config, seed=3, generation=generation)
    for name in model.weights:  # so that each token of the source matters
        model.weights[name] *= 3
    return mt.Pipeline(model, tokenizer)


@pytest.mark.parametrize(
    "name, source, target",
    [("m2m100", "zh", "en"), ("nllb", "zul_Latn", "fra_Latn"), ("mbart50", "ar_AR", "en_XX"), ("nllb-legacy", "eng_Latn", "zul_Latn")],
)  # fmt: skip
def test_a_text_is_in_its_language_and_its_translation_begins_with_the_other(name, source, target, tmp_path):
    pipe = pipe_of(name, tmp_path / "m", {"forced_bos_token_id": 5})
    known = languages_of(pipe.tokenizer.special_tokens)
    own = VOCABULARIES[name]["about"].get("src_lang", "eng_Latn")
    ids = [known[source] if i == known[own] else i for i in pipe.tokenizer.encode_alone("the cat", 99).tolist()]
    assert ids.count(known[source]) == 1 and ids.count(2) == 1
    expected = pipe.model.generate(np.array([ids]), forced_bos_token_id=known[target], max_new_tokens=6)[0]
    assert expected[0] == known[target]
    told = {"src_lang": source, "tgt_lang": target, "max_new_tokens": 6}
    assert pipe.generate("the cat", **told) == pipe.tokenizer.decode(expected)
    assert "".join(pipe.generate("the cat", stream=True, **told)) == pipe.tokenizer.decode(expected)
    assert pipe.generate_many(["the cat", "a dog"], **told) == [pipe.generate(text, **told) for text in ("the cat", "a dog")]
    others = {pipe.generate("the cat", **{**told, name: None}) for name in ("src_lang", "tgt_lang")}
    assert len({*others, pipe.generate("the cat", **told)}) == 3, "each of the languages matters"


@pytest.mark.parametrize("name, language", [("nllb", "fra_Latn"), ("mbart50", None), ("pegasus", None)])
def test_choices_have_no_frame_but_the_language_that_comes_first(name, language, tmp_path):
    pipe, texts = pipe_of(name, tmp_path / "m"), ["cat", "cat dog", "dog"]
    first = [] if language is None else [languages_of(pipe.tokenizer.special_tokens)[language]]
    said = {"tgt_lang": language, "num_beams": 6, "num_return_sequences": 3, "length_penalty": 0.0}
    source = pipe.tokenizer.encode_alone("a text", 100)[None]
    score = lambda text: pipe.model.score_targets(source, [[*first, *pipe.tokenizer.encode(text), 2]]).sum()  # noqa: E731
    assert pipe.generate("a text", choices=texts, **said) == sorted(texts, key=score, reverse=True)
    ids = [[*first, *pipe.tokenizer.encode(text).tolist()] for text in texts]
    assert pipe.generate("a text", choices=ids, **said) == sorted(texts, key=score, reverse=True)


def test_a_marian_models_language_stands_before_the_source():
    special = {0: "</s>", 7: ">>fra<<", 8: ">>cmn_Hans<<", 9: ">>zle<<"}
    ids, first = in_languages(np.array([3, 4, 0]), special, None, "cmn_Hans")
    assert (ids.tolist(), first) == ([8, 3, 4, 0], None)
    with pytest.raises(InvalidValue, match="src_lang: this model's tokenizer puts no language beside a text, got 'fra'"):
        in_languages(np.array([3, 4, 0]), special, "fra", None)


def test_all_codes_are_found_by_their_names():
    for kind, codes in CODES.items():
        names = [f"__{code}__" if kind in ("m2m100", "wmt21") else code for code in codes]
        assert list(languages_of(dict(enumerate(names)))) == codes
    assert languages_of({0: "<s>", 1: "[MASK]", 2: "<|im_start|>", 3: "__ENTITY__"}) == {}


def test_what_cannot_be_is_said(tmp_path):
    pipe = pipe_of("wmt21", tmp_path / "m")
    with pytest.raises(InvalidValue, match="tgt_lang: expected one of cs, de, en, ha, is, ja, ru, zh; got 'fr'"):
        pipe.generate("a", tgt_lang="fr")
    with pytest.raises(InvalidValue, match="src_lang: texts need a tokenizer"):
        pipe.model.generate(np.array([[3, 4]]), src_lang="en")
    with pytest.raises(InvalidValue, match="forced_bos_token_id: expected None beside tgt_lang, got 3"):
        GenerationOptions(tgt_lang="en", forced_bos_token_id=3)
    model = mt.Transformer(mt.Config(vocab_size=259, d_model=16, n_heads=2, n_encoder_layers=1, n_decoder_layers=1))
    with pytest.raises(InvalidValue, match="src_lang: this model's tokenizer has no languages"):
        mt.Pipeline(model, ByteTokenizer()).generate("a", src_lang="en")


def test_the_command_line_takes_languages(tmp_path):
    pipe = pipe_of("m2m100", tmp_path / "m")
    pipe.save(tmp_path / "saved")
    words = ["generate", str(tmp_path / "saved"), "the cat"]
    run = CliRunner().invoke(main, [*words, "--src-lang", "fr", "--tgt-lang", "en", "--max-new-tokens", "6"])
    expected = pipe.generate("the cat", tgt_lang="en", max_new_tokens=6)  # fr is the folder's own
    assert (run.exit_code, run.stdout.rstrip("\n")) == (0, expected)
    run = CliRunner().invoke(main, [*words, "--tgt-lang", "xx"])
    assert run.exit_code == 2 and "tgt_lang: expected one of af, am" in run.stderr
