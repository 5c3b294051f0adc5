"""blocks: what a question finds, that the answer keeps it, and that it outlives the process."""

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.errors import InvalidValue
from mini_tfm.generate import Session
from mini_tfm.memory import State
from mini_tfm.stream import Stream
from mini_tfm.testing import check_memory
from mini_tfm.testing.trial import small_model
from mini_tfm_plugins.blocks import best_blocks

TEXT = "window:size=4+blocks:block_size=4,top_k=2,reach=4"


def texts(batch=2, n=40):
    """Tokens 3 to 12; token 20 stands at place 9 of the first text and 22 of the second."""
    tokens = np.random.default_rng(0).integers(3, 13, (batch, n))
    for b in range(batch):
        tokens[b, 9 + 13 * b] = 20
    return tokens


def stream_with(text=TEXT, batch=2, tokens=None, length=5):
    stream = Stream(small_model("decoder-only"), mt.memory(text), batch)
    tokens = texts(batch) if tokens is None else tokens
    for start in range(0, tokens.shape[1], length):
        stream.read(tokens[:, start : start + length], np.full(batch, length))
    return stream


def asked(stream, prompt=((3, 20),), n=3):
    """The session that was asked, and its outputs at each of n steps."""
    stream = stream.copy()
    stream.open(None, np.full(stream.run.batch, len(prompt[0]) + n))
    session = Session(stream)
    outputs = [session.step(np.broadcast_to(np.array(prompt), (stream.run.batch, len(prompt[0]))))]
    outputs += [session.step(np.full((stream.run.batch, 1), 5 + t)) for t in range(n)]
    return session, np.stack(outputs, axis=1)


def chosen(session):
    return session.stream.run.states[1][State.OF_SEGMENT + "rows"]


EFFECTS = ["has_effect", "generation_equals_reading", "every_place_counts", "other_models", "takes_what_is_dropped", "helps"]


def test_the_kit_passes_but_for_what_only_questions_show():
    """Nothing is looked up while text is read, and a question looks up by all its tokens."""
    check_memory("blocks:block_size=2,top_k=2,reach=4", skip=EFFECTS)


def test_blocks_with_the_rarest_words_are_found():
    tokens = np.array([5, 6, 7, 5, 6, 8, 5, 6, 6, 5, 9, 9, 9, 6])
    assert best_blocks(np.array([8]), tokens, 3, 2).tolist() == [1]
    assert best_blocks(np.array([6, 8, 30]), tokens, 3, 2).tolist() == [1, 2]  # 6 is in each: twice in block 2
    assert best_blocks(np.array([9]), tokens, 3, 1).tolist() == [3]  # twice beats once
    assert best_blocks(np.array([30, -1]), tokens, 3, 2).tolist() == []
    assert best_blocks(np.array([3]), np.zeros(0, np.int64), 3, 2).tolist() == []


def test_each_stream_sees_the_blocks_that_hold_what_it_is_asked_for():
    stream = stream_with()
    session, _ = asked(stream)
    for b, place in enumerate((10, 23)):  # a row's token is the one before: the first is bos
        rows = chosen(session)[b]
        assert place in rows and np.array_equal(rows, np.sort(rows))
    hidden = np.concatenate([stream.run.states[1][f"decoder.1.{n}.hidden"] for n in (0,)], axis=1)
    gathered = session.stream.run.states[1][State.OF_SEGMENT + "decoder.1.hidden"]
    np.testing.assert_array_equal(gathered, np.take_along_axis(hidden, chosen(session)[..., None], 1))


def test_what_was_found_stands_before_the_segment():
    session, _ = asked(stream_with())
    positions = session.stream.run.states[1][State.OF_SEGMENT + "decoder.0.positions"]
    np.testing.assert_array_equal(positions, np.tile(40 - 4 - np.arange(7, -1, -1), (2, 1)))


def test_an_answer_keeps_what_the_question_found():
    session, _ = asked(stream_with())
    before, step = dict(session.stream.run.states[1]), session.step(np.full((2, 1), 20))
    after = session.stream.run.states[1]
    assert all(after[name] is before[name] for name in after)
    session.reorder(np.array([1, 1, 0]))
    np.testing.assert_array_equal(chosen(session), before[State.OF_SEGMENT + "rows"][[1, 1, 0]])
    assert np.isfinite(step).all()


def test_a_question_is_answered_with_it_and_otherwise_without():
    stream, plain = stream_with(), stream_with("window:size=4")
    for prompt, differs in ((((3, 20),), True), (((23, 23),), False)):
        difference = np.max(np.abs(asked(stream, prompt)[1] - asked(plain, prompt)[1]))
        assert difference > 1e-3 if differs else difference == 0


def test_a_stream_is_answered_as_if_it_were_alone():
    together = asked(stream_with())[1]
    for b in range(2):
        alone = asked(stream_with(batch=1, tokens=texts()[b : b + 1]))[1]
        np.testing.assert_allclose(alone[0], together[b], atol=1e-10)


def test_rows_on_disk_are_found_by_another_stream(tmp_path):
    """As by another process: nothing is known but the file."""
    path = f"{TEXT},path={tmp_path / 'rows'}"
    tokens = texts(1)
    stream = stream_with(path, 1, tokens)
    in_ram = asked(stream_with(batch=1, tokens=tokens))
    np.testing.assert_array_equal(chosen(asked(stream)[0]), chosen(in_ram[0]))
    stream.run.flush()
    on_disk = asked(stream)
    np.testing.assert_array_equal(chosen(on_disk[0]), chosen(in_ram[0]))
    np.testing.assert_allclose(on_disk[1], in_ram[1], atol=1e-5)  # rows on disk are float32
    stream.run.drain()
    stream.run.flush()
    again = Stream(small_model("decoder-only"), mt.memory(path), 1)
    session, _ = asked(again)
    assert 10 in chosen(session)
    wanted = State.OF_SEGMENT + "decoder.1.hidden"
    np.testing.assert_allclose(
        session.stream.run.states[1][wanted][0, :8],
        on_disk[0].stream.run.states[1][wanted][0, :8],
        atol=1e-6,
    )
    assert mt.memory(path).documents() == {"default": 40 * 3}


@pytest.mark.parametrize("name", ["block_size", "top_k", "reach"])
@pytest.mark.parametrize("value", ["0", "1.5", "true"])
def test_sizes_are_checked(name, value):
    with pytest.raises(InvalidValue, match=name):
        mt.memory(f"blocks:{name}={value}")
