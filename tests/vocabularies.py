"""Texts of every kind, and small SentencePiece models made of them: what the tests of vocabularies are about, and their goldens."""

import json
import random

import pytest

WORDS = "the a cat dog naïve café Straße 日本 語 привет мир 123 4567 don't it's e.g. x=y+1; 😀 👩‍👩‍👧 ½ ﬁ e\u0301 Ω NASA iPhone".split()  # noqa: SIM905
SPACES = [" ", "  ", "\n", "\t", "   ", "\u00a0", "\u3000", ""]


def texts(n=300):
    """Words and spaces of every kind, and what is no word at all."""
    draw = random.Random(5)
    made = ["", " ", "   ", "a", " a", "a ", "\n", "▁", "▁▁ a", "</s>", "<s> x", "[CLS] y", "<extra_id_0>", "\x00", "\ufffd", "a" * 200]
    for _ in range(n - len(made)):
        made.append("".join(draw.choice(WORDS) + draw.choice(SPACES) for _ in range(draw.randint(1, 12))))
    return made


CORPUS = [text for text in texts(600) if text.strip()] + ["The quick brown fox jumps over the lazy dog."] * 3
# No names of special tokens; and no "aaaa", whose cuts have the same probability but for rounding.
PLAIN = [text for text in texts() if not any(name in text for name in ("<", "[CLS]", "aaaa"))]


def write(folder, about, **files):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, newline="")
    return folder


def train(folder, name, **options):
    """A small SentencePiece model, saved as `name`, and its processor."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(text.replace("\n", " ") for text in CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "m"),
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 150, **options},
    )
    (folder / "m.model").rename(folder / name)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / name))


# Of which Transformers 5 has SentencePiece's pieces: it reads runs of spaces otherwise, and a character that is none.
TIDY = [text for text in dict.fromkeys(" ".join(text.split()) for text in PLAIN) if not any(odd in text for odd in "▁\x00\ufffd")]

# Name -> its files' about, the options of SentencePiece's trainer.
KINDS = {
    "m2m100": ({"tokenizer_class": "M2M100Tokenizer", "src_lang": "fr"}, {"model_type": "bpe", "vocab_size": 400}),
    "m2m100-unigram": ({"tokenizer_class": "M2M100Tokenizer"}, {}),
    "wmt21": ({"tokenizer_class": "M2M100Tokenizer", "language_codes": "wmt21", "src_lang": "de"}, {}),
    "nllb": ({"tokenizer_class": "NllbTokenizer"}, {"model_type": "bpe", "vocab_size": 400}),
    "nllb-legacy": ({"tokenizer_class": "NllbTokenizer", "src_lang": "zul_Latn", "legacy_behaviour": True},
                    {"model_type": "bpe", "vocab_size": 400}),
    "mbart50": ({"tokenizer_class": "MBart50Tokenizer", "src_lang": "sl_SI"}, {}),
    "pegasus": ({"tokenizer_class": "PegasusTokenizer"}, {"user_defined_symbols": ["<n>", "cat d"], "pad_id": 0, "eos_id": 1, "unk_id": 2,
                                                          "bos_id": -1}),
}  # fmt: skip


def model_of(name, folder, normal_form="identity"):
    """The folder's files, and SentencePiece's processor. A table of normal forms, "nmt_nfkc", has 240 kB."""
    about, options = KINDS[name]
    write(folder, about)
    file = "spiece.model" if name == "pegasus" else "sentencepiece.bpe.model"
    processor = train(folder, file, normalization_rule_name=normal_form, **options)
    if "M2M100" in about["tokenizer_class"]:
        pieces = [processor.id_to_piece(i) for i in range(3, processor.vocab_size())]
        vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *reversed(pieces), "Ж"])}
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    return processor


def theirs_of(folder, name):
    """Transformers' tokenizer of a folder. Version 5.24 gives NLLB's mask the first language's id, unless languages are named to it."""
    import transformers
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    kind = getattr(transformers, KINDS[name][0]["tokenizer_class"])
    is_nllb = kind.__name__ == "NllbTokenizer"
    more = {"extra_special_tokens": [*FAIRSEQ_LANGUAGE_CODES, "<mask>"], "mask_token": None} if is_nllb else {}
    return kind.from_pretrained(folder, **more)
