"""The tokenizers by the name that they had in 0.1.0; they live in `mini_tfm.text`."""

from .text.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = ["BPETokenizer", "ByteTokenizer", "Tokenizer", "load_tokenizer", "train_bpe"]
