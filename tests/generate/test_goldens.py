"""What Transformers generated, without it: goldens.json, written by goldens.py. test_peers.py compares far more."""

import json

import goldens
import numpy as np
import pytest
import transformers_models as models
import transformers_processors as processors

GOLDENS = json.loads(goldens.FILE.read_text())
CASES = [(case["kind"], case["options"]) for case in GOLDENS["beams"]]


def test_the_cases_are_those_of_the_script():
    assert [(kind, options) for kind in models.KINDS for options in goldens.CASES] == CASES
    assert list(GOLDENS["processors"]) == list(processors.PROCESSORS)


@pytest.mark.parametrize("kind", models.KINDS)
def test_beams_are_those_of_transformers(kind):
    model = models.ours(kind)
    for case in GOLDENS["beams"]:
        if case["kind"] != kind:
            continue
        options = {"eos_token_id": models.ENDS, "output_scores": True, **case["options"]}
        found = model.generate(*models.inputs(kind), **options)
        is_nested = case["options"].get("num_return_sequences", 1) > 1
        assert (found.sequences if is_nested else [[one] for one in found.sequences]) == case["sequences"], case["options"]
        if case["scores"] is not None:
            np.testing.assert_allclose(np.ravel(found.sequences_scores), np.ravel(case["scores"]), atol=1e-4)


@pytest.mark.parametrize("name", processors.PROCESSORS)
def test_processors_are_those_of_transformers(name):
    for (left, scores), (wanted, expected) in zip(goldens.processed(name, processors.ours), GOLDENS["processors"][name], strict=True):
        assert left == wanted
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
