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

With `cut=surprise` a block is an event of EM-LLM (arXiv 2407.09450): it begins at a token that surprises the model (`surprising`), has
at least `min_size` tokens and at most `block_size`, and is read with the same margin, which stands for the paper's buffer of events next
to those found. How much a token surprised is known when its segment has been read. It is kept with the tokens, and a question cuts all
of them: `gamma` may be another one then, and a text that was read without surprises is cut at each `block_size`. Blocks of unequal length
are compared by BM25 with b = 0.75. Boundaries are not refined by the similarity of keys (equations 4 and 5): keys differ by layer, and
here all layers see the same tokens.

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
BEFORE = 512  # tokens before one whose surprises say what is usual, with cut=surprise
LENGTHS = 0.75  # BM25's b, of blocks of unequal length
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
        cut: str = "size",
        gamma: float = 1.0,
        min_size: int = 8,
        document: str = "default",
        read_only: bool = False,
    ):
        lengths = ("block_size", block_size, 1), ("margin", margin, 0), ("resume", resume, 0), ("min_size", min_size, 1)
        for name, value, least in (*lengths, ("reach", reach, None)):
            if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
                wanted = "" if least is None else f" of at least {least}"
                raise InvalidValue(f"{name}: expected a number of tokens{wanted}, got {shown(value)}")
        for name, number in (("emphasis", emphasis), ("gamma", gamma)):
            if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= 100:
                raise InvalidValue(f"{name}: expected a number from 0 to 100, got {shown(number)}")
        for name, word, words in (("by", by, ("prompt", "text")), ("cut", cut, ("size", "surprise"))):
            if word not in words:
                raise InvalidValue(f"{name}: expected {' or '.join(words)}, got {shown(word)}")
        if cut == "surprise" and min_size > block_size:
            raise InvalidValue(f"min_size: expected at most block_size = {block_size} tokens, got {min_size}")
        super().__init__(path=path, top_k=top_k, document=document, read_only=read_only, site="decoder", gradient="none")
        self.block_size, self.margin, self.reach, self.emphasis, self.resume = block_size, margin, reach, float(emphasis), resume
        self.by, self.cut, self.gamma, self.min_size = by, cut, float(gamma), min_size
        needs = frozenset({"query", "tokens", "surprise"} if cut == "surprise" else {"query", "tokens"})
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
        outputs = state.dims.layers["decoder"]  # with them come the surprises, where the segment ends
        if layer != outputs:
            super().write(state, site, layer, new)
        if layer == (outputs if self.cut == "surprise" else 0):
            super().write(state, site, TOKENS, _of_tokens(new, state.dims))
        if layer == 0:
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
        ids, surprise, free = self._tokens(state)
        for b, resumed in enumerate(self._resumed(state)):
            free[b, resumed[resumed >= SINKS]] = False
        found = np.full((len(tokens), self.top_k * (self.block_size + 2 * self.margin)), -1)
        bias = np.zeros(found.shape, state.dims.dtype)
        for b, asked in enumerate(tokens):
            # In between there may be rows of longer streams. Text asks for more of the kind, which is what a window holds.
            present = np.flatnonzero((ids[b] >= 0) & (free[b] | (self.by == "prompt")))
            text = ids[b, present]
            places = np.zeros(len(text), bool)
            for begin, end in zip(*self._best(asked, text, surprise[b, present]), strict=True):
                places[max(0, begin - self.margin) : end + self.margin] = True
            places = np.flatnonzero(places)
            places = places[free[b, present[places]]]
            found[b, : len(places)] = present[places]
            if len(places):
                near = nearness(rarity_of(asked, text, self.block_size))[places]
                bias[b, : len(places)] = self.emphasis * near / max(near.max(), 1e-9)
        return found, bias

    def _best(self, asked: np.ndarray, text: np.ndarray, surprise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the at most `top_k` blocks of tokens (M,) that share most with those asked begin and end. surprise (M,): see `_tokens`."""
        if self.cut == "surprise":
            begins, ends = events(surprise, self.gamma, self.min_size, self.block_size)
            score = scores_of(asked, text, begins, ends, LENGTHS)
            best = np.argsort(-score, kind="stable")[: self.top_k]
            best = best[score[best] > 0]
            return begins[best], ends[best]
        begins = best_of(scores_of(asked, text, *even_blocks(len(text), self.block_size)), self.block_size, self.top_k)
        return begins, begins + self.block_size

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
        ids, _, _ = self._tokens(state)
        for b, numbers in enumerate(self.look_up(state, tokens if self.by == "prompt" else state["recent"])[0]):
            present = np.flatnonzero(ids[b] >= 0)
            places = np.searchsorted(present, numbers[numbers >= 0])
            runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []
            kept_in = [self.document if present[run[0]] < stored[b] else None for run in runs]
            layers = len(self.banks(state.dims)) - 1
            found.append([Passage(ids[b, present[run]], int(run[0]), name, layers) for run, name in zip(runs, kept_in, strict=True)])
        return found

    def _tokens(self, state: State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all rows (B, M): the tokens, -1 where a stream has none; the surprises of the tokens behind them; which rows no memory
        before this one holds."""
        ids, surprise, free = [], [], []
        for hidden, positions, valid, _ in self.shown(state, bank_key("decoder", TOKENS)):
            behind = positions < state["free"][:, None]
            there = np.broadcast_to(True if valid is None else valid, behind.shape)
            ids.append(np.where(there, hidden[..., 0], -1))
            surprise.append(np.broadcast_to(hidden[..., 1], there.shape))
            free.append(behind & there)
        return np.concatenate(ids, axis=1).astype(np.int64), np.concatenate(surprise, axis=1), np.concatenate(free, axis=1)

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


def surprising(surprise: np.ndarray, gamma: float) -> np.ndarray:
    """Which of tokens with these surprises (M,) surprise the model (arXiv 2407.09450, equations 1 and 2): (M,) bool.

        -log p(x_t | x_1 ... x_(t-1)) > mu + gamma sigma

    mu, sigma: the mean and the standard deviation of the surprises of the `BEFORE` tokens before t, or of as many as there are.
    """
    values = surprise.astype(np.float64)
    here = np.arange(len(values))
    first = np.maximum(here - BEFORE, 0)
    n = np.maximum(here - first, 1)
    sums, squares = (np.append(0, np.cumsum(each)) for each in (values, values**2))
    mean = (sums[here] - sums[first]) / n
    deviation = np.sqrt(np.maximum((squares[here] - squares[first]) / n - mean**2, 0))
    return (here > 0) & (values > mean + gamma * deviation)


def events(surprise: np.ndarray, gamma: float, least: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the events of a text begin and end, (E,) each. surprise (M,): of the token behind each row's.

    One begins at each token that surprises the model, unless the event before it would have fewer than `least` tokens; and where one
    has `most`.
    """
    n, begins = len(surprise), [0]
    for begin in (np.flatnonzero(surprising(surprise[:-1], gamma)) + 1).tolist():
        begins += range(begins[-1] + most, begin, most)
        if begin - begins[-1] >= least:
            begins.append(begin)
    begins += range(begins[-1] + most, n, most)
    return np.array(begins, np.int64), np.array([*begins[1:], n], np.int64)


def even_blocks(n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the blocks of `size` in n tokens begin, at each multiple of `step_of(size)`, and where they end."""
    step = step_of(size)
    parts = size // step
    begins = np.arange(max(1, -(-n // step) - parts + 1)) * step
    return begins, np.minimum(begins + parts * step, n)


def scores_of(asked: np.ndarray, tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray, b: float = 0.0) -> np.ndarray:
    """What the blocks of tokens (M,) that begin and end there, (E,) each, share with tokens `asked`: Okapi BM25, (E,).

    A token that f of a block's are counts idf * f * (k1 + 1) / (f + k1 * (1 - b + b * l)), k1 = 1.2; idf = log(1 + (n - d + 0.5) /
    (d + 0.5)) of n blocks, d of which have it; l: how long the block is, divided by the mean. Of tokens -1 is none.
    """
    score = np.zeros(len(begins))
    lengths = ends - begins
    k1 = 1.2 * (1 - b + b * lengths / max(lengths.mean(), 1))
    for token in np.unique(asked[asked >= 0]):
        at = np.flatnonzero(tokens == token)
        often = np.searchsorted(at, ends) - np.searchsorted(at, begins)
        having = np.count_nonzero(often)
        score += np.log(1 + (len(begins) - having + 0.5) / (having + 0.5)) * often * 2.2 / (often + k1)
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
    """The tokens of rows as rows of a bank: the id is the first number of each, the surprise of the token behind it the second."""
    rows = np.zeros((*new.valid.shape, dims.d_model), dims.dtype)
    rows[..., 0] = -1 if new.tokens is None else new.tokens
    if new.surprise is not None:
        rows[..., 1] = new.surprise
    return dataclasses.replace(new, layer=TOKENS, hidden=rows)


@hookimpl
def register_memories(register):
    register("blocks", Blocks)
