"""blocks: long-term memory for questions. What was read is kept; a question sees the passage that shares its rarest words.

All that is read is kept as InfLLM keeps it (arXiv 2402.04617): of the rows that a window no longer holds, a question sees the `top_k` best
blocks of `block_size` tokens, at every layer and for the whole answer. Put it behind a window: `window:size=512,sinks=4+blocks`.

Differences from the paper. A block is found by its tokens (Okapi BM25, k1 = 1.2, b = 0: all blocks are as long), and not by keys of a
few of its tokens: in a small model a question's queries point at the right block in a third of the layers alone. A block may begin at
each quarter of another, and is read with `margin` tokens on either side, so that no sentence is cut in all of them. The choice is made
once for a prompt, by all its tokens, and kept for the answer; nothing is looked up while text is read or scored (`by=text` does that, by
the `RECENT` tokens before each segment, read, scored and written alike, so that no token is used before it is there). The blocks are read
about where the question is, one behind the other in the order of the text (`reach`), at positions that the window's rows and the
prompt's first tokens have too: at the window's edge, where the paper puts them, a small model finds half as much.

Where the rare tokens of the prompt stand close together, the text is emphasized: up to `emphasis` is added to the scores of its keys, so
that up to e^emphasis times as much attention goes there (after PASTA, arXiv 2311.02262, which takes attention from all else, in chosen
heads). Without it a small model reads a third of the answers out of the right block wrong.

It takes rows as they are written (`MemorySpec.early`). So the text is whole: also the rows that a window keeps for good, its sinks, which
may be seen twice, as sinks and within their block. And where the best block is still in the window, no other one takes its place.

With a `path` rows and tokens outlive the process, as those of `store` do. Another process has no window of that text, without which a model
reads a block as something to go on with. So a stream that has read nothing itself sees the document's first rows and its last, `resume`
together, where a window with sinks would show them: of a window of that size its answers are those of the process that has read.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, Evicted, Memory, New, Passage, Query, State, View, bank_key, hookimpl
from mini_tfm_plugins.store import Store

TOKENS = "tokens"  # stands for a layer in the name of a bank of its own, whose rows begin with the token's id
PARTS = 4  # of a block: another one may begin at each
FOCUS = 16  # tokens from one that is asked for, so near others are emphasized
RECENT = 512  # tokens before a segment by which it looks up, with by=text
SINKS = 4  # the document's first rows that are among those a stream resumes with (arXiv 2309.17453)
CHOICE = State.OF_SEGMENT + "choice."  # what a prompt has found


class Blocks(Store):
    """Long-term memory for questions: the `top_k` blocks of `block_size` rows that share most with the prompt; durable with a `path`."""

    searched = False  # of the rows a few are looked up, by their numbers

    def __init__(
        self,
        *,
        path: str | None = None,
        block_size: int = 128,
        margin: int = 32,
        top_k: int = 1,
        reach: int = -4,
        emphasis: float = 2.0,
        resume: int = 512,
        by: str = "prompt",
        document: str = "default",
        read_only: bool = False,
    ):
        for name, value, least in (("block_size", block_size, 1), ("margin", margin, 0), ("resume", resume, 0), ("reach", reach, None)):
            if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
                wanted = "" if least is None else f" of at least {least}"
                raise InvalidValue(f"{name}: expected a number of tokens{wanted}, got {shown(value)}")
        if not isinstance(emphasis, int | float) or isinstance(emphasis, bool) or not 0 <= emphasis <= 100:
            raise InvalidValue(f"emphasis: expected a number from 0 to 100, got {shown(emphasis)}")
        if by not in ("prompt", "text"):
            raise InvalidValue(f"by: expected prompt or text, got {shown(by)}")
        super().__init__(path=path, top_k=top_k, document=document, read_only=read_only, site="decoder", gradient="none")
        self.block_size, self.margin, self.reach, self.emphasis, self.resume = block_size, margin, reach, float(emphasis), resume
        self.by = by
        needs = frozenset({"query", "tokens"})
        self.spec = dataclasses.replace(self.spec, sites=frozenset({"decoder"}), needs=needs, early=True)

    def banks(self, dims: Dims) -> list[str]:
        return [*super().banks(dims), bank_key("decoder", TOKENS)]

    def _models(self, dims: Dims) -> dict[str, str]:
        models = super()._models(dims)
        return {**models, bank_key("decoder", TOKENS): models[bank_key("decoder", 0)]}

    def start(self, batch: int, dims: Dims) -> dict[str, np.ndarray]:
        """free (B,): no memory before this one holds rows at positions below it, but for sinks. own (B,): how many tokens a stream
        has read itself. recent (B, n): its last tokens, -1 for none, with by=text. The other arrays are the store's.
        """
        begun = {**super().start(batch, dims), "free": np.zeros(batch, np.int64), "own": np.zeros(batch, np.int64)}
        return {**begun, "recent": np.full((batch, RECENT), -1)} if self.by == "text" else begun

    def write(self, state: State, site: str, layer: int | str, new: New) -> None:
        super().write(state, site, layer, new)
        if layer == 0:
            super().write(state, site, TOKENS, _of_tokens(new, state.dims))
            state["own"] = state["own"] + new.valid.sum(axis=1)
            if self.by == "text":
                rows = np.concatenate([state["recent"], np.where(new.valid, new.tokens, -1)], axis=1)
                last = np.argsort(np.pad(new.valid, [(0, 0), (RECENT, 0)], constant_values=True), axis=1, kind="stable")[:, -RECENT:]
                state["recent"] = np.take_along_axis(rows, last, 1)

    def absorb(self, state: State, evicted: Evicted) -> None:
        if evicted.layer == 0:
            behind = np.where(evicted.valid, evicted.positions + 1, 0).max(axis=1, initial=0)
            state["free"] = np.maximum(state["free"], behind)

    write_ahead = Memory.write_ahead  # a flush writes all rows, also those that a window still holds

    def read(self, state: State, site: str, layer: int, query: Query) -> View | None:
        bank, segment = bank_key(site, layer), query.segment
        if (self.by == "prompt" and not query.decoding) or segment is None or not self.count(state, bank):
            return None
        if CHOICE + "rows" not in state:
            resumed, (numbers, bias) = self._resumed(state), self.look_up(state, segment.tokens if self.by == "prompt" else state["recent"])
            # No further into a prompt than to its middle: what asks stands behind what it reads.
            reach = max(self.reach, -(segment.tokens.shape[1] // 2)) if self.by == "prompt" and segment.tokens is not None else self.reach
            positions = [_up_to(segment.start - 1, resumed >= 0), _up_to(segment.start - reach, numbers >= 0)]
            state[CHOICE + "rows"] = np.concatenate([resumed, numbers], axis=1)
            state[CHOICE + "positions"] = np.concatenate(positions, axis=1)
            state[CHOICE + "bias"] = np.concatenate([np.zeros(resumed.shape, bias.dtype), bias], axis=1)[:, None, None]
        if CHOICE + bank not in state:
            state[CHOICE + bank], state[CHOICE + bank + "valid"] = self._gathered(state, bank, state[CHOICE + "rows"])
        rows = ("hidden", state[CHOICE + bank])
        return View(rows, state[CHOICE + bank + "valid"], positions=state[CHOICE + "positions"], bias=state[CHOICE + "bias"])

    def look_up(self, state: State, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What tokens (B, T) find: numbers of rows in their order (B, K), -1 for none, and what is added to the scores of their keys."""
        ids, free = self._tokens(state)
        for b, resumed in enumerate(self._resumed(state)):
            free[b, resumed[resumed >= SINKS]] = False
        size, around = self.block_size, np.arange(-self.margin, self.block_size + self.margin)
        found = np.full((len(tokens), self.top_k * len(around)), -1)
        bias = np.zeros(found.shape, state.dims.dtype)
        for b, asked in enumerate(tokens):
            # In between there may be rows of longer streams. Text asks for more of the kind, which is what a window holds.
            present = np.flatnonzero((ids[b] >= 0) & (free[b] | (self.by == "prompt")))
            text = ids[b, present]
            begins = best_of(scores_of(asked, text, size), size, self.top_k)
            places = np.unique(begins[:, None] + around)
            places = places[(places >= 0) & (places < len(text))]
            places = places[free[b, present[places]]]
            found[b, : len(places)] = present[places]
            if len(places):
                near = nearness(rarity_of(asked, text, size))[places]
                bias[b, : len(places)] = self.emphasis * near / max(near.max(), 1e-9)
        return found, bias

    def _resumed(self, state: State) -> np.ndarray:
        """Numbers of the rows that streams resume with (B, R), -1 for none: those who have read nothing themselves."""
        if "on_disk" not in state:
            return np.full((len(state["own"]), 0), -1)
        stored = np.where(state["own"] == 0, self._stored(state, bank_key("decoder", TOKENS)), 0)
        found = np.full((len(stored), min(self.resume, int(stored.max(initial=0)))), -1)
        for b, count in enumerate(stored):
            first = min(SINKS, self.resume, count)
            numbers = [*range(first), *range(max(first, count - self.resume + first), count)]
            found[b, : len(numbers)] = numbers
        return found

    def recall(self, state: State, tokens: np.ndarray) -> list[list[Passage]]:
        bank, found = bank_key("decoder", TOKENS), list[list[Passage]]()
        if not self.count(state, bank):
            return [[] for _ in tokens]
        stored = self._stored(state, bank) if "on_disk" in state else np.zeros(len(tokens), np.int64)
        ids, _ = self._tokens(state)
        for b, numbers in enumerate(self.look_up(state, tokens if self.by == "prompt" else state["recent"])[0]):
            present = np.flatnonzero(ids[b] >= 0)
            places = np.searchsorted(present, numbers[numbers >= 0])
            runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []
            kept_in = [self.document if present[run[0]] < stored[b] else None for run in runs]
            layers = len(self.banks(state.dims)) - 1
            found.append([Passage(ids[b, present[run]], int(run[0]), name, layers) for run, name in zip(runs, kept_in, strict=True)])
        return found

    def _tokens(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all rows (B, M), -1 where a stream has none, and which rows no memory before this one holds."""
        ids, free = [], []
        for hidden, positions, valid, _ in self.shown(state, bank_key("decoder", TOKENS)):
            behind = positions < state["free"][:, None]
            there = np.broadcast_to(True if valid is None else valid, behind.shape)
            ids.append(np.where(there, hidden[..., 0], -1))
            free.append(behind & there)
        return np.concatenate(ids, axis=1).astype(np.int64), np.concatenate(free, axis=1)

    def _gathered(self, state: State, bank: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the rows of a bank with these numbers (B, N), and which of them there are."""
        hidden, there = np.zeros((*numbers.shape, state.dims.d_model), state.dims.dtype), np.zeros(numbers.shape, bool)
        stored = self._stored(state, bank) if "on_disk" in state else np.zeros(len(numbers), np.int64)
        seen = int(stored.max(initial=0))
        if (on_disk := (numbers >= 0) & (numbers < stored[:, None])).any():
            assert self.disk is not None
            known, places = np.unique(numbers[on_disk], return_inverse=True)
            rows, _ = self.disk.gather(self.document, bank, known, self._claim(state, [bank]))
            if len(rows) == len(known):  # else it was deleted by now
                hidden[on_disk], there[on_disk] = rows[places], True
        for rows, _, valid in self.held(state, bank):
            b, place = np.nonzero((numbers >= seen) & (numbers < seen + valid.shape[1]))
            at = numbers[b, place] - seen
            hidden[b, place], there[b, place] = rows[b, at], valid[b, at]
            seen += valid.shape[1]
        return hidden, there


def _up_to(last: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Positions (B, N) of rows one behind the other, the last of those `there` at `last` (B,)."""
    return last[:, None] + 1 - np.cumsum(there[:, ::-1], axis=1)[:, ::-1]


def scores_of(asked: np.ndarray, tokens: np.ndarray, size: int) -> np.ndarray:
    """What the blocks of `size` tokens that begin at each multiple of `step_of(size)` share with tokens `asked`: Okapi BM25.

    A token that f of a block's are counts idf * f * (k1 + 1) / (f + k1), k1 = 1.2; idf = log(1 + (n - d + 0.5) / (d + 0.5)) of n blocks,
    d of which have it. Of tokens (M,) -1 is none.
    """
    step = step_of(size)
    parts, of_parts = size // step, -(-len(tokens) // step)
    first = np.arange(max(1, of_parts - parts + 1))
    score = np.zeros(len(first))
    for token in np.unique(asked[asked >= 0]):
        up_to = np.concatenate([[0], np.cumsum(np.bincount(np.flatnonzero(tokens == token) // step, minlength=of_parts))])
        often = up_to[np.minimum(first + parts, of_parts)] - up_to[first]
        having = np.count_nonzero(often)
        score += np.log(1 + (len(first) - having + 0.5) / (having + 0.5)) * often * 2.2 / (often + 1.2)
    return score


def rarity_of(asked: np.ndarray, tokens: np.ndarray, size: int) -> np.ndarray:
    """The idf, among blocks of `size`, of each of tokens (M,) that is asked for; 0 for the others."""
    blocks, rarity = np.arange(len(tokens)) // size, np.zeros(len(tokens))
    n = -(-len(tokens) // size)
    for token in np.unique(asked[asked >= 0]):
        there = tokens == token
        having = len(np.unique(blocks[there]))
        rarity[there] = np.log(1 + (n - having + 0.5) / (having + 0.5))
    return rarity


def nearness(rarity: np.ndarray) -> np.ndarray:
    """At each place the sum of the rarities (M,) around it, less by their distance: at FOCUS tokens nothing is left."""
    weights = 1 - np.abs(np.arange(1 - FOCUS, FOCUS)) / FOCUS
    return np.convolve(rarity, weights)[FOCUS - 1 : FOCUS - 1 + len(rarity)]


def best_of(score: np.ndarray, size: int, k: int) -> np.ndarray:
    """Where the k blocks of the best scores begin, in order; fewer where others have 0.

    No two have tokens in common. Of equal ones side by side it is the middle one: there is text before what was found, and behind.
    """
    step, score, begins = step_of(size), score.copy(), list[int]()
    parts = size // step
    while len(begins) < k and score.max() > 0:
        best = int(score.argmax())
        alike = np.append(np.isclose(score[best : best + parts], score[best]), False)
        best += (int(alike.argmin()) - 1) // 2
        begins.append(best * step)
        score[max(0, best - parts + 1) : best + parts] = 0
    return np.sort(np.array(begins, np.int64))


def step_of(size: int) -> int:
    """Tokens from one block of `size` to the next, which share all but these."""
    return max(1, size // PARTS)


def _of_tokens(new: New, dims: Dims) -> New:
    """The tokens of rows as rows of a bank: the id is the first number of each."""
    rows = np.zeros((*new.valid.shape, dims.d_model), dims.dtype)
    rows[..., 0] = -1 if new.tokens is None else new.tokens
    return dataclasses.replace(new, layer=TOKENS, hidden=rows)


@hookimpl
def register_memories(register):
    register("blocks", Blocks)
