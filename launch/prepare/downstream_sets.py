#!/usr/bin/env python3
"""Questions about long contexts, made of real text, for drrl-eval --examples.

    downstream_sets.py lastword --model DIR --input FILE... --out FILE.jsonl [--length 2048]
            [--near 256] [--count 500] [--together 1] [--seed 1]
    downstream_sets.py passkey --model DIR --input FILE... --out FILE.jsonl [--length 2048]
            [--count 200] [--seed 1]
    downstream_sets.py sentiment --model DIR --input FILE.tsv --out FILE.jsonl [--length 2048]
            [--count 1000] [--together 1] [--seed 1]

lastword, after LAMBADA: `length` tokens of one document, cut before a word of four letters or more
that stands at the end of a sentence or clause (before one of . , ; : ! ?). The word occurs in the
context, but not among its last `near` tokens, which low-rank attention sees exactly: whoever
remembers it has looked far back. Words whose tokens do not begin and end with them are left out. Of
all such places `count` are drawn, at most one of a sentence.

passkey: "The pass key is 48213. Remember it." in a haystack of `length` tokens of text, at depths
of 0.1, 0.2, .. 0.9 in turn, and the question at the end; the target is the five digits. Where both
are more tokens than the model's positions, the haystack is cut. Haystacks begin at random tokens of
the documents, put one after the other.

sentiment: is a sentence about a film negative or positive? Labelled sentences, as many as `length`
tokens hold (the first is cut), then one without its label, and both labels as targets. Sentences
whose mean rating is within 1 of neutral are left out, half of the questions are of each label, and
no question is among the labelled sentences of another. The input is of `prepare.py corpus --name
reviews`.

--together N: an example is `length` tokens with up to N questions in their second half, which a
model answers in one pass, as it predicts all tokens of a text from those before. Of last words,
texts begin half a `length` after each other, so that each place is in the second half of one only,
and N places are drawn of each; the word has occurred in the text, but not among its last `near`
tokens. Of sentences, the last N that fit into the second half of labelled ones are asked about.

Examples come in random order, so that the first N are a sample too; `seed` decides all that is
random, and the same inputs give the same file. FILE.jsonl.json says which tokenizer's the ids are.
Beside what drrl-eval reads, each question holds "word" and "distance" to its last occurrence
[tokens], "key" and "depth", or "sentence". Exit status: 0 written, 2 wrong usage, 3 wrong or
missing input.
"""

import argparse
import bisect
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

from drrl_prepare.documents import read_documents
from drrl_prepare.files import EXIT_BAD_INPUT, BadInput, write_atomically
from drrl_prepare.token_files import load_tokenizer, read_fields, vocabulary_note

ENDED_WORD = re.compile(r"(?<= )([A-Za-z]{4,})(?=[.,;:!?])")
SENTENCE_END = re.compile(r"[.!?]\s")
DEPTHS = [round(0.1 * i, 1) for i in range(1, 10)]
OPENING = "There is a pass key hidden in the following text. Find it and remember it.\n\n"
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "
REVIEW = "Review: {sentence}\nSentiment:"
LABELS = (" negative", " positive")


def read_named_documents(paths):
    """[(name, text)], named after their files; what would have the name of another one, such as a
    file's second document, is NAME-1, NAME-2, .."""
    documents = {}
    for path in paths:
        for text in read_documents(path):
            stem = Path(path).stem
            name = next(
                name
                for i in itertools.count()
                if (name := stem + (f"-{i}" if i else "")) not in documents
            )
            documents[name] = text
    if not documents:
        raise BadInput("no text in " + ", ".join(map(str, paths)))
    return list(documents.items())


def lastword_places(text, tokenizer, near):
    """The tokens of a document, and all its places as (sentence, first token, token after, word,
    distance)."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids, starts, ends = (
        encoding.ids,
        [a for a, _ in encoding.offsets],
        [b for _, b in encoding.offsets],
    )
    sentences = [match.end() for match in SENTENCE_END.finditer(text)]
    places, seen = [], {}  # seen: word -> token at which it occurred last
    for match in re.finditer(r"[A-Za-z]+", text):
        word, (begin, end) = match[0], match.span()
        first = bisect.bisect_right(starts, begin) - 1
        before, seen[word] = seen.get(word), first
        if before is None or not ENDED_WORD.match(text, begin):
            continue
        after = bisect.bisect_left(ends, end) + 1
        # The word's first token may hold the blank before it, as in GPT-2's vocabulary, and nothing
        # else.
        whole = starts[first] in (begin - 1, begin) and ends[after - 1] == end
        if whole and near < first - before:
            places.append((bisect.bisect(sentences, begin), first, after, word, first - before))
    return ids, places


def lastword_alone(documents, length, draw):
    """An example for each place with `length` tokens before it, all at the end of texts of their
    own, one of a sentence."""
    places = [
        (name, place)
        for name, (_, places) in documents.items()
        for place in places
        if place[4] <= length <= place[1]
    ]
    draw.shuffle(places)
    one_of_each = {}
    for name, (sentence, first, after, word, distance) in places:
        ids = documents[name][0]
        one_of_each.setdefault(
            (name, sentence),
            {
                "id": f"{name}:{first}",
                "context": ids[first - length : first],
                "targets": [ids[first:after]],
                "answer": 0,
                "word": word,
                "distance": distance,
            },
        )
    return list(one_of_each.values())


def lastword_together(documents, length, together, draw):
    """An example for each text of `length` tokens, half a length after each other, with up to
    `together` of the places of its second half, one of a sentence."""
    examples = []
    for name, (ids, places) in documents.items():
        draw.shuffle(places)
        for begin in range(0, len(ids) - length + 1, length // 2):
            one_of_each = {}
            for sentence, first, after, word, distance in places:
                if (
                    begin + length - length // 2 <= first < after <= begin + length
                    and distance <= first - begin
                ):
                    one_of_each.setdefault(
                        sentence,
                        {
                            "at": first - begin,
                            "targets": [ids[first:after]],
                            "answer": 0,
                            "word": word,
                            "distance": distance,
                        },
                    )
            if one_of_each:
                questions = sorted(
                    list(one_of_each.values())[:together], key=lambda question: question["at"]
                )
                examples.append(
                    {
                        "id": f"{name}:{begin}",
                        "context": ids[begin : begin + length],
                        "questions": questions,
                    }
                )
    draw.shuffle(examples)
    return examples


def command_lastword(options):
    tokenizer, draw = load_tokenizer(options.model), random.Random(options.seed)
    documents = {
        name: lastword_places(text, tokenizer, options.near)
        for name, text in read_named_documents(options.input)
    }
    examples = (
        lastword_alone(documents, options.length, draw)
        if options.together == 1
        else lastword_together(documents, options.length, options.together, draw)
    )
    if not examples:
        raise BadInput(
            f"no word of {', '.join(map(str, options.input))} has {options.length} tokens before "
            f"it and occurs there, but not in the last {options.near}"
        )
    return examples


def positions_of(model):
    """The longest text, target included, that the model takes; inf if it does not say."""
    values = read_fields(Path(model) / "config.json")
    return values.get("max_position_embeddings", values.get("n_positions", math.inf))


def command_passkey(options):
    tokenizer = load_tokenizer(options.model)

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    text = [
        token for _, document in read_named_documents(options.input) for token in encode(document)
    ]
    draw = random.Random(options.seed)
    examples, positions = [], positions_of(options.model)
    for number in range(options.count):
        key, depth = f"{draw.randrange(10000, 100000)}", DEPTHS[number % len(DEPTHS)]
        opening, needle, question, answered = (
            encode(part) for part in (OPENING, NEEDLE.format(key=key), QUESTION, QUESTION + key)
        )
        if (
            answered[: len(question)] != question
        ):  # tokens across the border: what they share with the question is asked
            question = question[
                : next(i for i, (a, b) in enumerate(zip(question, answered)) if a != b)
            ]
        target = answered[len(question) :]
        room = (
            min(options.length, positions - len(target))
            - len(opening)
            - len(needle)
            - len(question)
        )
        if room < 1 or room > len(text):
            raise BadInput(
                f"--length {options.length} leaves {room} tokens of text beside needle and "
                f"question, expected 1 to {len(text)}, all that there is"
            )
        start, at = draw.randrange(len(text) - room + 1), round(depth * room)
        hay = text[start : start + room]
        examples.append(
            {
                "id": f"{options.length}-{number}",
                "context": opening + hay[:at] + needle + hay[at:] + question,
                "targets": [target],
                "answer": 0,
                "key": key,
                "depth": depth,
            }
        )
    draw.shuffle(examples)
    return examples


def read_ratings(paths):
    """[negative, positive] sentences of lines of number, rating and sentence."""
    by_label = [[], []]
    for path in paths:
        for number, line in enumerate(
            Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n"), 1
        ):
            try:
                _, rating, sentence = line.split("\t")
                rating = float(rating)
            except ValueError as error:
                raise BadInput(
                    f"{path}, line {number}: {line[:80]!r}, expected number, rating and sentence, "
                    "tabs between"
                ) from error
            if abs(rating) >= 1:
                by_label[rating > 0].append(sentence.strip())
    return by_label


def command_sentiment(options):
    tokenizer = load_tokenizer(options.model)

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    draw = random.Random(options.seed)
    by_label = read_ratings(options.input)
    for sentences in by_label:
        draw.shuffle(sentences)
    half = min(map(len, by_label)) // 2  # of each label: to ask about; as many to show
    shots = [
        encode(REVIEW.format(sentence=s) + LABELS[label] + "\n")
        for label in (0, 1)
        for s in by_label[label][half : 2 * half]
    ]

    def asked(sentence, label):
        """Tokens up to the label, those of each label, and what the sentence is when it is
        labelled."""
        question, end = REVIEW.format(sentence=sentence), encode("\n")
        context, answered = encode(question), [encode(question + word) for word in LABELS]
        shown = encode(question + LABELS[label] + "\n")
        if (
            any(tokens[: len(context)] != context for tokens in answered)
            or shown != answered[label] + end
        ):
            raise BadInput(
                f"{options.model}: the tokenizer joins the label with what stands around it in "
                f"{sentence!r}"
            )
        return context, [tokens[len(context) :] for tokens in answered], shown

    order = [
        (label, sentence)
        for pair in zip(by_label[0][:half], by_label[1][:half])
        for label, sentence in enumerate(pair)
    ]
    order = order[: options.count]
    if options.together > 1:
        draw.shuffle(order)
    examples = []
    while order:
        text, questions = [], []  # the text that has been asked about, labels and all
        for label, sentence in order[: options.together]:
            own, targets, shown = asked(sentence, label)
            if questions and len(text) + len(own) > options.length // 2:
                break
            context = text + own
            questions.append(
                {"at": len(context), "targets": targets, "answer": label, "sentence": sentence}
            )
            text = text + shown
        order, end = order[len(questions) :], len(context)
        for shot in draw.sample(shots, len(shots)):
            if len(context) >= options.length:
                break
            context = shot + context
        if len(context) < options.length:
            raise BadInput(
                f"--length {options.length}: the {len(shots)} sentences to show and the question "
                f"are {len(context)} tokens"
            )
        for question in questions:
            question["at"] += options.length - end
        example = {"id": f"{options.length}-{len(examples)}", "context": context[-options.length :]}
        if options.together == 1:
            del questions[0]["at"]
        examples.append(
            {**example, **(questions[0] if options.together == 1 else {"questions": questions})}
        )
    if not examples:
        raise BadInput(
            f"{', '.join(map(str, options.input))}: {len(by_label[0])} negative and "
            f"{len(by_label[1])} positive sentences, expected 2 of each or more"
        )
    draw.shuffle(examples)
    return examples


def first_questions(examples, count):
    """The first examples, with `count` questions in all if there are as many."""
    chosen = []
    for example in examples:
        if count <= 0:
            break
        if "questions" in example:
            example["questions"] = example["questions"][:count]
        chosen.append(example)
        count -= len(example.get("questions", [None]))
    return chosen


def check_examples(examples, model):
    """Raises BadInput for what drrl-eval with this model would refuse
    (models/data/examples.cpp)."""
    config = Path(model) / "config.json"
    vocabulary = (
        json.loads(config.read_text()).get("vocab_size", math.inf) if config.is_file() else math.inf
    )
    positions, ids = positions_of(model), set()
    for example in examples:
        where, context = f"example {example['id']}", example["context"]
        questions = example.get("questions", [{"at": len(context), **example}])
        targets = [target for question in questions for target in question["targets"]]
        if example["id"] in ids:
            raise BadInput(f"{where}: there are two of this name")
        if not context or not all(targets):
            raise BadInput(f"{where}: an empty context or target")
        longest = max(
            len(context),
            max(
                question["at"] + len(target) - 1
                for question in questions
                for target in question["targets"]
            ),
        )
        if longest > positions:
            raise BadInput(
                f"{where}: {len(context)} tokens and a target are longer than the {positions} "
                f"positions of {model}: choose a smaller --length"
            )
        if max(context + sum(targets, [])) >= vocabulary:
            raise BadInput(
                f"{where}: the tokenizer gives token {max(context + sum(targets, []))}, {config} "
                f"says vocab_size {vocabulary}"
            )
        ids.add(example["id"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    lastword = commands.add_parser("lastword", help="words that the far context tells")
    lastword.add_argument(
        "--near",
        type=int,
        default=256,
        help="the word is not among so many tokens before it (default 256)",
    )
    lastword.set_defaults(make=command_lastword, count=500)
    passkey = commands.add_parser("passkey", help="a number hidden in a long text")
    passkey.set_defaults(make=command_passkey, count=200)
    sentiment = commands.add_parser(
        "sentiment", help="sentences to classify after many that are labelled"
    )
    sentiment.set_defaults(make=command_sentiment, count=1000)
    for command in (lastword, sentiment):
        command.add_argument(
            "--together",
            type=int,
            default=1,
            help="questions that an example has at most (default 1)",
        )
    for command in (lastword, passkey, sentiment):
        command.add_argument(
            "--model", required=True, help="Hugging Face directory with tokenizer.json"
        )
        command.add_argument(
            "--input",
            required=True,
            nargs="+",
            help="text that no training has seen: .txt or .jsonl, as prepare.py text takes them; "
            "of sentiment: .tsv",
        )
        command.add_argument("--out", required=True, type=Path, help="file to write")
        command.add_argument(
            "--length", type=int, default=2048, help="of the context (default 2048) [tokens]"
        )
        command.add_argument(
            "--count",
            type=int,
            default=command.get_default("count"),
            help="of questions, at most (default %(default)s)",
        )
        command.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if min(options.length, options.count, getattr(options, "together", 1)) < 1:
        parser.error("--length, --count and --together must be at least 1")
    try:
        examples = first_questions(options.make(options), options.count)
        check_examples(examples, options.model)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            Path(f"{options.out}.json"),
            json.dumps({"vocabulary": vocabulary_note(options.model)}, indent=2) + "\n",
        )
        write_atomically(
            options.out,
            "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples),
        )
    except (BadInput, OSError) as error:
        print(f"downstream_sets: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    questions = sum(len(example.get("questions", [None])) for example in examples)
    print(
        f"downstream_sets: {options.out}: {questions} questions, {len(examples)} examples of "
        f"{options.length} tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
