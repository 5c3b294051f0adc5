"""blocks: what a question finds, that the answer keeps it, and that it outlives the process."""

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm import pipeline
from mini_tfm.errors import InvalidValue
from mini_tfm.generate import Session
from mini_tfm.memory import bank_key
from mini_tfm.stream import Stream
from mini_tfm.testing import check_memory
from mini_tfm.testing.trial import small_model
from mini_tfm.text import ByteTokenizer
from mini_tfm_plugins import blocks
from mini_tfm_plugins.blocks import CHOICE, FOCUS, best_of, even_blocks, events, scores_of, surprising

TEXT = "window:size=4+blocks:block_size=4,margin=0,top_k=2,reach=4"
EVENTS = "window:size=4+blocks:cut=surprise,block_size=9,min_size=2,gamma=0.5,margin=0,top_k=1,reach=4"


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


def asked(stream, prompt=((20,),), n=3):
    """The session that was asked, and its outputs at each of n steps."""
    stream = stream.copy()
    stream.open(None, np.full(stream.run.batch, len(prompt[0]) + n))
    session = Session(stream)
    outputs = [session.step(np.broadcast_to(np.array(prompt), (stream.run.batch, len(prompt[0]))))]
    outputs += [session.step(np.full((stream.run.batch, 1), 5 + t)) for t in range(n)]
    return session, np.stack(outputs, axis=1)


def chosen(session, name="rows"):
    return session.stream.run.states[1][CHOICE + name]


EFFECTS = ["has_effect", "generation_equals_reading", "every_place_counts", "other_models", "takes_what_is_dropped", "helps"]


@pytest.mark.usefixtures("short_streams")
def test_the_kit_passes_but_for_what_only_questions_show():
    """Nothing is looked up while text is read, and a question looks up by all its tokens."""
    check_memory("blocks:block_size=2,margin=1,top_k=2,reach=4", skip=EFFECTS)


@pytest.mark.usefixtures("short_streams")
def test_the_kit_passes_where_text_looks_up_by_what_was_before_it():
    """Generation equals reading, too, and nothing of a segment's own tokens is used."""
    check_memory("blocks:block_size=2,margin=0,top_k=2,by=text", skip=["every_place_counts", "other_models", "takes_what_is_dropped"])


@pytest.mark.usefixtures("short_streams")
@pytest.mark.parametrize("by", ["text", pytest.param("prompt", marks=pytest.mark.long)])
def test_the_kit_passes_where_surprise_cuts(by):
    skipped = ["every_place_counts", "other_models", "takes_what_is_dropped"] if by == "text" else EFFECTS
    check_memory(f"blocks:cut=surprise,block_size=4,min_size=2,margin=0,top_k=2,by={by}", skip=skipped)


def test_text_looks_up_by_the_tokens_before_its_segment():
    tokens = texts(1)
    tokens[0, 30:35] = 20
    stream = stream_with(f"{TEXT},by=text", 1, tokens[:, :35])
    assert stream.run.states[1]["recent"][0, -35:].tolist() == [1, *tokens[0, :34]]
    stream.run.states[1]["recent"] = np.full((1, 512), 20)
    for prompt in ((20,), (5,)):
        assert 10 in chosen(asked(stream, (prompt,))[0])[0]
    stream.run.states[1]["recent"] = np.full((1, 512), -1)
    assert (chosen(asked(stream)[0]) == -1).all()


def scores_by_hand(asked, blocks, b):
    """BM25 as its formula is written, block by block."""
    scores, mean = np.zeros(len(blocks)), np.mean([len(block) for block in blocks])
    for token in set(asked.tolist()) - {-1}:
        d = sum(token in block for block in blocks)
        idf = np.log(1 + (len(blocks) - d + 0.5) / (d + 0.5))
        for i, block in enumerate(blocks):
            f = block.count(token)
            scores[i] += idf * f * (1.2 + 1) / (f + 1.2 * (1 - b + b * len(block) / mean))
    return scores


@pytest.mark.parametrize(("size", "step"), [(3, 1), (4, 1), (8, 2), (16, 4)])
@pytest.mark.parametrize("n", [1, 15, 16, 40])
def test_scores_are_those_of_the_formula(size, step, n):
    rng = np.random.default_rng(n)
    tokens, asked = rng.integers(0, 12, n), np.array([3, 5, 5, 30, -1])
    blocks = [tokens[begin : begin + size].tolist() for begin in range(0, max(1, len(tokens) - size + step), step)]
    np.testing.assert_allclose(scores_of(asked, tokens, *even_blocks(n, size)), scores_by_hand(asked, blocks, 0), atol=1e-12)


def test_scores_of_unequal_blocks_are_those_of_the_formula():
    tokens, asked = np.random.default_rng(1).integers(0, 12, 40), np.array([3, 5, 5, 30, -1])
    begins = np.array([0, 3, 17, 20, 38])
    blocks = [part.tolist() for part in np.split(tokens, begins[1:])]
    np.testing.assert_allclose(scores_of(asked, tokens, begins, np.append(begins[1:], 40), 0.75), scores_by_hand(asked, blocks, 0.75))


def surprising_by_hand(surprise, gamma, window):
    """Equations 1 and 2 of arXiv 2407.09450, token by token: -log p(x_t | x_1 ... x_(t-1)) > T, T = mu + gamma sigma of those before."""
    found = []
    for t, value in enumerate(surprise):
        before = surprise[max(0, t - window) : t]
        mu = sum(before) / max(len(before), 1)
        sigma = (sum((x - mu) ** 2 for x in before) / max(len(before), 1)) ** 0.5
        found.append(t > 0 and value > mu + gamma * sigma)
    return found


def events_by_hand(surprise, gamma, window, least, most):
    """Row by row: where each event begins. A row's surprise is that of the token behind it."""
    boundary, begins = surprising_by_hand(surprise, gamma, window), [0]
    for row in range(1, len(surprise)):
        length = row - begins[-1]
        if length == most or (length >= least and boundary[row - 1]):
            begins.append(row)
    return begins


@pytest.mark.parametrize("window", [1, 7, 512])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
def test_events_are_those_of_the_equations(gamma, window, monkeypatch):
    monkeypatch.setattr(blocks, "BEFORE", window)
    for n, least, most in ((1, 1, 3), (2, 2, 2), (60, 1, 60), (61, 5, 9), (300, 8, 128), (300, 3, 7)):
        surprise = np.random.default_rng(n).exponential(3, n)
        assert surprising(surprise, gamma).tolist() == surprising_by_hand(surprise, gamma, window)
        begins, ends = events(surprise, gamma, least, most)
        assert begins.tolist() == events_by_hand(surprise, gamma, window, least, most)
        assert ends.tolist() == [*begins[1:], n] and (ends - begins).max() <= most and (ends - begins)[:-1].min(initial=least) >= least
    assert [part.tolist() for part in events(np.zeros(0), gamma, 2, 4)] == [[0], [0]]


def test_what_comes_later_moves_no_boundary():
    surprise = np.random.default_rng(0).exponential(3, 400)
    whole = events(surprise, 1.0, 4, 32)[0]
    for n in (1, 50, 399):
        np.testing.assert_array_equal(
            events(np.append(surprise[:n], np.full(50, 99.0)), 1.0, 4, 32)[0][: (whole < n).sum()], whole[whole < n]
        )


def surprises_of(tokens, text="window:size=4", length=5):
    """Of each token (B, n), as the model with this memory predicts it."""
    stream, found = Stream(small_model("decoder-only"), mt.memory(text), len(tokens)), []
    for start in range(0, tokens.shape[1], length):
        segment = tokens[:, start : start + length]
        stream.open(None, lengths := np.full(len(tokens), length), segment)
        found.append(-np.take_along_axis(stream.log_probs(stream.decode(segment, lengths)), segment[..., None], 2)[..., 0])
        stream.finish()
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_question_sees_the_event_that_holds_what_it_is_asked_for(gamma):
    session, _ = asked(stream_with(EVENTS.replace("gamma=0.5", f"gamma={gamma}")))
    lengths = []
    for b, place in enumerate((10, 23)):
        begins = [*events_by_hand(surprises_of(texts())[b].tolist(), gamma, 512, 2, 9), 40]
        lengths += np.diff(begins).tolist()
        begin = max(at for at in begins if at <= place)
        rows = range(begin, min(36, begins[begins.index(begin) + 1]))  # the window holds the last four
        assert chosen(session)[b].tolist() == [*rows, *[-1] * (9 - len(rows))]
    assert len(set(lengths)) > 4  # of many lengths, or nothing was tested


def test_a_margin_is_read_with_an_event():
    rows, more = (chosen(asked(stream_with(EVENTS.replace("margin=0", f"margin={margin}")))[0]) for margin in (0, 3))
    for b in range(2):
        first, last = rows[b][rows[b] >= 0][[0, -1]]
        assert more[b][more[b] >= 0].tolist() == list(range(max(0, first - 3), last + 4))


def test_a_text_that_was_read_without_surprises_is_cut_at_each_block_size(tmp_path):
    path = f"path={tmp_path / 'rows'},resume=0"
    stream_with(f"{TEXT},{path}", 1, texts(1)).run.flush()
    again = Stream(small_model("decoder-only"), mt.memory(f"{EVENTS},{path}"), 1)
    assert chosen(asked(again)[0])[0].tolist() == list(range(9, 18))


def test_another_gamma_cuts_what_is_on_disk_anew(tmp_path):
    path, tokens = f"path={tmp_path / 'rows'},resume=0", texts(1)
    stream_with(f"{EVENTS},{path}", 1, tokens).run.flush()
    found = []
    for gamma in (0.5, 30.0):
        text = EVENTS.replace("gamma=0.5", f"gamma={gamma}")
        found.append(chosen(asked(Stream(small_model("decoder-only"), mt.memory(f"{text},{path}"), 1))[0])[0].tolist())
        assert found[-1] == chosen(asked(stream_with(text, 1, tokens))[0])[0].tolist()
    assert found[0] != found[1] == list(range(9, 18))


def test_the_best_blocks_do_not_overlap_and_have_text_on_either_side():
    assert best_of(np.array([0, 0, 1, 1, 1, 1, 0, 0, 0.5, 0]), 4, 2).tolist() == [3, 8]  # 2 to 5 are alike, of 4 tokens each
    assert best_of(np.array([0, 2, 1, 1, 1, 1.5]), 4, 2).tolist() == [1, 5]
    assert best_of(np.array([0, 2, 1, 1, 1, 1.5]), 16, 2).tolist() == [4, 20]
    assert best_of(np.array([0, 2, 1, 1, 0, 0]), 4, 2).tolist() == [1]
    assert best_of(np.zeros(3), 4, 2).tolist() == []


def test_each_stream_sees_the_blocks_that_hold_what_it_is_asked_for():
    stream = stream_with()
    session, _ = asked(stream)
    for b, place in enumerate((10, 23)):  # a row's token is the one before: the first is bos
        rows = chosen(session)[b]
        assert rows[:4].tolist() == [place - 2, place - 1, place, place + 1] and (rows[4:] == -1).all()
    hidden = stream.run.states[1]["decoder.1.0.hidden"]
    gathered = chosen(session, "decoder.1.")
    np.testing.assert_array_equal(gathered[:, :4], np.take_along_axis(hidden, chosen(session)[:, :4, None], 1))


def test_a_margin_is_read_with_a_block():
    session, _ = asked(stream_with(TEXT.replace("margin=0", "margin=3")))
    for b, place in enumerate((10, 23)):
        assert chosen(session)[b, :10].tolist() == list(range(place - 5, place + 5))
    assert chosen(asked(stream_with(TEXT.replace("margin=0", "margin=30")), ((20,),))[0])[0, :36].tolist() == list(
        range(36)
    )  # the window has 4


def test_where_rare_tokens_stand_together_is_emphasized():
    tokens = texts()
    tokens[:, 30] = 21  # one more that is asked for, away from the first in stream 0, and near it in stream 1
    text = TEXT.replace("block_size=4,margin=0,top_k=2", "block_size=36,top_k=1,margin=0,emphasis=1.5")
    session, outputs = asked(stream_with(text, tokens=tokens), ((20, 21, 22),))
    bias, rows = chosen(session, "bias"), chosen(session)
    assert bias.shape == (2, 1, 1, 36) and (rows[:, 0] == 0).all()
    for b, place in enumerate((10, 23)):
        near = np.array([sum(max(0, 1 - abs(i - at) / FOCUS) for at in (place, 31)) for i in range(36)])
        np.testing.assert_allclose(bias[b, 0, 0], 1.5 * near / near.max(), atol=1e-12)
    plain = asked(stream_with(text.replace("emphasis=1.5", "emphasis=0"), tokens=tokens), ((20, 21, 22),))[1]
    assert np.abs(outputs - plain).max() > 1e-3


def test_the_rows_that_a_window_keeps_for_good_are_part_of_the_text():
    tokens = texts(1)
    tokens[0, 1] = 21
    session, _ = asked(stream_with(TEXT.replace("size=4+", "size=8,sinks=4+"), 1, tokens), ((21,),))
    assert chosen(session)[0, :4].tolist() == [1, 2, 3, 4]  # the token at place 1 is row 2's, and 4 rows are sinks


def test_what_the_window_still_holds_is_not_seen_twice():
    tokens = texts(1)
    tokens[0, 38] = 21
    stream = stream_with(batch=1, tokens=tokens)
    session, outputs = asked(stream, ((21,),))
    assert (chosen(session) == -1).all()  # and no other block in its place
    np.testing.assert_array_equal(outputs, asked(stream_with("window:size=4", 1, tokens), ((21,),))[1])
    assert stream.run.states[1]["free"] == 36
    stream.run.drain()
    assert stream.run.states[1]["free"] == 40


def test_what_was_found_stands_before_the_segment():
    session, _ = asked(stream_with(TEXT.replace("margin=0", "margin=2")))
    expected = 40 - 4 - np.arange(7, -1, -1)
    for b in range(2):
        np.testing.assert_array_equal(chosen(session, "positions")[b, :8], expected)


@pytest.mark.parametrize(("prompt", "last"), [((20,), 40), ((20, 23, 23, 23), 42), ((20,) + (23,) * 30, 43)])
def test_what_was_found_is_read_no_further_than_the_middle_of_a_prompt(prompt, last):
    session, _ = asked(stream_with(TEXT.replace("reach=4", "reach=-3")), (prompt,))
    assert (chosen(session, "positions")[:, 3] == last).all()  # of 4 rows


def test_an_answer_keeps_what_the_question_found():
    session, _ = asked(stream_with())
    before, step = dict(session.stream.run.states[1]), session.step(np.full((2, 1), 20))
    after = session.stream.run.states[1]
    assert all(after[name] is before[name] for name in after)
    session.reorder(np.array([1, 1, 0]))
    np.testing.assert_array_equal(chosen(session), before[CHOICE + "rows"][[1, 1, 0]])
    assert np.isfinite(step).all()


def test_a_question_is_answered_with_it_and_otherwise_without():
    stream, plain = stream_with(), stream_with("window:size=4")
    for prompt, differs in ((((3, 20),), True), (((23, 23),), False)):
        difference = np.max(np.abs(asked(stream, prompt)[1] - asked(plain, prompt)[1]))
        assert difference > 1e-3 if differs else difference == 0


@pytest.mark.parametrize("text", [TEXT, EVENTS])
def test_a_stream_is_answered_as_if_it_were_alone(text):
    together = asked(stream_with(text))[1]
    for b in range(2):
        alone = asked(stream_with(text, batch=1, tokens=texts()[b : b + 1]))[1]
        np.testing.assert_allclose(alone[0], together[b], atol=1e-10)


@pytest.mark.parametrize("text", [TEXT, EVENTS])
def test_a_pause_leaves_no_gap_in_a_stream(text):
    """Streams of a batch read at their own pace; rows of the others are no part of a block."""
    tokens = texts()
    stream = Stream(small_model("decoder-only"), mt.memory(text), 2)
    for start in range(0, 40, 5):
        stream.read(tokens[:, start : start + 5], np.array([5, 5]))
        stream.read(tokens[:, start : start + 3], np.array([3, 0]))
    alone = stream_with(text, batch=1, tokens=tokens[1:])
    np.testing.assert_allclose(asked(stream)[1][1], asked(alone)[1][0], atol=1e-10)
    ours, theirs = stream.run.recall(np.array([[20], [20]]))[1], alone.run.recall(np.array([[20]]))[0]
    assert [(one.position, one.tokens.tolist()) for one in ours] == [(one.position, one.tokens.tolist()) for one in theirs]


@pytest.mark.parametrize("text", [TEXT, EVENTS])
def test_rows_on_disk_are_found_by_another_stream(text, tmp_path):
    """As by another process: nothing is known but the file."""
    path = f"{text},path={tmp_path / 'rows'}"
    tokens = texts(1)
    stream = stream_with(path, 1, tokens)
    in_ram = asked(stream_with(text, batch=1, tokens=tokens))
    np.testing.assert_array_equal(chosen(asked(stream)[0]), chosen(in_ram[0]))
    stream.run.flush()
    assert mt.memory(path).documents() == {"default": 40 * 3}  # with what the window holds
    on_disk = asked(stream)
    np.testing.assert_array_equal(chosen(on_disk[0]), chosen(in_ram[0]))
    np.testing.assert_allclose(on_disk[1], in_ram[1], atol=1e-5)  # rows on disk are float32
    again = Stream(small_model("decoder-only"), mt.memory(path + ",resume=0"), 1)
    session, _ = asked(again)
    np.testing.assert_array_equal(chosen(session), chosen(in_ram[0]))
    np.testing.assert_allclose(chosen(session, "decoder.1."), chosen(on_disk[0], "decoder.1."), atol=1e-6)
    stream.run.drain()
    stream.run.flush()
    assert mt.memory(path).documents() == {"default": 40 * 3}


@pytest.mark.parametrize("place", [1, 9, 36])
def test_another_process_answers_as_the_one_that_has_read(tmp_path, place):
    """The fact among the sinks, between them and the window, and in the window: the same rows at the same distances."""
    tokens = texts(1)
    tokens[0, [9, place]] = 3, 20
    path = f"window:size=12,sinks=4+blocks:block_size=4,margin=1,resume=12,path={tmp_path / 'rows'}"
    stream = stream_with(path, 1, tokens)
    stream.run.flush()
    again = Stream(small_model("decoder-only"), mt.memory(path), 1)
    np.testing.assert_allclose(asked(again)[1], asked(stream)[1], atol=1e-5)
    ours, theirs = (each.run.recall(np.array([[20]]))[0] for each in (again, stream))
    assert [(one.position, one.tokens.tolist()) for one in ours] == [(one.position, one.tokens.tolist()) for one in theirs]
    assert np.abs(asked(again)[1] - asked(stream_with("window:size=12", 1, tokens[:, :0]))[1]).max() > 1e-3
    again.read(tokens[:, :5], np.array([5]))
    session = asked(again, ((23,),))[0]
    assert (chosen(session) == -1).all()  # a window of its own by now


def test_what_waits_for_the_disk_is_bounded_in_bytes(tmp_path, monkeypatch):
    """However long a text, and however much of it 16 segments are: RAM is that of a few segments."""
    config = mt.Config(vocab_size=259, d_model=16, n_heads=2, n_encoder_layers=0, n_decoder_layers=2, positions="rotary")
    model = mt.Transformer(config)
    pipe = mt.Pipeline(model, ByteTokenizer(), f"window:size=8+blocks:path={tmp_path / 'rows'}", segment_length=16)
    a_segment = 3 * 16 * (4 * model.config.d_model + 16)
    waiting, flush = [], pipe._stream.run.flush
    monkeypatch.setattr(pipeline, "FLUSH_BYTES", 3 * a_segment)
    monkeypatch.setattr(pipe._stream.run, "flush", lambda: waiting.append(pipe.state_bytes()) or flush())
    told = []
    pipe.read("the cat sleeps. " * 64, durable=told.append)
    kept = pipe.state_bytes()
    assert len(waiting) > 8 and max(waiting) <= kept + 5 * a_segment
    assert told[-1] == 1024 and told == sorted(told) and len(told) == len(waiting)
    assert mt.memory(f"blocks:path={tmp_path / 'rows'}").documents() == {"default": 3 * 1024}


def test_what_is_recalled_is_told(tmp_path):
    tokens = texts(2)
    for text, document in ((TEXT, None), (f"{TEXT},document=book,path={tmp_path / 'rows'}", "book")):
        stream = stream_with(text, 1, tokens[:1])
        stream.run.flush()
        ((passage,),) = stream.run.recall(np.array([[3 + 30, 20]]))
        assert (passage.document, passage.position, passage.layers) == (document, 8, 2)
        np.testing.assert_array_equal(passage.tokens, tokens[0, 7:11])
    found = stream_with(tokens=tokens).run.recall(np.array([[20], [20]]))
    assert [[one.position for one in part] for part in found] == [[8], [21]]
    assert stream_with().run.recall(np.array([[23], [23]])) == [[], []]
    assert Stream(small_model("decoder-only"), mt.memory(TEXT), 2).run.recall(np.array([[20], [20]])) == [[], []]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("block_size", ["0", "1.5", "true"]),
        ("margin", ["-1", "1.5", "true"]),
        ("resume", ["-1", "1.5", "true"]),
        ("reach", ["1.5", "true"]),
        ("top_k", ["0", "1.5", "true"]),
        ("by", ["1", "none"]),
        ("emphasis", ["-1", "101", "true", "much"]),
        ("cut", ["1", "none", "surprising"]),
        ("gamma", ["-1", "101", "true", "much"]),
        ("min_size", ["0", "1.5", "true", "129,cut=surprise"]),
    ],
)
def test_options_are_checked(name, values):
    for value in values:
        with pytest.raises(InvalidValue, match=name):
            mt.memory(f"blocks:{name}={value}")


def test_tokens_are_a_bank_of_their_own():
    memory = mt.memory("blocks")
    assert memory.banks(Stream(small_model("decoder-only"), memory, 1).run.dims[0])[-1] == bank_key("decoder", "tokens")
