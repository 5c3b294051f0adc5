"""Text to token ids and back, behind one face.

    Tokenizer            what the rest of the library sees
      ByteTokenizer      one id a byte: nothing to train, nothing to install
      BPETokenizer       any `tokenizer.json`, run by the `tokenizers` package; `train_bpe` makes one

On disk, in the model's folder:

    tokenizer_config.json   {"tokenizer_class": "ByteTokenizer"} is all of a ByteTokenizer. For any other kind it is
                            optional and names the special tokens, with Hugging Face's keys.
    tokenizer.json          vocabulary and rules of a BPETokenizer; not read for a ByteTokenizer. Where it is missing they are made
                            of the vocabularies that came before it: see vocabularies.py.

`encode` adds no special token (`encode_alone` adds those of the file's post-processor), and the text "<eos>" is five
characters, never the end of a sequence: what a user writes cannot steer the model's control tokens.
"""

import codecs
import contextlib
import functools
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mini_tfm.errors import FileProblem, InvalidType, InvalidValue, MiniTfmError, shown
from mini_tfm.files.folders import write_folder
from mini_tfm.files.reading import as_path, read_bytes
from mini_tfm.files.strict_json import parse_json_strict

from .chat import chat_text
from .limits import check_rules
from .pieces import Spans, in_pieces, in_windows
from .vocabularies import byte_letters, tokenizer_files

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MAX_FILE_BYTES = 1 << 27
MAX_VOCAB_SIZE = 1 << 22

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2 in the tokenizers made here

# Role -> keys of tokenizer_config.json, then the usual names when the file has no such key. BERT's [CLS] and [SEP]
# open and close a sequence, which is what bos and eos mean here.
_ROLES = {
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "bos": (("bos_token", "cls_token"), ("<bos>", "<s>", "[CLS]", "<|endoftext|>")),
    "eos": (("eos_token", "sep_token"), ("<eos>", "</s>", "[SEP]", "<|endoftext|>")),
}


class StreamDecoder(Protocol):
    """Ids one at a time to text; the pieces joined are `decode` of all ids."""

    def push(self, token_id: int) -> str:
        """The characters that are complete now, possibly none."""

    def finish(self) -> str:
        """What is left; an unfinished character becomes U+FFFD. The decoder can then be used anew."""


class Tokenizer(ABC):
    """Ids are 0 to `vocab_size` - 1; `pad_id`, `bos_id`, `eos_id` are None where the vocabulary has no such token."""

    vocab_size: int
    pad_id: int | None
    bos_id: int | None
    eos_id: int | None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Text -> (T,) int64. Raises InvalidType, and InvalidValue at a lone surrogate, which no UTF-8 can hold."""

    def encode_pieces(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of texts that are one text cut anywhere, some at a time, in bounded RAM: joined, those of `encode`."""
        for piece in in_pieces(texts):
            yield self.encode(piece)

    def encode_alone(self, text: str, max_tokens: int) -> np.ndarray:
        """Text -> (T,) int64, at most `max_tokens`, as an encoder is trained to read one text: what is cut off is the text's end.

        The tokens that a file's post-processor puts around a text ([CLS] and [SEP], say) are there; a tokenizer of another kind
        has none. Raises what `encode` does, and InvalidValue where those alone are more than `max_tokens`.
        """
        return self.encode(text)[:max_tokens]

    def frame(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that `encode_alone` puts before and after a text: two arrays of ids, which may be empty."""
        text = "a"
        ids, whole = self.encode(text), self.encode_alone(text, 1 << 20)
        for start in range(len(whole) - len(ids) + 1):
            if np.array_equal(whole[start : start + len(ids)], ids):
                return whole[:start], whole[start + len(ids) :]
        return whole[:0], whole[:0]  # a post-processor that changes the text itself

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> np.ndarray:
        """Messages -> (T,) int64, as the chat template of the tokenizer lays them out; see `mini_tfm.text.chat`.

        The template's special tokens are special; in what the messages say, their names are plain characters. Raises InvalidValue
        where there is no template.
        """
        raise InvalidValue("chat: this tokenizer carries no chat template; use a model that was trained to chat, or `generate`")

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can lay out messages."""
        return False

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """The names of the tokens that are no text, by id."""
        return {}

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """(T,) ids -> text, without special tokens; bytes that are not UTF-8 become U+FFFD.

        Raises InvalidType, InvalidValue for ids that are not integers of the vocabulary.
        """

    @abstractmethod
    def decode_stream(self) -> StreamDecoder:
        """A new incremental decoder."""

    @abstractmethod
    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of text an id stands for, none for a special token. InvalidValue if ids are not made of bytes."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """File name -> content: what `save` writes, for a caller that saves a model in the same step."""

    def save(self, folder: str | os.PathLike) -> None:
        """Write `files()` into a folder, keeping everything else in it. Raises FileProblem."""
        write_folder(folder, self.files())

    def _check_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        try:
            array = np.asarray(ids)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidType(f"ids: expected one sequence of integers: {error}") from error
        if array.size == 0:
            array = array.astype(np.int64)  # an empty list is float64 to NumPy
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise InvalidType(f"ids: expected integers of shape (T,), got {array.dtype} of shape {array.shape}")
        wrong = np.flatnonzero((array < 0) | (array >= self.vocab_size))
        if wrong.size:
            raise InvalidValue(
                f"ids[{wrong[0]}]: expected 0 to {self.vocab_size - 1}, got {array[wrong[0]]}; "
                "is this the tokenizer the model was trained with?"
            )
        return array.astype(np.int64, copy=False)


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise InvalidType(f"text: expected a str, got {type(text).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidValue(
            f"text: character {error.start} is the lone surrogate {text[error.start]!a}; "
            "text.encode('utf-8', 'replace').decode() makes it a question mark"
        ) from error


class _ByteStream:
    """Exact for tokens that are bytes: a character is given once its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.bytes_of(token_id))

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class _TextStream:
    """For tokens whose text depends on the one before (a word's first piece, say): decode a short window twice.

    The window is the piece given last and the ids since; what the second adds to the first is new.
    """

    def __init__(self, tokenizer: "BPETokenizer") -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        self._waiting.append(int(self._tokenizer._check_ids([token_id])[0]))
        return self._new_text(is_last=False)

    def finish(self) -> str:
        text = self._new_text(is_last=True)
        self._given, self._waiting = [], []
        return text

    def _new_text(self, is_last: bool) -> str:
        window = self._given + self._waiting
        if not is_last and self._tokenizer._is_unfinished(window):
            return ""
        before, text = self._tokenizer.decode(self._given), self._tokenizer.decode(window)
        if len(text) <= len(before):
            return ""
        n = len(self._waiting)
        while n < len(window) and not self._tokenizer.decode(window[-n:]):  # a space at the beginning may be no text
            n *= 2
        self._given, self._waiting = window[-n:], []
        return text[len(before) :]


class _WholeStream:
    """For a decoder whose text may change with any later token: all of it at the end."""

    def __init__(self, tokenizer: "BPETokenizer") -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        self._ids.append(int(self._tokenizer._check_ids([token_id])[0]))
        return ""

    def finish(self) -> str:
        ids, self._ids = self._ids, []
        return self._tokenizer.decode(ids)


class ByteTokenizer(Tokenizer):
    """0 pad, 1 bos, 2 eos, then the 256 bytes of UTF-8: `decode(encode(text)) == text` for every text."""

    pad_id, bos_id, eos_id = range(3)
    vocab_size = 3 + 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int64) + 3

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = self._check_ids(ids)
        return (ids[ids >= 3] - 3).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def decode_stream(self) -> StreamDecoder:
        return _ByteStream(self)

    def bytes_of(self, token_id: int) -> bytes:
        (token_id,) = self._check_ids([token_id])
        return bytes([token_id - 3]) if token_id >= 3 else b""

    def files(self) -> dict[str, bytes]:
        return {CONFIG_FILE: b'{"tokenizer_class": "ByteTokenizer"}\n'}


class BPETokenizer(Tokenizer):
    """A `tokenizer.json` of any kind that the `tokenizers` package runs; byte-level BPE is what `train_bpe` makes.

    The file's padding, truncation and BPE dropout are switched off: an id sequence is a function of the text alone.
    Whether text round-trips exactly is up to the file (a normalizer may drop accents); with `train_bpe` it does.
    """

    def __init__(self, tokenizer_json: bytes, config_json: bytes | None = None, source: str = "") -> None:
        """Contents of the two files; `source` is the folder to name in errors. Raises InvalidValue."""
        self._files = {TOKENIZER_FILE: tokenizer_json}
        self._source = os.path.join(source, TOKENIZER_FILE)
        rules = parse_json_strict(tokenizer_json, self._source)
        config = {}
        if config_json is not None:
            self._files[CONFIG_FILE] = config_json
            config = parse_json_strict(config_json, os.path.join(source, CONFIG_FILE))
        rules |= {"truncation": None, "padding": None}
        if isinstance(rules.get("model"), dict) and "dropout" in rules["model"]:
            rules["model"]["dropout"] = None
        self._config, self._rules = config, rules
        self._speaking: Any = None  # an engine that knows special tokens by their names, once a chat needs it
        with self._attributed():
            self._at_once = check_rules(rules)
        self._engine = self._build(rules)
        with self._attributed():
            vocab = self._engine.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MAX_VOCAB_SIZE:
            raise InvalidValue(f"{self._source}: expected 1 to {MAX_VOCAB_SIZE} ids, found {self.vocab_size}")

        names = {role: self._role(role, config, vocab) for role in _ROLES}
        self.pad_id, self.bos_id, self.eos_id = (vocab.get(names[role]) for role in ("pad", "bos", "eos"))
        # A file may list "</s>" as an ordinary added token: the engine would then find it in a user's text.
        added = rules.get("added_tokens") or []
        if plain := [token for token in added if token["content"] in names.values() and not token["special"]]:
            for token in plain:
                token["special"] = True
            self._engine = self._build(rules)
        contents = {token["content"] for token in added if token["special"]} | set(names.values())
        # And their names.
        self._special_ids: dict[int, str] = {vocab[name]: name for name in contents if name is not None and name in vocab}
        if (nameless := _without_names(rules, self._special_ids)) != rules:
            self._engine = self._build(nameless)
        decoders = _components(rules.get("decoder"))
        kinds = [decoder.get("type") for decoder in decoders]
        names_of_added = {token["content"] for token in added}
        self._bytes = self._byte_table(vocab, names_of_added) if kinds == ["ByteLevel"] else None
        self._is_local = _is_local(kinds)
        # Ids that may be a part of a character only.
        self._parts: dict[int, bytes] = {}
        self._has_fallback = "ByteFallback" in kinds
        if self._has_fallback:
            self._parts = {vocab[name]: bytes([byte]) for byte in range(256) if (name := f"<0x{byte:02X}>") in vocab}
        elif "ByteLevel" in kinds and self._bytes is None:
            self._parts = self._byte_table(vocab, names_of_added)

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        if len(text) > self._at_once:
            return np.concatenate(list(self.encode_pieces([text])))
        with self._attributed():
            return np.array(self._engine.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_alone(self, text: str, max_tokens: int) -> np.ndarray:
        _utf8(text)
        with self._attributed():
            added = self._engine.num_special_tokens_to_add(is_pair=False)
            if added > max_tokens:
                raise InvalidValue(f"{self._source}: puts {added} tokens around a text, the most that are read are {max_tokens}")
            found = self._engine.encode(text, add_special_tokens=False)
            found.truncate(max_tokens - added)
            return np.array(self._engine.post_process(found, add_special_tokens=True).ids, np.int64)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> np.ndarray:
        template = self._config.get("chat_template")
        if not isinstance(template, str):
            return super().encode_chat(messages)
        special = sorted(self._special_ids.values(), key=len, reverse=True)
        told = "".join(str(message.get("content")) for message in messages if isinstance(message, Mapping))
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in told + template)

        def apart(message: Mapping[str, Any]) -> Mapping[str, Any]:
            """The message, with a mark in each name of a special token that somebody wrote into it."""
            text = message.get("content") if isinstance(message, Mapping) else None
            if not isinstance(text, str):
                return message
            for name in special:
                text = text.replace(name, name[0] + mark + name[1:])
            return {**message, "content": text}

        keys = ("bos_token", "eos_token", "pad_token", "unk_token")
        names = {key: name for key in keys if (name := self._name(key)) is not None}
        text = chat_text(
            template, [apart(message) for message in messages], names, add_generation_prompt=add_generation_prompt, source=self._source
        )
        _utf8(text)
        if self._speaking is None:
            self._speaking = self._build(self._rules)
            self._speaking.encode_special_tokens = False
        with self._attributed():
            if mark not in text:
                return np.array(self._speaking.encode(text, add_special_tokens=False).ids, np.int64)
        # Somebody wrote the name of a special token: what is between the template's own is plain text.
        parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
        places = {name: i for i, name in self._special_ids.items()}
        ids = [
            np.array([places[part]], np.int64) if number % 2 else self.encode(part.replace(mark, "")) for number, part in enumerate(parts)
        ]
        return np.concatenate(ids)

    @property
    def has_chat_template(self) -> bool:
        return isinstance(self._config.get("chat_template"), str)

    @property
    def special_tokens(self) -> Mapping[int, str]:
        return self._special_ids

    def _name(self, key: str) -> str | None:
        """The name of a special token in the file's configuration."""
        name = self._config.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        return name if isinstance(name, str) else None

    def encode_pieces(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        return in_windows(texts, self._spans, self._at_once)

    def _spans(self, text: str, is_first: bool) -> Spans:
        _utf8(text)
        with self._attributed():
            found = (self._engine if is_first else self._inside).encode(text, add_special_tokens=False)
            places = np.array(found.offsets, np.int64).reshape(-1, 2)
            return Spans(np.array(found.ids, np.int64), places[:, 0], places[:, 1])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = self._check_ids(ids).tolist()
        if self._bytes is not None:
            return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", "replace")
        ids = [i for i in ids if i not in self._special_ids]
        with self._attributed():
            if self._has_fallback:
                return self._engine.decoder.decode(list(self._fallen_back(ids)))
            return self._engine.decode(ids, skip_special_tokens=False)

    def decode_stream(self) -> StreamDecoder:
        if self._bytes is not None:
            return _ByteStream(self)
        return _TextStream(self) if self._is_local else _WholeStream(self)

    def _fallen_back(self, ids: list[int]) -> Iterator[str]:
        """Tokens, of which no byte is wrong: by itself the engine makes a whole run of bytes U+FFFD for one wrong byte in it,
        so a character that was given already would change with the next id."""
        for is_byte, run in itertools.groupby(ids, self._parts.__contains__):
            if not is_byte:
                yield from (token for i in run if (token := self._engine.id_to_token(i)) is not None)
                continue
            for character in b"".join(map(self._parts.__getitem__, run)).decode("utf-8", "replace"):
                if character == "\ufffd":
                    yield character
                else:
                    yield from (f"<0x{byte:02X}>" for byte in character.encode())

    def _is_unfinished(self, ids: list[int]) -> bool:
        """Whether a character may go on behind the last id."""
        if not self._parts:
            return False
        run = itertools.takewhile(lambda i: i in self._parts or i in self._special_ids, reversed(ids))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(reversed([self._parts.get(i, b"") for i in run])))
        return bool(decoder.getstate()[0])

    def bytes_of(self, token_id: int) -> bytes:
        (token_id,) = self._check_ids([token_id]).tolist()
        if self._bytes is None:
            raise InvalidValue(f"{self._source}: its ids are not made of bytes; count len(text.encode()) instead")
        return self._bytes.get(token_id, b"")

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    @functools.cached_property
    def _inside(self) -> Any:
        """The engine for what stands inside a text: it puts no space before it."""
        rules = json.loads(self._engine.to_str())
        return self._build(_without_prefix(rules)) if _without_prefix(rules) != rules else self._engine

    def _build(self, rules: dict[str, Any]) -> Any:
        from tokenizers import Tokenizer as Engine

        with self._attributed():
            engine = Engine.from_str(json.dumps(rules))
            engine.encode_special_tokens = True  # as text, that is: the names of special tokens are plain characters
            return engine

    @contextlib.contextmanager
    def _attributed(self) -> Iterator[None]:
        """Whatever the engine raises becomes an error that names the file."""
        try:
            yield
        except (MiniTfmError, MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except ValueError as error:  # of ours, or of the package's
            raise InvalidValue(f"{self._source}: {str(error)[:500]}") from error
        except BaseException as error:  # a panic in Rust is not an Exception
            raise InvalidValue(f"{self._source}: the tokenizers package refuses it: {str(error)[:500]}") from error

    def _role(self, role: str, config: dict[str, Any], vocab: dict[str, int]) -> str | None:
        """The name of the token that plays a role, or None."""
        keys, usual = _ROLES[role]
        for key in keys:
            if config.get(key) is not None:
                name = config[key]
                name = name.get("content") if isinstance(name, dict) else name
                if not isinstance(name, str) or name not in vocab:
                    raise InvalidValue(f"{self._source}: {CONFIG_FILE} says {key} is {shown(name)}, which is not one of its tokens")
                return name
        if any(key in config for key in keys):
            return None
        return next((name for name in usual if name in vocab), None)

    def _byte_table(self, vocab: dict[str, int], added: set[str]) -> dict[int, bytes]:
        letters = byte_letters()
        table = {}
        for token, token_id in vocab.items():
            if token_id in self._special_ids:
                continue
            is_letters = token not in added and all(letter in letters for letter in token)
            table[token_id] = bytes(letters[letter] for letter in token) if is_letters else token.encode("utf-8")
        return table


def _components(rule: Any) -> list[dict[str, Any]]:
    """The parts of a decoder, in their order: a Sequence has several, in it others."""
    if not isinstance(rule, dict):
        return []
    return [part for each in rule.get("decoders") or [] for part in _components(each)] if rule.get("type") == "Sequence" else [rule]


def _is_local(kinds: list[Any]) -> bool:
    """Whether a decoder's text only grows with more tokens. A Replace behind what joins tokens finds text across two of them."""
    joins = [i for i, kind in enumerate(kinds) if kind in ("Fuse", "ByteFallback", "ByteLevel")]
    return not joins or all(kind in ("Fuse", "Strip", "ByteFallback", "ByteLevel") for kind in kinds[joins[0] :])


# What puts a space before a text: the type of a component, and how it does not.
_NO_PREFIX: dict[str, dict[str, Any]] = {
    "ByteLevel": {"add_prefix_space": False},
    "Metaspace": {"prepend_scheme": "never"},
    "Prepend": {"prepend": ""},
}


def _without_prefix(rules: Any) -> Any:
    """The same normalizers and pre-tokenizers, none of which puts anything before a text."""
    if isinstance(rules, list):
        return [_without_prefix(each) for each in rules]
    if not isinstance(rules, dict):
        return rules
    if "model" in rules:
        return rules | {key: _without_prefix(rules.get(key)) for key in ("normalizer", "pre_tokenizer")}
    inner = {key: _without_prefix(each) for key, each in rules.items()}
    return inner | _NO_PREFIX.get(str(rules.get("type")), {})


def _without_names(rules: dict[str, Any], special: Mapping[int, str]) -> dict[str, Any]:
    """The same rules, in whose vocabulary special tokens have no names, where the model would find them in a text.

    A Unigram model looks for every token; one of BPE that ignores merges looks up whole words.
    """
    model = rules.get("model")
    if not isinstance(model, dict):
        return rules
    vocab: Any  # no text has a space and a NUL where a SentencePiece model sees it
    if model.get("type") == "Unigram":
        vocab = [[f" \0{i}", score] if i in special else [name, score] for i, (name, score) in enumerate(model["vocab"])]
    elif model.get("type") == "BPE" and model.get("ignore_merges"):
        kept = model.get("unk_token")  # which the model asks for by its name
        vocab = {f" \0{i}" if i in special and name != kept else name: i for name, i in model["vocab"].items()}
    else:
        return rules
    added = [token for token in rules.get("added_tokens") or [] if token["id"] not in special or token["id"] >= len(vocab)]
    return rules | {"model": {**model, "vocab": vocab}, "added_tokens": added}


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Byte-level BPE learnt from `texts`: <pad> 0, <bos> 1, <eos> 2, the 256 bytes, then merges.

    Every text round-trips exactly, seen in training or not. The same texts give the same file. The vocabulary is
    smaller than asked where no pair of tokens occurs twice any more. Raises InvalidType, InvalidValue.
    """
    if not isinstance(vocab_size, int | np.integer) or isinstance(vocab_size, bool):
        raise InvalidType(f"vocab_size: expected an int, got {type(vocab_size).__name__}")
    vocab_size = int(vocab_size)
    smallest = len(SPECIAL_TOKENS) + 256
    if not smallest <= vocab_size <= MAX_VOCAB_SIZE:
        raise InvalidValue(f"vocab_size: expected {smallest} to {MAX_VOCAB_SIZE}, got {shown(vocab_size)}")
    if isinstance(texts, str):
        raise InvalidType("texts: expected several texts, got one str; put it in a list")
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def checked() -> Iterator[str]:
        for text in texts:
            _utf8(text)
            yield text

    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(checked(), trainer)
    pad, bos, eos = SPECIAL_TOKENS
    config = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "tokenizer_class": "PreTrainedTokenizerFast"}
    return BPETokenizer(engine.to_str().encode("utf-8"), json.dumps(config, indent=2).encode("utf-8") + b"\n")


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model folder, by the files named at the top of this module.

    Raises FileProblem when a file is missing or a link, InvalidValue naming the file when its content is refused.
    """
    found = find_tokenizer(folder)
    if found is None:
        raise FileProblem(f"{os.path.join(folder, TOKENIZER_FILE)}: there is no such file, nor another vocabulary that is known")
    return found


def find_tokenizer(folder: str | os.PathLike) -> Tokenizer | None:
    """The same, or None where there is none of a kind that is known."""
    folder = as_path(folder)
    config_json, tokenizer_json = (
        read_bytes(folder, MAX_FILE_BYTES, name) if os.path.lexists(os.path.join(folder, name)) else None
        for name in (CONFIG_FILE, TOKENIZER_FILE)
    )
    if tokenizer_json is None:
        if (made := tokenizer_files(folder)) is not None:
            return BPETokenizer(*made, folder)
        if config_json is None or parse_json_strict(config_json, folder).get("tokenizer_class") != "ByteTokenizer":
            return None
    return tokenizer_of(config_json, tokenizer_json, folder)


def tokenizer_of(config_json: bytes | None, tokenizer_json: bytes | None, folder: str) -> Tokenizer:
    """The tokenizer of the contents of its files, None for one that is not there; `folder` names them in errors."""
    if config_json is not None:
        config_path = os.path.join(folder, CONFIG_FILE)
        config = parse_json_strict(config_json, config_path)
        if config.get("tokenizer_class") == "ByteTokenizer":
            if len(config) > 1:
                raise InvalidValue(f"{config_path}: a ByteTokenizer has no options, found {shown(sorted(config)[:8])}")
            return ByteTokenizer()
    if tokenizer_json is None:
        raise FileProblem(f"{os.path.join(folder, TOKENIZER_FILE)}: there is no such file; check the path")
    return BPETokenizer(tokenizer_json, config_json, folder)
