#!/usr/bin/env python3
"""Questions about long contexts: launch/prepare/downstream_sets.py, drrl-eval --examples against
Transformers and over several processes, and launch/studies/downstream.py with its statistics.
Environment: DRRL_BIN."""

import json
import subprocess
import sys
import unittest
from pathlib import Path

import downstream
import numpy
import study
import torch
from reference import load_model
from test_parity import BIN, ROOT, VOCABULARY, Folder, SharedModel, run
from test_prepare import byte_tokenizer

LAUNCH = ROOT / "launch"

BAD_USAGE, BAD_DATA = 2, 4  # launch/runtime/exit_codes.h


def sets(*arguments):
    return subprocess.run(
        [sys.executable, str(LAUNCH / "prepare/downstream_sets.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class SetsTest(Folder):
    def setUp(self):
        super().setUp()
        self.tokenizer = byte_tokenizer(self.folder / "model")
        words = [
            "stone",
            "river",
            "cat",
            "Garden",
            "window",
            "hé",
            "tall",
            "lantern",
            "morning",
            "of",
        ]
        rng = numpy.random.default_rng(2)
        self.text = "".join(
            " ".join(rng.choice(words, rng.integers(4, 9)))
            + str(rng.choice([".", "?", ";", ","]))
            + " "
            for _ in range(300)
        )
        self.input = self.folder / "text.txt"
        self.input.write_text(self.text)

    def make(self, task, name, *arguments):
        out = self.folder / name
        inputs = [self.input, *(path for path in arguments if isinstance(path, Path))]
        options = [argument for argument in arguments if not isinstance(argument, Path)]
        result = sets(
            task, "--model", self.folder / "model", "--input", *inputs, "--out", out, *options
        )
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(json.loads(Path(f"{out}.json").read_text())["vocabulary"]["size"], 256)
        return lines_of(out)

    def test_last_words_stand_far_away_in_the_text(self):
        examples = self.make("lastword", "a.jsonl", "--length", 400, "--near", 80, "--count", 1000)
        self.assertGreater(len(examples), 10)
        data, sentences = self.text.encode(), set()  # a token is a byte here
        for example in examples:
            self.assertEqual(
                (len(example["context"]), len(example["targets"]), example["answer"]), (400, 1, 0)
            )
            at, word = int(example["id"].removeprefix("text:")), example["word"].encode()
            self.assertEqual(
                self.tokenizer.decode(example["context"]),
                data[at - 400 : at].decode(errors="replace"),
            )
            self.assertEqual(self.tokenizer.decode(example["targets"][0]), example["word"])
            self.assertGreaterEqual(len(word), 4)
            self.assertTrue(data[:at].endswith(b" ") and data[at:].startswith(word))
            self.assertIn(data[at + len(word)], b".,;?")
            self.assertTrue(80 < example["distance"] <= 400)
            self.assertEqual(data.rindex(b" " + word, 0, at - 1) + 1, at - example["distance"])
            sentence = data[:at].count(b". ") + data[:at].count(b"? ")
            self.assertNotIn(sentence, sentences)
            sentences.add(sentence)

    def check_text(self, example, length, together):
        self.assertEqual(len(example["context"]), length)
        places = [question["at"] for question in example["questions"]]
        self.assertEqual(places, sorted(places))
        self.assertTrue(1 <= len(places) <= together)
        self.assertTrue(length // 2 <= places[0] and places[-1] <= length)

    def test_last_words_asked_about_together(self):
        examples = self.make(
            "lastword", "a.jsonl", "--length", 600, "--near", 80, "--count", 1000, "--together", 4
        )
        data, asked = self.text.encode(), []
        for example in examples:
            self.check_text(example, 600, 4)
            begin = int(example["id"].removeprefix("text:"))
            self.assertEqual(
                self.tokenizer.decode(example["context"]),
                data[begin : begin + 600].decode(errors="replace"),
            )
            sentences = []
            for question in example["questions"]:
                at, word = begin + question["at"], question["word"].encode()
                self.assertEqual(
                    (
                        self.tokenizer.decode(question["targets"][0]).encode(),
                        question["answer"],
                        len(question["targets"]),
                    ),
                    (word, 0, 1),
                )
                self.assertTrue(
                    data[:at].endswith(b" ")
                    and data[at:].startswith(word)
                    and data[at + len(word)] in b".,;?"
                )
                self.assertTrue(at + len(word) <= begin + 600)
                self.assertTrue(80 < question["distance"] <= question["at"])
                self.assertEqual(data.rindex(b" " + word, 0, at - 1) + 1, at - question["distance"])
                asked.append(at)
                sentences.append(data[:at].count(b". ") + data[:at].count(b"? "))
            self.assertEqual(len(set(sentences)), len(sentences))
        self.assertEqual(len(set(asked)), len(asked))
        self.assertGreater(len(asked), 1.5 * len(examples))
        fewer = self.make(
            "lastword", "b.jsonl", "--length", 600, "--near", 80, "--count", 7, "--together", 4
        )
        self.assertEqual(sum(len(example["questions"]) for example in fewer), 7)
        self.assertEqual(fewer[0], examples[0])

    def test_the_seed_decides_and_fewer_are_the_first(self):
        for task, near in (("lastword", ("--near", 80)), ("passkey", ())):
            first = self.make(task, "a.jsonl", "--length", 400, *near, "--count", 20)
            self.assertEqual(
                self.make(task, "b.jsonl", "--length", 400, *near, "--count", 20), first
            )
            self.assertNotEqual(
                self.make(task, "c.jsonl", "--length", 400, *near, "--count", 20, "--seed", 2),
                first,
            )
        everything = self.make(
            "lastword", "a.jsonl", "--length", 400, "--near", 80, "--count", 1000
        )
        self.assertEqual(
            self.make("lastword", "b.jsonl", "--length", 400, "--near", 80, "--count", 5),
            everything[:5],
        )

    def test_pass_keys_lie_where_they_should(self):
        examples = self.make("passkey", "a.jsonl", "--length", 600, "--count", 18)
        self.assertEqual(
            sorted(e["depth"] for e in examples), sorted(2 * [i / 10 for i in range(1, 10)])
        )
        for example in examples:
            self.assertEqual(len(example["context"]), 600)
            context, key = self.tokenizer.decode(example["context"]), example["key"]
            self.assertEqual(self.tokenizer.decode(example["targets"][0]), key)
            self.assertEqual(context.count(key), 2)
            self.assertTrue(context.endswith("The pass key is "))
            opening, needle = context.index("\n\n") + 2, context.index("\nThe pass key is")
            before, after = (
                len(self.tokenizer.encode(text).ids)
                for text in (
                    context[opening:needle],
                    context[needle + 59 : context.rindex("\n\nWhat")],
                )
            )
            self.assertAlmostEqual(before / (before + after), example["depth"], delta=0.01)

    def test_pass_keys_fit_into_the_model_s_positions(self):
        (self.folder / "model/config.json").write_text(json.dumps({"max_position_embeddings": 600}))
        for example in self.make("passkey", "a.jsonl", "--length", 600, "--count", 9):
            self.assertEqual(len(example["context"]) + len(example["targets"][0]), 600)

    def test_sentences_to_classify_follow_labelled_ones(self):
        ratings = {}
        for i in range(40):
            rating = (-3, -1.5, 0.9, 1.5, 3)[i % 5]  # a fifth is close to neutral
            ratings[f"Film number {i:02d} {'is é good' if rating > 0 else 'bores'}."] = rating
        self.input = self.folder / "reviews.tsv"
        self.input.write_text(
            "".join(
                f"{i}\t{rating}\t{sentence}\n"
                for i, (sentence, rating) in enumerate(ratings.items())
            )
        )
        examples = self.make("sentiment", "a.jsonl", "--length", 300, "--count", 100)
        self.assertEqual((len(examples), sum(e["answer"] for e in examples)), (16, 8))
        asked, shown = set(), set()
        for example in examples:
            self.assertEqual(len(example["context"]), 300)
            self.assertEqual(
                [self.tokenizer.decode(t) for t in example["targets"]], [" negative", " positive"]
            )
            context = self.tokenizer.decode(example["context"])
            self.assertTrue(context.endswith(f"\nReview: {example['sentence']}\nSentiment:"))
            self.assertEqual(ratings[example["sentence"]] > 0, example["answer"] == 1)
            asked.add(example["sentence"])
            for shot in context.split("Review: ")[1:-1]:
                sentence, label = shot.rstrip("\n").split("\nSentiment: ")
                self.assertEqual(label, "positive" if ratings[sentence] > 0 else "negative")
                shown.add(sentence)
        self.assertGreater(len(shown), 8)
        self.assertFalse(asked & shown)
        self.assertGreaterEqual(min(abs(ratings[sentence]) for sentence in asked | shown), 1)
        self.assertEqual(
            self.make("sentiment", "b.jsonl", "--length", 300, "--count", 100), examples
        )

        together, later = (
            self.make("sentiment", "c.jsonl", "--length", 600, "--count", 100, "--together", 3),
            set(),
        )
        for example in together:
            self.check_text(example, 600, 3)
            context = self.tokenizer.decode(example["context"])
            for question in example["questions"]:
                before = self.tokenizer.decode(example["context"][: question["at"]])
                self.assertTrue(before.endswith(f"\nReview: {question['sentence']}\nSentiment:"))
                self.assertEqual(
                    [self.tokenizer.decode(t) for t in question["targets"]],
                    [" negative", " positive"],
                )
                self.assertEqual(ratings[question["sentence"]] > 0, question["answer"] == 1)
                self.assertNotIn(question["sentence"], later)
                later.add(question["sentence"])
            self.assertTrue(
                context.endswith(f"Review: {example['questions'][-1]['sentence']}\nSentiment:")
            )
            labelled = [
                shot.rstrip("\n").split("\nSentiment: ") for shot in context.split("Review: ")[1:-1]
            ]
            self.assertTrue(
                all(
                    label == ("positive" if ratings[sentence] > 0 else "negative")
                    for sentence, label in labelled
                )
            )
            own = {question["sentence"] for question in example["questions"]}
            self.assertFalse({sentence for sentence, _ in labelled} & (asked - own))
        self.assertEqual(later, asked)
        self.assertGreater(max(len(example["questions"]) for example in together), 1)

        def refused(*words):
            result = sets(
                "sentiment",
                "--model",
                self.folder / "model",
                "--input",
                self.input,
                "--out",
                self.folder / "none.jsonl",
                "--length",
                3000,
            )
            self.assertEqual(result.returncode, 3, result.stdout)
            for word in words:
                self.assertIn(word, result.stderr)

        refused("--length 3000", "16 sentences")
        self.input.write_text("1\t2.0\tGood.\n2\tgood\tGood.\n")
        refused("reviews.tsv, line 2", "2\\tgood")
        self.input.write_text("1\t2.0\tGood.\n")
        refused("0 negative and 1 positive")

    def test_refusals(self):
        for task, arguments, words in (
            ("lastword", ("--length", 100000), ("100000", "text.txt")),
            ("passkey", ("--length", 50), ("--length 50",)),
            ("passkey", ("--length", 100000), ("--length 100000",)),
        ):
            result = sets(
                task,
                "--model",
                self.folder / "model",
                "--input",
                self.input,
                "--out",
                self.folder / "none.jsonl",
                *arguments,
            )
            self.assertEqual(result.returncode, 3, result.stdout)
            for word in words:
                self.assertIn(word, result.stderr)
            self.assertFalse((self.folder / "none.jsonl").exists())
        result = sets(
            "passkey",
            "--model",
            self.folder,
            "--input",
            self.input,
            "--out",
            self.folder / "none.jsonl",
        )
        self.assertEqual(result.returncode, 3)
        self.assertIn("tokenizer.json", result.stderr)

    def test_inputs_of_one_name_are_all_asked_about(self):
        (self.folder / "other").mkdir()
        (self.folder / "other/text.txt").write_text(self.text[::-1].replace(" .", ". ") + self.text)
        examples = self.make(
            "lastword",
            "a.jsonl",
            self.folder / "other/text.txt",
            "--length",
            400,
            "--near",
            80,
            "--count",
            1000,
        )
        names = [example["id"] for example in examples]
        self.assertEqual(len(set(names)), len(names))
        self.assertEqual({name.split(":")[0] for name in names}, {"text", "text-1"})

    def test_what_drrl_eval_would_refuse_is_not_written(self):
        out = self.folder / "none.jsonl"
        for config, words in (
            (
                {"max_position_embeddings": 402},
                ("400 tokens and a target", "402 positions", "--length"),
            ),
            ({"vocab_size": 100}, ("token", "vocab_size 100")),
        ):
            (self.folder / "model/config.json").write_text(json.dumps(config))
            result = sets(
                "lastword",
                "--model",
                self.folder / "model",
                "--input",
                self.input,
                "--out",
                out,
                "--length",
                400,
                "--near",
                80,
            )
            self.assertEqual(result.returncode, 3, result.stdout)
            for word in words:
                self.assertIn(word, result.stderr)
            self.assertFalse(out.exists())


class ProgramTest(SharedModel):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        model = load_model(cls.model).eval()
        rng = numpy.random.default_rng(4)
        examples, cls.expected = [], []
        with torch.no_grad():
            for i in range(
                11
            ):  # what Transformers itself says is right; with one other token it is not
                context = torch.from_numpy(rng.integers(0, VOCABULARY, 290 + i))
                said = context
                for _ in range(3):
                    said = torch.cat([said, model(said[None]).logits[0, -1:].argmax(-1)])
                said = said[len(context) :]
                if i % 2:
                    said[i % 3] = (said[i % 3] + 1) % VOCABULARY
                several = [said, (said + 1) % VOCABULARY] if i > 8 else [said]
                logprobs = []
                for target in several:
                    logits = model(torch.cat([context, target])[None]).logits[
                        0, len(context) - 1 : -1
                    ]
                    logprobs.append(logits.log_softmax(-1).gather(1, target[:, None]).sum().item())
                answer = len(several) - 1
                right = logprobs[-1] > logprobs[0] if answer else i % 2 == 0
                examples.append(
                    {
                        "id": f"e{i}",
                        "context": context.tolist(),
                        "targets": [t.tolist() for t in several],
                        "answer": answer,
                    }
                )
                cls.expected.append((right, logprobs))
        cls.examples = write_lines(cls.folder / "examples.jsonl", examples)

    def answer(self, *flags, ranks=1):
        out, result = self.folder / "out.jsonl", self.folder / "out.json"
        run(
            [
                BIN / "drrl-eval",
                "--model",
                self.model,
                "--examples",
                self.examples,
                "--examples_out",
                out,
                "--json",
                result,
                *flags,
            ],
            ranks,
        )
        return json.loads(result.read_text()), lines_of(out)

    def test_exact_attention_answers_like_transformers(self):
        summary, lines = self.answer()
        self.assertEqual(
            [(line["id"], line["at"]) for line in lines], [(f"e{i}", 290 + i) for i in range(11)]
        )
        self.assertEqual([line["right"] for line in lines], [right for right, _ in self.expected])
        for line, (_, logprobs) in zip(lines, self.expected):
            numpy.testing.assert_allclose(line["logprobs"], logprobs, atol=1e-3)
            self.assertEqual(line["nll"], -line["logprobs"][-1])
            self.assertGreater(line["attention_ms"], 0)
        self.assertEqual((summary["examples"], summary["questions"]), (11, 11))
        self.assertAlmostEqual(summary["accuracy"], sum(right for right, _ in self.expected) / 11)
        self.assertAlmostEqual(
            summary["nll"], numpy.mean([-logprobs[-1] for _, logprobs in self.expected]), places=3
        )
        self.assertEqual(summary["attention_flops_fraction"], 1.0)

    def test_processes_answer_like_one(self):
        flags = ("--attention=lowrank", "--rank=8", "--near_block=32")
        summary, lines = self.answer(*flags)
        self.assertNotEqual(summary["attention_flops_fraction"], 1)
        exact = [line["nll"] for line in self.answer()[1]]
        self.assertGreater(
            numpy.abs(numpy.subtract(exact, [line["nll"] for line in lines])).max(), 1e-4
        )
        for ranks, layout in ((2, "--dp=2"), (3, "--dp=3"), (2, "--tp=2")):
            other, others = self.answer(*flags, layout, ranks=ranks)
            self.assertEqual([line["id"] for line in others], [line["id"] for line in lines])
            self.assertEqual([line["right"] for line in others], [line["right"] for line in lines])
            numpy.testing.assert_allclose(
                [line["nll"] for line in others], [line["nll"] for line in lines], atol=1e-4
            )
            for key in ("accuracy", "examples", "right"):
                self.assertEqual(other[key], summary[key])
            self.assertAlmostEqual(
                other["attention_flops_fraction"], summary["attention_flops_fraction"], places=6
            )

    def test_questions_about_one_text_are_answered_like_alone(self):
        text = numpy.random.default_rng(5).integers(0, VOCABULARY, 300).tolist()
        places = (150, 220, 221, 299, 300)
        questions = [
            {"at": at, "targets": [[3], text[at : at + 1] or [4]], "answer": at % 2}
            for at in places
        ]
        together = write_lines(
            self.folder / "together.jsonl",
            [
                {
                    "id": f"t{i}",
                    "context": text[i:],
                    "questions": [{**q, "at": q["at"] - i} for q in questions],
                }
                for i in range(3)
            ],
        )
        alone = write_lines(
            self.folder / "alone.jsonl",
            [
                {
                    "id": f"t{i}-{q['at']}",
                    "context": text[i : q["at"]],
                    "targets": q["targets"],
                    "answer": q["answer"],
                }
                for i in range(3)
                for q in questions
            ],
        )
        out, result = self.folder / "out.jsonl", self.folder / "out.json"
        answers = []
        for examples, ranks in ((alone, 1), (together, 1), (together, 2)):
            run(
                [
                    BIN / "drrl-eval",
                    "--model",
                    self.model,
                    "--examples",
                    examples,
                    "--examples_out",
                    out,
                    "--json",
                    result,
                    f"--dp={ranks}",
                ],
                ranks,
            )
            answers.append(lines_of(out))
        summary = json.loads(result.read_text())
        self.assertEqual((summary["examples"], summary["questions"]), (3, 15))
        self.assertEqual(
            [(line["id"], line["at"]) for line in answers[1]],
            [(f"t{i}", at - i) for i in range(3) for at in places],
        )
        for lines in answers[1:]:
            self.assertEqual(
                [line["right"] for line in lines], [line["right"] for line in answers[0]]
            )
            numpy.testing.assert_allclose(
                [line["logprobs"] for line in lines],
                [line["logprobs"] for line in answers[0]],
                atol=1e-3,
            )
            self.assertEqual(
                len({line["attention_ms"] for line in lines[:5]}), 1, "shares of one pass"
            )

    def refused(self, code, words, *flags):
        done = subprocess.run(
            [BIN / "drrl-eval", "--model", self.model, *map(str, flags)],
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)

    def test_refusals(self):
        for flag in (f"--data={self.data}", "--generate=3", "--compare_exact"):
            self.refused(
                BAD_USAGE, ("--examples", flag.split("=")[0]), "--examples", self.examples, flag
            )
        self.refused(
            BAD_USAGE, ("--examples_out=x", "--examples"), "--data", self.data, "--examples_out=x"
        )
        bad = write_lines(
            self.folder / "bad.jsonl",
            [{"id": "a", "context": [VOCABULARY], "targets": [[1]], "answer": 0}],
        )
        self.refused(BAD_DATA, ("bad.jsonl:1", str(VOCABULARY)), "--examples", bad)
        self.refused(BAD_DATA, ("nowhere.jsonl",), "--examples", "nowhere.jsonl")

    def test_a_reduced_study(self):
        policy, result, log, out = (
            self.folder / name
            for name in ("ranks.safetensors", "study.json", "study.jsonl", "kept")
        )
        run(
            [
                BIN / "drrl-policy",
                "calibrate",
                "--model",
                self.model,
                "--data",
                self.data,
                "--policy",
                policy,
                "--seq_len=300",
                "--near_block=32",
                "--calibration_tokens=600",
            ]
        )
        command = [
            sys.executable,
            LAUNCH / "studies/downstream.py",
            "--model",
            self.model,
            "--policy",
            policy,
            "--build",
            BIN.parent,
            "--sets",
            self.examples,
            "--budget",
            0.9,
            "--ranks",
            8,
            "--jobs",
            2,
            "--log",
            log,
        ]
        run([*command, "--limit", 3, "--", "--near_block=32"])
        log.write_text(log.read_text() + '{"flags": ["torn')
        before = log.read_text().splitlines()[:-1]
        table = run(
            [*command, "--limit", 7, "--out", out, "--json", result, "--", "--near_block=32"]
        )
        self.assertEqual(log.read_text().splitlines()[: len(before)], before)
        kept = log.read_text()
        again = run([*command, "--limit", 7, "--", "--near_block=32"])
        self.assertEqual((again, log.read_text()), (table, kept), "an answer was asked for twice")
        rows = json.loads(result.read_text())["rows"]
        self.assertEqual(
            [row["policy"] for row in rows], ["exact", "dp 0.9", "dp 0.9 gates", "fixed 8"]
        )
        exact = lines_of(out / "examples.exact.jsonl")
        self.assertEqual(
            [line["right"] for line in exact], [right for right, _ in self.expected[:7]]
        )
        for row in rows:
            self.assertIn(row["policy"], table)
            lines = lines_of(out / f"examples.{row['policy'].replace(' ', '-')}.jsonl")
            self.assertEqual((row["examples"], len(lines)), (7, 7))
            self.assertAlmostEqual(
                row["difference"][0],
                numpy.mean([int(a["right"]) - int(b["right"]) for a, b in zip(lines, exact)]),
            )
            self.assertNotEqual(row["verdict"], "equivalent", "seven examples cannot prove a point")


def outcomes(better, worse, n):
    return numpy.array([1] * better + [-1] * worse + [0] * (n - better - worse))


class StatisticsTest(unittest.TestCase):
    def test_verdicts_of_made_up_pairs(self):
        for better, worse, n, margin, equivalent in (
            (0, 0, 20, 0.01, False),
            (0, 0, 267, 0.01, False),
            (0, 0, 268, 0.01, True),
            (10, 10, 1000, 0.01, True),
            (20, 20, 1000, 0.01, False),
            (0, 20, 1000, 0.01, False),
            (20, 0, 1000, 0.01, False),
            (0, 20, 1000, 0.04, True),
            (0, 5, 5, 0.01, False),
        ):
            with self.subTest(better=better, worse=worse, n=n, margin=margin):
                test = study.tost(outcomes(better, worse, n), margin)
                self.assertEqual(test["equivalent"], equivalent)
                low, high = test["interval"]
                self.assertEqual(-margin < low and high < margin, equivalent)
                self.assertLess(low, (better - worse) / n + 1e-12)
                self.assertGreater(high, (better - worse) / n - 1e-12)
                mirrored = study.tost(-outcomes(better, worse, n), margin)
                numpy.testing.assert_allclose(mirrored["interval"], [-high, -low], atol=1e-9)
        with self.assertRaises(ValueError):
            study.tost(numpy.array([0.5]), 0.01)

    def test_groups_of_answers(self):
        single = outcomes(10, 14, 1000)
        self.assertEqual(
            study.tost(single, 0.01, groups=numpy.arange(1000)), study.tost(single, 0.01)
        )
        self.assertEqual(study.interval(single, groups=numpy.arange(1000)), study.interval(single))
        self.assertAlmostEqual(
            study.design_effect(numpy.repeat(single, 5), numpy.repeat(numpy.arange(1000), 5)),
            5,
            delta=0.02,
        )
        repeated = study.tost(
            numpy.repeat(single, 5), 0.01, groups=numpy.repeat(numpy.arange(1000), 5)
        )
        numpy.testing.assert_allclose(
            repeated["interval"], study.tost(single, 0.01)["interval"], atol=1e-5
        )  # five copies of an answer are one
        numpy.testing.assert_allclose(
            study.interval(numpy.repeat(single, 5), groups=numpy.repeat(numpy.arange(1000), 5)),
            study.interval(single),
            atol=1e-12,
        )
        self.assertEqual(study.design_effect(outcomes(0, 0, 10), [0] * 5 + [1] * 5), 1)
        self.assertEqual(study.design_effect(outcomes(1, 1, 10), ["a"] * 10), 10)
        self.assertEqual(
            study.design_effect(outcomes(2, 2, 8), [0, 1, 0, 1, 2, 3, 2, 3]),
            1,
            "answers that differ within groups only say no less",
        )

    def test_alike_answers_seldom_make_what_differs_by_the_margin_equivalent(self):
        rng = numpy.random.default_rng(8)
        groups, called = numpy.repeat(numpy.arange(150), 20), 0
        for _ in range(
            400
        ):  # 3 % of the answers get worse and 2 % better, in groups in which others do so, too
            turn = rng.random(150)
            rate = (
                numpy.where(turn < 0.2, 0.15, 0)[:, None],
                numpy.where(turn > 0.8, 0.10, 0)[:, None],
            )
            draw = rng.random((150, 20))
            difference = ((draw > 1 - rate[1]).astype(int) - (draw < rate[0]).astype(int)).ravel()
            called += study.tost(difference, 0.01, groups=groups)["equivalent"]
        self.assertLess(
            called / 400, 0.085
        )  # alpha = 0.05, and three standard deviations of 400 draws

    def test_what_differs_by_the_margin_is_seldom_called_equivalent(self):
        rng = numpy.random.default_rng(7)
        for worse, better in ((0.01, 0.0), (0.03, 0.02)):
            draws = rng.multinomial(1000, [better, worse, 1 - better - worse], 4000)
            called = [
                study.tost(outcomes(int(b), int(w), 1000), 0.01)["equivalent"]
                for b, w in numpy.unique(draws[:, :2], axis=0)
            ]
            counts = numpy.unique(draws[:, :2], axis=0, return_counts=True)[1]
            self.assertLess(
                numpy.sum(counts[called]) / 4000, 0.065
            )  # alpha = 0.05; the score test is approximate

    def test_intervals_cover_the_mean(self):
        mean, low, high = study.interval(numpy.arange(100.0))
        self.assertEqual(mean, 49.5)
        self.assertAlmostEqual(low, 49.5 - 1.96 * 2.887, delta=0.3)
        self.assertAlmostEqual(high, 49.5 + 1.96 * 2.887, delta=0.3)
        narrow = study.interval(numpy.arange(100.0), level=0.9)
        self.assertTrue(low < narrow[1] < narrow[2] < high)

    def test_comparisons(self):
        def answers(right, nll):
            return [
                {"id": str(i), "at": 5, "right": bool(r), "nll": nll} for i, r in enumerate(right)
            ]

        many = [i % 3 > 0 for i in range(3000)]
        self.assertEqual(
            downstream.compare(answers(many, 1.0), answers(many, 1.5), 0.01)["verdict"],
            "equivalent",
        )
        worse = [r and i % 10 > 0 for i, r in enumerate(many)]
        row = downstream.compare(answers(many, 1.0), answers(worse, 1.5), 0.01)
        self.assertEqual((row["verdict"], row["won"], row["lost"]), ("worse", 0, 200))
        self.assertEqual(row["nll_difference"], (0.5, 0.5, 0.5))
        self.assertEqual(
            downstream.compare(answers(worse, 1.0), answers(many, 1.0), 0.01)["verdict"], "better"
        )
        self.assertEqual(
            downstream.compare(answers(many[:50], 1.0), answers(many[:50], 1.0), 0.01)["verdict"],
            "undecided",
        )
        with self.assertRaises(ValueError):
            downstream.compare(answers(many, 1.0), answers(many[1:], 1.0), 0.01)


if __name__ == "__main__":
    unittest.main(verbosity=2)
