"""Writes vocabularies.json: small SentencePiece models, and the ids of texts by SentencePiece and Transformers. Needs the extra `peers`.

python tests/text/make_vocabularies.py

The pieces of a text are SentencePiece's, for Transformers 5 reads runs of spaces otherwise; which ids they have, and what stands around
them, is Transformers'.
"""

import base64
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from vocabularies import KINDS, PLAIN, model_of, theirs_of

FILE = Path(__file__).with_name("vocabularies.json")
TEXTS = ["", " ", "a", "cat dog cat", "a<n>b", "the cat </s> x", "__en__ a", "eng_Latn", "<mask_1><unk_5>", "<unk> <pad>", *PLAIN[16:50]]


def framed(theirs, ids):
    whole, inside = theirs("a")["input_ids"], theirs("a", add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(inside)] == inside)
    return [*whole[:at], *ids, *whole[at + len(inside) :]]


def main():
    found = {}
    for name, (about, _) in KINDS.items():
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "m"
            processor = model_of(name, folder)
            theirs = theirs_of(folder, name)
            files = {
                path.name: base64.b64encode(path.read_bytes()).decode()
                for path in folder.iterdir() if path.name in ("vocab.json", "spiece.model", "sentencepiece.bpe.model")
            }  # fmt: skip
            texts = {text: framed(theirs, theirs.convert_tokens_to_ids(processor.encode(text, out_type=str))) for text in TEXTS}
            languages = {code: theirs.convert_tokens_to_ids(f"__{code}__" if "M2M100" in about["tokenizer_class"] else code)
                         for code in ("en", "zh", "eng_Latn", "zul_Latn", "ar_AR", "sl_SI")}  # fmt: skip
            unknown = theirs.unk_token_id
            found[name] = {
                "about": about, "files": files, "texts": texts, "size": len(theirs) + len(getattr(theirs, "lang_token_to_id", ())),
                "languages": {code: i for code, i in languages.items() if i != unknown},
            }  # fmt: skip
    FILE.write_text(json.dumps(found, separators=(",", ":"), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
