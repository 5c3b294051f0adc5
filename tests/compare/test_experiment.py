"""An experiment: a budget in steps, the same figures again, and a memory that fails is a row."""

import dataclasses
import json
import math

import pytest
from experiments import small_experiment

from mini_tfm.cli import results
from mini_tfm.compare import experiment as module
from mini_tfm.compare.experiment import failed, over_seeds, run_experiment
from mini_tfm.errors import InvalidValue
from mini_tfm.pipeline import Pipeline

DOCUMENTS = {f"{i}": f"Document {i}. The quick brown fox jumps over the lazy dog {i} times, {i * i} or more. " * 30 for i in range(12)}
SMALL = {"vocab_size": 300, "segment_length": 48, "d_model": 8, "n_heads": 2, "d_ff": 8}


def figures(experiment):
    return [(row.memory, row.bits_per_byte, row.recall, row.steps, row.history) for row in experiment.rows]


@pytest.mark.parametrize("has_encoder", [True, False])
def test_the_same_steps_are_the_same_figures(tmp_path, monkeypatch, has_encoder):
    options = {"steps": 2, "config": {**SMALL, "n_encoder_layers": int(has_encoder)}, "progress": False}
    lines = []
    first = run_experiment(DOCUMENTS, ["window:size=8"], tmp_path / "a", report=lines.append, **options)
    assert first.cut_short is None and first.steps == 2 and [row.steps for row in first.rows] == [2]
    assert any("2 steps for each memory: about " in line for line in lines)
    assert not any(math.isnan(share) for share in first.rows[0].recall.values())
    pipe = Pipeline.load(first.rows[0].folder)
    scores = [pipe.score(DOCUMENTS[name]) for name in first.held_out_names]
    assert first.rows[0].bits_per_byte == pytest.approx(
        sum(each["bits"] for each in scores) / sum(each["bytes"] for each in scores), rel=1e-5
    )
    monkeypatch.setattr(module, "start_pace", lambda *what: 1e9)  # a machine that is busy now
    assert figures(run_experiment(DOCUMENTS, ["window:size=8"], None, **options)) == figures(first)
    short = run_experiment(DOCUMENTS, ["window:size=8"], None, seconds=1, **options)
    assert short.steps == 1 == short.start_steps and short.cut_short.startswith("cut short: 1 of 2 steps")


def test_the_budget_that_help_shows_is_the_one_there_is():
    assert results.EXPERIMENT_STEPS == module.STEPS


def test_what_cannot_be_trained_is_refused_before_any_work():
    for config, told in (({"n_decoder_layers": 0}, "expected a decoder"), ({"d_modl": 8}, "did you mean 'd_model'")):
        with pytest.raises(InvalidValue, match=told):
            run_experiment(DOCUMENTS, [None], None, config=config)


def test_several_seeds_are_their_mean_and_a_failure_is_named():
    options = {"report": lambda line: None}
    first = small_experiment(DOCUMENTS, [None, "window"], None, seed=3, **options)
    second = small_experiment(DOCUMENTS, [None, "window"], None, seed=4, **options)
    second.rows[0] = dataclasses.replace(second.rows[0], bits_per_byte=3.0)
    second.rows[1] = failed("window", "no rows")
    both = over_seeds([first, second])
    assert both.seeds == [3, 4] and both.rows[0].bits_per_byte == 2.5 and both.rows[0].spread["bits_per_byte"] == 0.5
    assert both.rows[1].error == "seed 4: no rows" and both.failed == [both.rows[1]]
    assert both.rows[1].bits_per_byte == first.rows[1].bits_per_byte
    json.dumps(both.to_dict(), default=str)
