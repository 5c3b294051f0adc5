"""Text: files, documents, tokenizers.

files.py        text files, whole or as a stream
documents.py    documents to train on, and a split into what is held out
pieces.py       long text in pieces, tokenized one at a time
limits.py       what a tokenizer.json may ask for; regexes.py: which regular expressions
shortlist.py    the tokens that a translation may have
tokenizers.py   text to token ids and back: bytes, or any tokenizer.json
"""

from .documents import in_parts, python_topics, split_documents
from .files import read_text, stream_text
from .tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Tokenizer",
    "in_parts",
    "load_tokenizer",
    "python_topics",
    "read_text",
    "split_documents",
    "stream_text",
    "train_bpe",
]
