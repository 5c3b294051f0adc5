"""Writes goldens.json: what Transformers makes of small random models and of logits. Needs the extra `peers`.

python tests/generate/goldens.py
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import transformers_models as models  # noqa: E402
import transformers_processors as processors  # noqa: E402

FILE = Path(__file__).with_name("goldens.json")
ROWS = 3  # of logits, for each of seven lengths
MANY_ENDS = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 3.0, "early_stopping": "never", "max_new_tokens": 6}
CASES = [*models.BEAMS[::5], *models.BEAMS[22:24], models.BEAMS[-1], {**MANY_ENDS, "eos_token_id": list(range(4, 40))}]


def processed(name, process):
    """For each row: which tokens are left, as a string, and their scores where they are not the logits."""
    rows = []
    for ids, logits in processors.trials(ROWS):
        scores = process(name, ids, logits)
        if name in processors.CUT_EQUALS:
            scores, logits = np.sort(scores, axis=1), np.sort(logits, axis=1)
        for row, before in zip(scores, logits, strict=True):
            left = np.isfinite(row)
            changed = row[left & (row != before)]
            rows.append(["".join("01"[int(each)] for each in left), [float(f"{each:.7g}") for each in changed]])
    return rows


def main():
    beams = []
    for kind in models.KINDS:
        peer = models.theirs(kind)
        for options in CASES:
            sequences, scores = models.generated(peer, kind, *models.inputs(kind), **dict(options))
            beams.append({"kind": kind, "options": options, "sequences": sequences, "scores": scores})
    left = {name: processed(name, processors.theirs) for name in processors.PROCESSORS}
    FILE.write_text(json.dumps({"beams": beams, "processors": left}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
