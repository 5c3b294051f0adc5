"""window: working memory. The last `size` rows, and the first `sinks` of the stream for ever.

StreamingLLM (arXiv 2309.17453): the first few tokens draw attention whatever they say; keeping them keeps the
softmax as it was trained. Sinks count within `size`, and a row's place is counted inside the window (section 3.2), or sinks
would move further away for ever, to distances that no model has seen.
"""

import dataclasses

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import RowMemory, Segment, State, View, hookimpl


class Window(RowMemory):
    """Working memory: the last `size` rows; the stream's first `sinks` rows stay.

    positions: "cache" counts the rows' places inside the window, back from the newest; "true" leaves them where they stood in
    the stream. They differ for sinks alone, in models with rotary or relative positions.

    gradient: "rows" trains the segments that made the rows, too; "none" stops there.
    """

    def __init__(self, *, size: int = 512, sinks: int = 0, site: str | None = None, positions: str = "cache", gradient: str = "rows"):
        super().__init__(size=size, site=site, gradient=gradient)
        if not isinstance(sinks, int) or not 0 <= sinks < size:
            raise InvalidValue(f"sinks: expected 0 to size - 1 = {size - 1}, got {shown(sinks)}")
        if positions not in ("cache", "true"):
            raise InvalidValue(f"positions: expected cache or true, got {shown(positions)}")
        self.sinks, self.positions = sinks, positions

    def keep(self, scores: np.ndarray | None, positions: np.ndarray) -> np.ndarray:
        return np.where(positions < self.sinks, np.inf, positions)

    def view(self, state: State, site: str, layer: int, segment: Segment) -> View | None:
        view = super().view(state, site, layer, segment)
        if view is None or not self.sinks or self.positions == "true":
            return view
        # Rows from each one to the window's end, itself included. Every token that is decoded asks: a full window is counted quickly.
        full = bool(view.valid.all())
        behind = np.arange(view.valid.shape[1], 0, -1) if full else np.cumsum(view.valid[:, ::-1], axis=1)[:, ::-1]
        newest = (view.positions if full else np.where(view.valid, view.positions, 0)).max(axis=1, keepdims=True)
        return dataclasses.replace(view, positions=newest + 1 - behind)


@hookimpl
def register_memories(register):
    register("window", Window)
