"""Documents to train on: the documentation inside every Python, long texts in parts, and a split into what is held out."""

import hashlib

from mini_tfm.errors import FileProblem, InvalidType, InvalidValue, shown
from mini_tfm.options import plain


def python_topics() -> dict[str, str]:
    """The language documentation that CPython carries for `help()`: topic -> text, sorted by topic.

    About 0.5 MB of English that needs no download. Raises FileProblem where Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileProblem(
            "pydoc_data.topics: this Python was installed without its documentation; install the full standard library"
        ) from error
    return dict(sorted(topics.items()))


def in_parts(documents: dict[str, str], least: int = 10) -> dict[str, str]:
    """The documents as they are where there are `least` or more; else each cut into `least` parts, so that some can
    be held out. A cut is moved on to the next paragraph, line or space; parts that would be empty are left out.
    """
    if len(documents) >= least:
        return documents
    parts: dict[str, str] = {}
    for name, text in documents.items():
        start = 0
        for number in range(1, least + 1):
            wanted = len(text) * number // least
            stop = len(text) if number == least else max(start, _cut_after(text, wanted))
            if text[start:stop].strip():
                parts[f"{name} (part {number} of {least})"] = text[start:stop]
            start = stop
    return parts


def _cut_after(text: str, place: int) -> int:
    """The first good place to cut at or after `place`, no more than 2,000 characters on."""
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, place, place + 2000)
        if found >= 0:
            return found + len(mark)
    return place


def split_documents(documents: dict[str, str], held_out_fraction: float, seed: int) -> tuple[dict[str, str], dict[str, str]]:
    """(train, held_out), both sorted by name: whole documents, at least one on each side.

    Documents are taken in an order drawn from `seed`, each if it still fits into `held_out_fraction` of all UTF-8
    bytes; if none fits, the smallest is taken. The order is a hash of seed and name, so a split stays the same on
    every Python version and machine. Raises InvalidValue, InvalidType.
    """
    if not all(isinstance(item, str) for pair in documents.items() for item in pair):
        raise InvalidType("documents: expected names and texts that are str")
    if len(documents) < 2:
        raise InvalidValue(f"documents: expected at least 2, one for each side, got {len(documents)}")
    held_out_fraction, seed = plain(held_out_fraction), plain(seed)
    if isinstance(held_out_fraction, bool) or not isinstance(held_out_fraction, (int, float)):
        raise InvalidType(f"held_out_fraction: expected a float, got {type(held_out_fraction).__name__}")
    if not 0 < held_out_fraction < 1:
        raise InvalidValue(f"held_out_fraction: expected a number between 0 and 1, got {shown(held_out_fraction)}")
    if type(seed) is not int:
        raise InvalidType(f"seed: expected an int, got {type(seed).__name__}")
    if abs(seed) >= 1 << 1024:
        raise InvalidValue(f"seed: expected a number of at most 1024 bits, got {shown(seed)}")

    def draw(name: str) -> bytes:
        return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()

    sizes = {name: len(text.encode("utf-8", "surrogatepass")) for name, text in documents.items()}
    room = held_out_fraction * sum(sizes.values())
    chosen: set[str] = set()
    for name in sorted(documents, key=draw):
        if sizes[name] <= room and len(chosen) < len(documents) - 1:
            chosen.add(name)
            room -= sizes[name]
    if not chosen:
        chosen = {min(sorted(documents), key=sizes.__getitem__)}
    train = {name: documents[name] for name in sorted(documents) if name not in chosen}
    return train, {name: documents[name] for name in sorted(chosen)}
