"""The data of `mini-tfm train`: text files -> corpora in RAM or in a cache -> objectives, and a held-out part."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileProblem, InvalidValue
from .shared import OPENING, count, is_piped, note, piped_text, prompt_from, read_documents

if TYPE_CHECKING:
    from ..config import Config
    from ..data import Batch, Corpus, TextFiles
    from ..memory import Memory
    from ..text.tokenizers import Tokenizer
    from ..train import Trainer
    from ..train.parallel import Alone

DATA_FILE = "training_data.json"  # in the folder of a run: describes its data, for --resume
PIPED = "text"  # text-1.txt: what came through a pipe
HELD_OUT = 0.1  # of the text
VALIDATION_BATCHES = 4  # of each objective
TOKENIZER_CHARACTERS = 1 << 26  # enough to train a tokenizer; files that are read whole are used completely
# How streams are cut where nobody says: so that a memory is full before they end, and a batch has as many segments with any memory.
MOST_SEGMENTS, SEGMENTS_A_STEP, PAIRS_A_STEP = 16, 64, 16
SEGMENTS_WITHOUT_LIMIT = 8  # for a memory that is never full, behind those that are
OBJECTIVES = {"next-segment": "texts", "lm": "texts", "denoise": "texts", "pairs": "pairs"}  # name -> the kind of corpus it needs

# The fields of DATA_FILE, and their types.
ABOUT = {
    "files": list,
    "documents": str,
    "fields": list | None,
    "cache": str | None,
    "objective": dict,
    "curriculum": list | None,
    "segment_length": int,
    "n_segments": int,
    "batch_size": int,
    "seed": int,
    "fingerprint": str,
}


def parse_objective(text: str | None) -> dict[str, float] | None:
    """next-segment=0.7+denoise=0.3 -> {"next-segment": 0.7, "denoise": 0.3}; a name alone has share 1; None stays None."""
    if text is None:
        return None
    found: dict[str, float] = {}
    for part in text.split("+"):
        name, equals, share = part.partition("=")
        if name not in OBJECTIVES or name in found:
            raise InvalidValue(
                f"--objective: expected some of {', '.join(OBJECTIVES)}, each once, as in next-segment=0.7+denoise=0.3; got {part!r}"
            )
        try:
            found[name] = float(share) if equals else 1.0
        except ValueError:
            found[name] = math.nan
        if not 0 < found[name] < math.inf:
            raise InvalidValue(f"--objective: expected a share above 0 after {name}=, got {share!r}")
    return found


def parse_curriculum(text: str | None) -> list[list[int]] | None:
    """0:1,500:2 -> [[0, 1], [500, 2]]: (first step, segments per stream)."""
    if text is None:
        return None
    try:
        stages = [[int(number) for number in stage.split(":")] for stage in text.split(",")]
    except ValueError:
        stages = []
    firsts = [stage[0] for stage in stages]
    if not stages or any(len(stage) != 2 or stage[1] < 1 for stage in stages) or firsts[0] != 0 or sorted(set(firsts)) != firsts:
        raise InvalidValue(f"--curriculum: expected STEP:SEGMENTS,... with steps rising from 0, as in 0:1,500:2,1000:4; got {text!r}")
    return stages


def segments_to_fill(memory: Memory | None, segment_length: int) -> int:
    """Segments after which a memory is full and has been read so once: shorter streams never teach it how far it reaches."""
    from ..memory.run import members_of

    capacities = [member.spec.capacity for member in members_of(memory)]
    if not capacities:
        return 1
    rows = sum(capacity for capacity in capacities if capacity is not None)
    return -(-rows // segment_length) + (SEGMENTS_WITHOUT_LIMIT if None in capacities else 2)


def plan_streams(options: Mapping[str, Any], memory: Memory | None, new_model: bool) -> dict[str, Any]:
    """n_segments, batch_size and curriculum of a run, where they are not given: what makes a memory pay (docs/own-text.md).

    Streams are so long that the memory gets full. A new model learns on single segments first, each from another place of the text,
    and then on longer and longer streams (arXiv 2207.06881, section 4). All batches have about as many tokens.
    """
    stages, needed = parse_curriculum(options["curriculum"]), segments_to_fill(memory, options["segment_length"])
    n_segments = stages[-1][1] if stages else options["n_segments"] or min(needed, MOST_SEGMENTS)
    if memory is not None and n_segments < needed:
        tokens = count(n_segments * options["segment_length"])
        note(
            f"--n-segments: streams of {n_segments} segments, {tokens} tokens, never fill {memory.text or memory.name}; the model learns"
            f" to use no more of it than that; {needed} segments would fill it, or take a smaller one"
        )
    if not stages and options["n_segments"] is None and new_model and n_segments > 1 and options["steps"] >= 3:
        lengths = sorted({1, -(-n_segments // 2), n_segments})
        stages = [[options["steps"] * i // len(lengths), n] for i, n in enumerate(lengths)]
    streams = lambda n: options["batch_size"] or max(1, SEGMENTS_A_STEP // n)  # noqa: E731
    curriculum = [[first, n, streams(n)] for first, n in stages] if stages else None
    return {"n_segments": n_segments, "batch_size": streams(n_segments), "curriculum": curriculum}


def describe_data(options: dict[str, Any], memory: Memory | None, new_model: bool = True) -> tuple[dict[str, Any], dict[str, float] | None]:
    """The description of a new run's data, made before its files are opened; and the objectives of --objective, if given."""
    objectives = parse_objective(options["objective"])
    about = {name: options[name] for name in ("documents", "segment_length", "seed")} | plan_streams(options, memory, new_model)
    about |= {
        "files": [str(path.resolve()) for path in (*options["files"], *options["more_files"])],
        "fields": options["field"].split(",") if options["field"] else None,
        "cache": str(options["cache"].resolve()) if options["cache"] else None,
    }
    return about, objectives


def take_piped(options: dict[str, Any], out: Path) -> dict[str, str]:
    """Reads standard input and pipes among --text: in their place come files of the run's folder, by path, so that it can be resumed."""
    piped: dict[str, str] = {}
    for name in ("files", "more_files"):
        paths = []
        for path in options[name]:
            if is_piped(path):
                if options["cache"] is not None or options["documents"] != "file":
                    raise InvalidValue(f"--text: {path} is read as one document; with --cache or --documents line, give a file")
                text, path = piped_text(path), out.resolve() / f"{PIPED}-{len(piped) + 1}.txt"
                piped[str(path)] = text
            paths.append(path)
        options[name] = tuple(paths)
    return piped


class Sources:
    """The files of a run. Plain text files without a cache, and Python's documentation, are read whole; all others in pieces."""

    def __init__(self, about: dict[str, Any], piped: Mapping[str, str] | None = None):
        """piped: the texts of files that are not written yet."""
        from ..data import TextFiles

        self.about, self.piped = about, dict(piped or {})
        paths = [Path(path) for path in about["files"]]
        self.texts: dict[str, str] | None = None
        self.held_out: list[str] = []  # names of `texts`, once they are split
        self.files: dict[str, TextFiles] = {}
        plain = about["cache"] is None and about["documents"] == "file" and not any(has_lines(path) for path in paths)
        if plain:
            self.name, self.texts = read_documents(paths, piped=self.piped)
            self.kinds = {"texts"}
            return
        if not paths:
            raise InvalidValue("--cache: expected text files, got none; add --text FILE...")
        by_kind: dict[str, list[str]] = {"texts": [], "pairs": []}
        for path in dict.fromkeys(paths):
            by_kind[TextFiles(path, fields=about["fields"], documents=about["documents"]).kind].append(str(path))
        for kind, some in by_kind.items():
            if some:
                self.files[kind] = TextFiles(some, fields=about["fields"], documents=about["documents"])
        self.kinds = set(self.files)
        self.name = f"{len(paths)} files" if len(paths) > 1 else str(paths[0])

    def fingerprint(self) -> str:
        """SHA-256 of the texts, independent of file names. Reads all of them."""
        digest = hashlib.sha256()
        if self.texts is not None:
            for text in self.texts.values():
                digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        for files in self.files.values():
            for each in files.fingerprints():
                digest.update(bytes.fromhex(each["sha256"]))
        return digest.hexdigest()

    def train_tokenizer(self, vocab_size: int) -> Tokenizer:
        """A byte-level BPE trained on the training text; for files read in pieces, on their beginning."""
        from ..text.documents import split_documents
        from ..text.tokenizers import train_bpe

        if self.texts is not None:
            return train_bpe(split_documents(self.texts, HELD_OUT, self.about["seed"])[0].values(), vocab_size)

        def some() -> Iterator[str]:
            left = TOKENIZER_CHARACTERS
            for piece in itertools.chain.from_iterable(files.pieces() for files in self.files.values()):
                if left <= 0:
                    note(f"tokenizer: trained on the first {count(TOKENIZER_CHARACTERS)} characters")
                    return
                left -= len(piece.text)
                yield piece.text

        return train_bpe(some(), vocab_size)

    def corpora(self, tokenizer: Tokenizer, ranks: Alone, overwrite: bool) -> dict[str, tuple[Corpus, Corpus]]:
        """kind -> (training corpus, held-out corpus). overwrite: rebuild the cache, because its text has changed."""
        from ..data import Corpus, build_token_cache, token_cache
        from ..progress import track
        from ..text.documents import split_documents

        if self.texts is not None:
            split = split_documents(self.texts, HELD_OUT, self.about["seed"])
            self.held_out = list(split[1])
            parts = [
                Corpus.of(map(tokenizer.encode, track(part.values(), "encoding", len(part), "documents")), vocab_size=tokenizer.vocab_size)
                for part in split
            ]
            return {"texts": (parts[0], parts[1])}
        found = {}
        for kind, files in self.files.items():
            if self.about["cache"] is None:
                corpus = Corpus.of(files, tokenizer)
            else:
                folder = Path(self.about["cache"])
                _make_folder(folder)
                path = folder / f"{kind}.tokens"
                if overwrite:
                    if ranks.rank == 0:
                        build_token_cache(path, files, tokenizer, overwrite=True)
                    ranks.wait()
                corpus = token_cache(path, files, tokenizer)
            found[kind] = corpus.split(HELD_OUT)
        return found


class TrainingData:
    """The data of a run: training data, held-out batches, and the number of bytes of their targets."""

    def __init__(self, sources: Sources, tokenizer: Tokenizer, config: Config, ranks: Alone, *, overwrite: bool = False):
        import numpy as np

        from ..data import Curriculum, Mixture
        from ..train.arguments import as_read
        from ..train.backpropagation import counts_of

        self.about, self.tokenizer, self.config = sources.about, tokenizer, config
        self.piped = sources.piped
        corpora = sources.corpora(tokenizer, ranks, overwrite)
        is_cut = bool(sources.texts and self.about["files"]) and set(sources.texts or ()) != set(self.about["files"])
        for kind, (train, held_out) in corpora.items():
            what = ("parts" if is_cut else "documents") if kind == "texts" else kind
            note(
                f"text: {sources.name}: {count(len(train))} {what}, {count(train.n_tokens)} tokens;"
                f" held out: {count(len(held_out))}, {count(held_out.n_tokens)} tokens"
            )
            if kind == "texts" and train.n_tokens < (config.segment_length or 0):
                told = f"--text: {count(train.n_tokens)} tokens are less than a segment of {config.segment_length}"
                warnings.warn(f"{told}, which a model learns by heart and nothing else; give more text", stacklevel=2)
        self.files_to_score = [name for name in sources.held_out if name in self.about["files"]] or self.about["files"]
        first = next(iter(corpora.values()))[1].document(0, 0, OPENING)  # of what is held out
        self.prompt = prompt_from(tokenizer.decode(first.tolist()))
        shares = self.about["objective"]
        parts = {name: (self._objective(name, corpora[OBJECTIVES[name]][0]), share) for name, share in shares.items()}
        self.data: Any = Mixture(parts, seed=self.about["seed"]) if len(parts) > 1 else next(iter(parts.values()))[0]
        if self.about["curriculum"] is not None and set(shares) != {"pairs"}:  # of pairs, the sources say how many segments there are
            self.data = Curriculum(self.data, self.about["curriculum"])
        self.held_out: list[Batch] = []
        for name in shares:
            data = self._objective(name, corpora[OBJECTIVES[name]][1])
            self.held_out += [data.batch(i) for i in range(VALIDATION_BATCHES)]
        read = [as_read(config, batch) for batch in self.held_out]
        counts = [counts_of(batch, np.float64) for batch in read]
        self.held_out_tokens = [float(each.sum()) for each in counts]
        targets = np.concatenate([batch.target[each > 0] for batch, each in zip(read, counts, strict=True)])
        self.held_out_bytes = None  # where the targets are not the text, or the tokenizer's ids are not made of bytes
        if "denoise" not in shares:
            with contextlib.suppress(InvalidValue):
                self.held_out_bytes = sum(len(tokenizer.bytes_of(int(i))) for i in targets if i < tokenizer.vocab_size)

    def _objective(self, name: str, corpus: Corpus) -> Any:
        from ..data import NextSegment, Pairs, SpanDenoising

        about, has_encoder = self.about, self.config.has_encoder
        ids = {"eos_id": self.config.eos_id, "pad_id": self.config.pad_id, "has_encoder": has_encoder}
        shape = {"batch_size": about["batch_size"], "seed": about["seed"], **ids}
        if name == "pairs":
            frame = self.tokenizer.frame() if self.config.framed_by_tokenizer else ((), ())
            return Pairs(corpus, segment_length=about["segment_length"] if has_encoder else None, frame=frame, **shape)
        shape |= {"segment_length": about["segment_length"], "n_segments": about["n_segments"], "bos_id": self.config.bos_id}
        return SpanDenoising(corpus, vocab_size=self.config.vocab_size, **shape) if name == "denoise" else NextSegment(corpus, **shape)

    def measure(self, trainer: Trainer) -> float:
        """Nats per token on the held-out batches, after the last step."""
        import numpy as np

        if trainer.validations and trainer.validations[-1][0] == trainer.step_count:
            return trainer.validations[-1][1]
        losses = [trainer.evaluate(batch) for batch in self.held_out]
        return float(np.average(losses, weights=self.held_out_tokens))

    def bits_per_byte(self, loss: float) -> float | None:
        """Bits per byte on the held-out batches, from their loss in nats per token; None if the targets are not the text."""
        return loss * sum(self.held_out_tokens) / math.log(2) / self.held_out_bytes if self.held_out_bytes else None


def resolve_objective(given: dict[str, float] | None, kinds: set[str], has_encoder: bool) -> dict[str, float]:
    """The shares of the objectives: the given ones, or the default for the files and the model. Raises InvalidValue."""
    plain = "next-segment" if has_encoder else "lm"
    if given is None:
        return {plain if kind == "texts" else "pairs": 1.0 for kind in sorted(kinds, reverse=True)}
    wrong = {"next-segment", "lm"} - {plain}
    if found := wrong & set(given):
        model = "an encoder" if has_encoder else "no encoder"
        raise InvalidValue(f"--objective: {found.pop()} does not fit a model with {model}; use {plain}")
    needed = {OBJECTIVES[name] for name in given}
    if missing := needed - kinds:
        raise InvalidValue(f"--objective: needs {missing.pop()}, but --text has only {', '.join(sorted(kinds))} (.tsv files, and .jsonl"
                           " files with two fields, are pairs)")  # fmt: skip
    if unused := kinds - needed:
        raise InvalidValue(f"--objective: no objective uses the {unused.pop()} in --text; add one that does, or leave those files out")
    return given


def n_sentinels(objective: dict[str, float], segment_length: int) -> int:
    """The number of ids that the objectives need after the tokenizer's."""
    from ..data import SpanDenoising

    return SpanDenoising.sentinels(segment_length) if "denoise" in objective else 0


def read_about(path: Path) -> tuple[dict[str, Any], bool]:
    """The description of a saved run's data, and whether version 0.1.0 wrote it, which drew streams at random positions.

    Raises InvalidValue for a file that `train` did not write.
    """
    from ..files.strict_json import read_json_strict

    about = read_json_strict(path)
    if is_old := "has_encoder" in about:
        plain = "next-segment" if about.pop("has_encoder") else "lm"
        about |= {"documents": "file", "fields": None, "cache": None, "curriculum": None, "objective": {plain: 1.0}}
    if wrong := [field for field, kind in ABOUT.items() if field not in about or not isinstance(about[field], kind)]:
        raise InvalidValue(f"{path}: field {wrong[0]!r} is missing or of the wrong type")
    if not all(isinstance(file, str) for file in about["files"]):
        raise InvalidValue(f"{path}: field 'files': expected paths, got {about['files']}")
    if not about["objective"] or any(name not in OBJECTIVES for name in about["objective"]):
        raise InvalidValue(f"{path}: field 'objective': expected some of {', '.join(OBJECTIVES)}, got {about['objective']}")
    return about, is_old


def has_lines(path: str | Path) -> bool:
    """Whether each line of the file is a record, judged by its extension."""
    from ..data.sources import JSON_LINES, PAIR_LINES

    return str(path).endswith((*JSON_LINES, *PAIR_LINES))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileProblem(f"--cache: {folder} cannot be created: {error.strerror or error}") from error
