#!/usr/bin/env python3
"""drrl's executables against Transformers, on small random models and (RealModelTest) on SmolLM2:
logits, perplexity, training steps on several layouts, and the way back from an exported folder.
Environment: DRRL_BIN (folder of the executables), DRRL_MODEL, DRRL_DATA."""

import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy
import safetensors.numpy
import torch
from drrl_prepare import token_files
from reference import load_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]

BIN = Path(os.environ["DRRL_BIN"])
CACHE = Path(
    os.environ.get("DRRL_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drrl"
)
REAL_MODEL = Path(os.environ.get("DRRL_MODEL") or CACHE / "models/SmolLM2-135M-Instruct")
REAL_DATA = Path(os.environ.get("DRRL_DATA") or CACHE / "data")
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none"] + (
    ["--allow-run-as-root"] if os.geteuid() == 0 else []
)
VOCABULARY = 257
LOGITS_TOLERANCE = 1e-4
PERPLEXITY_TOLERANCE = 1e-4
STEP_TOLERANCE = 1e-3  # against Transformers, relative loss at every step
LAYOUT_TOLERANCE = 1e-4  # of drrl's layouts among each other


def run(command, ranks=1):
    """Standard output of a program; with its whole output in the exception if it fails."""
    launcher = [*MPIRUN, "-np", str(ranks)] if ranks > 1 else []
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1" if ranks > 1 else "2",
        "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    }
    done = subprocess.run(
        [*launcher, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=280,
    )
    if done.returncode:
        raise AssertionError(
            f"exit {done.returncode}: "
            f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done.stdout


def script(name, *arguments):
    return run([sys.executable, HERE / name, *arguments])


def small_model(folder, kind="llama", **changes):
    """A random model with three KV groups, large enough in its weights that a wrong detail
    shows."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "gpt2": (GPT2Config, GPT2LMHeadModel),
    }[kind]
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
    )
    if kind == "mistral":
        settings["sliding_window"] = None
    if kind == "gpt2":  # heads of 64, and no dropout: drrl trains without
        settings = dict(
            vocab_size=VOCABULARY,
            n_embd=192,
            n_layer=3,
            n_head=3,
            n_inner=200,
            n_positions=512,
            initializer_range=0.08,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    torch.manual_seed(1)
    model = model_class(config_class(**{**settings, **changes}))
    for parameter in model.parameters():  # biases and norms must matter as well
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def small_data(prefix, tokens=4000):
    rng = numpy.random.default_rng(3)
    steps = rng.choice(
        [1, 2, 3, 5], size=tokens, p=[0.6, 0.2, 0.15, 0.05]
    )  # learnable: mostly the next id
    token_files.write_token_file(prefix, [numpy.cumsum(steps) % VOCABULARY], "uint16", {})
    return prefix


class Folder(unittest.TestCase):
    """A folder for each test."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


class SharedModel(unittest.TestCase):
    """A folder with a small model and data for all tests of a class."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        cls.model = small_model(cls.folder / "model")
        cls.data = small_data(cls.folder / "data")


class SmallModelTest(Folder):
    def setUp(self):
        super().setUp()
        self.data = small_data(self.folder / "data")

    def assert_same_logits(self, model, length=100):
        from safetensors.torch import load_file

        out = self.folder / "logits.safetensors"
        run([BIN / "dump_logits", model, self.data, length, out])
        ours = load_file(out)
        with torch.no_grad():
            theirs = load_model(model).eval()(ours["tokens"]).logits
        torch.testing.assert_close(ours["logits"], theirs, rtol=0, atol=LOGITS_TOLERANCE)

    def test_logits_of_each_kind_of_model(self):
        llama3 = {
            "rope_type": "llama3",
            "rope_theta": 20000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        for number, (kind, changes) in enumerate(
            [
                ("llama", {}),
                ("llama", {"tie_word_embeddings": False}),
                ("llama", {"attention_bias": True, "mlp_bias": True}),
                ("llama", {"head_dim": 32}),
                ("llama", {"rope_parameters": llama3}),
                (
                    "llama",
                    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
                ),
                ("mistral", {}),
                ("qwen2", {}),
                ("gpt2", {}),
                (
                    "gpt2",
                    {"tie_word_embeddings": False, "n_inner": None, "activation_function": "gelu"},
                ),
                (
                    "gpt2",
                    {
                        "scale_attn_weights": False,
                        "scale_attn_by_inverse_layer_idx": True,
                        "reorder_and_upcast_attn": True,
                    },
                ),
            ]
        ):
            with self.subTest(kind=kind, **changes):
                self.assert_same_logits(
                    small_model(self.folder / f"model{number}", kind, **changes)
                )

    def test_a_head_that_differs_from_a_tied_embedding(self):
        """Both are in the file: Transformers keeps them apart. The head alone: it serves as
        embedding, too."""
        for kind in ("llama", "qwen2", "gpt2"):
            model = small_model(self.folder / kind, kind, tie_word_embeddings=False)
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
            with self.subTest(kind=kind):
                self.assert_same_logits(model)
            with self.subTest(kind=kind, head="alone"):
                weights = safetensors.numpy.load_file(model / "model.safetensors")
                del weights[
                    "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
                ]
                safetensors.numpy.save_file(weights, model / "model.safetensors", {"format": "pt"})
                self.assert_same_logits(model)
        model = small_model(self.folder / "shared out", tie_word_embeddings=False)
        results = []
        for tied in (False, True):
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
            run(
                [
                    BIN / "drrl-eval",
                    "--model",
                    model,
                    "--data",
                    self.data,
                    "--seq_len=200",
                    "--tp=2",
                    "--json",
                    self.folder / "drrl.json",
                ],
                ranks=2,
            )
            results.append(json.loads((self.folder / "drrl.json").read_text())["nll"])
        self.assertEqual(results[0], results[1])

    def test_tokens_belong_to_the_tokenizer_that_made_them(self):
        from test_prepare import byte_tokenizer
        from transformers import PreTrainedTokenizerFast

        model, text = small_model(self.folder / "model"), self.folder / "a.txt"
        byte_tokenizer(self.folder / "tokenizer")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((self.folder / "tokenizer" / name).read_bytes())
        text.write_text("It was a dark and stormy night. " * 40)
        run(
            [
                sys.executable,
                ROOT / "launch/prepare/prepare.py",
                "text",
                "--model",
                model,
                "--input",
                text,
                "--out",
                self.folder / "text",
            ]
        )
        shape = ["--data", self.folder / "text", "--seq_len=100"]
        run(
            [
                BIN / "drrl-train",
                "--model",
                model,
                *shape,
                "--steps=1",
                "--global_batch=1",
                "--valid_fraction=0",
                "--output",
                self.folder / "run",
            ]
        )
        run([BIN / "drrl-eval", "--model", self.folder / "run/hf", *shape])  # as README does it
        PreTrainedTokenizerFast(
            tokenizer_file=str(model / "tokenizer.json"), eos_token="<eos>", pad_token="<pad>"
        ).save_pretrained(self.folder / "run/hf")
        run(
            [BIN / "drrl-eval", "--model", self.folder / "run/hf", *shape]
        )  # saved by Transformers, with one more added token
        words = json.loads((model / "tokenizer.json").read_text())
        words["model"]["vocab"] = {w: (i + 1) % 256 for w, i in words["model"]["vocab"].items()}
        (self.folder / "run/hf/tokenizer.json").write_text(json.dumps(words))
        with self.assertRaisesRegex(
            AssertionError,
            "exit 4: (.|\n)*another "
            "tokenizer(.|\n)*model/tokenizer.json(.|\n)*run/hf/tokenizer.json",
        ):
            run([BIN / "drrl-eval", "--model", self.folder / "run/hf", *shape])

    def test_perplexity(self):
        for kind in ("llama", "gpt2"):
            model = small_model(self.folder / kind, kind)
            script(
                "hf_perplexity.py",
                "--model",
                model,
                "--data",
                self.data,
                "--seq_len",
                200,
                "--json",
                self.folder / "hf.json",
            )
            expected = json.loads((self.folder / "hf.json").read_text())
            for tp in (1, 2, 3):
                with self.subTest(kind=kind, tp=tp):
                    run(
                        [
                            BIN / "drrl-eval",
                            "--model",
                            model,
                            "--data",
                            self.data,
                            "--seq_len=200",
                            f"--tp={tp}",
                            "--attention=exact",
                            "--json",
                            self.folder / "drrl.json",
                        ],
                        ranks=tp,
                    )
                    ours = json.loads((self.folder / "drrl.json").read_text())
                    self.assertEqual(ours["tokens"], expected["tokens"])
                    self.assertLess(
                        abs(ours["perplexity"] / expected["perplexity"] - 1), PERPLEXITY_TOLERANCE
                    )

    def test_calibrated_bases_serve_gpt2(self):
        model = small_model(self.folder / "model", "gpt2")
        common = [
            "--model",
            model,
            "--data",
            self.data,
            "--seq_len=200",
            "--near_block=16",
            "--policy",
            self.folder / "ranks.safetensors",
        ]
        run([BIN / "drrl-policy", "calibrate", *common, "--calibration_tokens=400"])
        run(
            [
                BIN / "drrl-eval",
                *common,
                "--attention=lowrank",
                "--rank_policy=fixed",
                "--rank=32",
                "--compare_exact",
                "--json",
                self.folder / "drrl.json",
            ]
        )
        result = json.loads((self.folder / "drrl.json").read_text())
        self.assertLessEqual(result["mean_rank_qk"] + result["mean_rank_v"], 64)
        self.assertGreater(
            abs(result["perplexity"] / result["exact_perplexity"] - 1), 1e-7
        )  # low rank really was at work
        self.assertLess(result["perplexity"] / result["exact_perplexity"], 1.2)

    def test_policy_learned_from_traces(self):
        model = small_model(self.folder / "model")
        policy, traces = self.folder / "ranks.safetensors", self.folder / "traces.safetensors"
        common = [
            "--model",
            model,
            "--data",
            self.data,
            "--seq_len=400",
            "--near_block=32",
            "--policy",
            policy,
        ]
        run([BIN / "drrl-policy", "calibrate", *common, "--calibration_tokens=400"])
        record = [
            BIN / "drrl-policy",
            "record",
            *common,
            "--tp=2",
            "--calibration_tokens=2000",
            "--traces",
            traces,
        ]
        run(record, ranks=2)
        self.goes_on_with(traces, lambda: run(record, ranks=2))
        with self.assertRaisesRegex(
            AssertionError,
            re.compile(
                "exit 2.*seed 1, calibration.*seed 7, calibration.*name another file", re.DOTALL
            ),
        ):
            run([*record, "--seed=7"], ranks=2)
        for gates in ([], ["--gates"]):
            run(
                [
                    BIN / "drrl-policy",
                    "train",
                    "--policy",
                    policy,
                    "--traces",
                    traces,
                    "--fit_steps=30",
                    "--reward_steps=30",
                    *gates,
                ]
            )
            perplexities = []
            for tp in (1, 2, 3):
                run(
                    [
                        BIN / "drrl-eval",
                        *common,
                        "--attention=lowrank",
                        "--rank_policy=rl",
                        "--rank_budget=0.8",
                        "--max_tokens=1200",
                        f"--tp={tp}",
                        *gates,
                        "--json",
                        self.folder / "drrl.json",
                    ],
                    ranks=tp,
                )
                result = json.loads((self.folder / "drrl.json").read_text())
                self.assertLess(result["attention_flops_fraction"], 0.95)
                self.assertLess(result["mean_rank_qk"], 16)
                perplexities.append(result["perplexity"])
            self.assertLess(
                max(perplexities) / min(perplexities) - 1, 1e-4
            )  # every process decides for its own KV groups, all the same

    def goes_on_with(self, file, action):
        """As though the action that wrote the traces had been interrupted after two sequences of
        several."""
        whole = safetensors.numpy.load_file(file)
        with safetensors.safe_open(file, "numpy") as opened:
            metadata = opened.metadata()
        first = {name: value if name == "gates" else value[:2] for name, value in whole.items()}
        safetensors.numpy.save_file(first, file, metadata)
        action()
        again = safetensors.numpy.load_file(file)
        self.assertGreater(len(whole["state"]), 2)
        for name, value in whole.items():
            numpy.testing.assert_array_equal(again[name], value)

    def generate(self, model, tp, *flags):
        run(
            [
                BIN / "drrl-eval",
                "--model",
                model,
                "--data",
                self.data,
                "--generate=70",
                "--prompt_tokens=45",
                f"--tp={tp}",
                *flags,
                "--json",
                self.folder / "generated.json",
            ],
            ranks=tp,
        )
        return json.loads((self.folder / "generated.json").read_text())

    def test_generation(self):
        for kind in ("llama", "gpt2"):
            # Untied and with large weights, or it says one thing over and over.
            model = small_model(
                self.folder / kind, kind, tie_word_embeddings=False, initializer_range=0.3
            )
            theirs = load_model(model).eval()
            theirs.generation_config.eos_token_id = None
            for tp in (1, 2):
                with self.subTest(kind=kind, tp=tp):
                    ours = self.generate(model, tp, "--attention=exact")
                    prompt = torch.tensor([ours["prompt"]])
                    expected = theirs.generate(
                        prompt,
                        attention_mask=torch.ones_like(prompt),
                        max_new_tokens=70,
                        do_sample=False,
                        pad_token_id=0,
                    )
                    self.assertEqual(ours["generated"], expected[0, 45:].tolist())
                    self.assertGreater(len(set(ours["generated"])), 10)
                    low = self.generate(
                        model, tp, "--attention=lowrank", "--rank=4", "--near_block=8"
                    )
                    self.assertEqual(low["mean_rank_qk"], 4)
                    higher = self.generate(
                        model, tp, "--attention=lowrank", "--rank=12", "--near_block=8"
                    )
                    self.assertLess(
                        low["kv_cache_bytes"], higher["kv_cache_bytes"]
                    )  # so short a text has a full cache smaller than bases
                    self.assertLessEqual(low["kv_cache_bytes"], low["kv_cache_bytes_peak"])

    def train(self, model, out, ranks, *flags):
        run(
            [
                BIN / "drrl-train",
                "--model",
                model,
                "--data",
                self.data,
                "--output",
                out,
                *self.SETTINGS,
                *flags,
            ],
            ranks=ranks,
        )
        return [
            json.loads(line)["loss"]
            for line in (out / "metrics/metrics.jsonl").read_text().splitlines()
        ]

    SETTINGS = [
        "--seq_len=200",
        "--global_batch=2",
        "--micro_batch=1",
        "--steps=10",
        "--lr=3e-3",
        "--min_lr=3e-4",
        "--warmup_tokens=800",
        "--weight_decay=0.1",
        "--clip=1.0",
        "--seed=5",
        "--attention=exact",
        "--valid_fraction=0",
    ]

    def test_ten_steps_on_several_layouts(self):
        self.assert_same_steps(
            "llama",
            [
                ("one", 1, ["--tp=1"]),
                ("tp2", 2, ["--tp=2"]),
                ("tp3", 3, ["--tp=3"]),
                ("dp2", 2, ["--tp=1"]),
                ("tp2dp2", 4, ["--tp=2"]),
                ("checkpointed", 1, ["--activation_checkpoint=true"]),
            ],
        )

    def test_ten_steps_of_gpt2(self):
        self.assert_same_steps(
            "gpt2", [("one", 1, ["--tp=1"]), ("tp2", 2, ["--tp=2"]), ("tp3", 3, ["--tp=3"])]
        )

    def assert_same_steps(self, kind, layouts):
        model = small_model(self.folder / "model", kind)
        same = [
            f
            for f in self.SETTINGS
            if f.split("=")[0] not in ("--micro_batch", "--attention", "--valid_fraction")
        ]
        script(
            "hf_train_steps.py",
            "--model",
            model,
            "--data",
            self.data,
            *same,
            "--json",
            self.folder / "hf.jsonl",
        )
        expected = [
            json.loads(line)["loss"] for line in (self.folder / "hf.jsonl").read_text().splitlines()
        ]
        self.assertLess(expected[-1], 0.9 * expected[0])  # there was something to learn
        losses = {}
        for name, ranks, flags in layouts:
            with self.subTest(layout=name):
                losses[name] = self.train(model, self.folder / name, ranks, *flags)
                print(
                    f"{name}: largest relative difference to Transformers "
                    f"{numpy.max(numpy.abs(numpy.divide(losses[name], expected) - 1)):.1e}, to one "
                    "process "
                    f"{numpy.max(numpy.abs(numpy.divide(losses[name], losses['one']) - 1)):.1e}"
                )
                numpy.testing.assert_allclose(losses[name], expected, rtol=STEP_TOLERANCE)
                numpy.testing.assert_allclose(losses[name], losses["one"], rtol=LAYOUT_TOLERANCE)
        for name in ("one", "tp2"):
            with self.subTest(exported=name):
                self.assert_same_logits(self.folder / name / "hf")


class RealModelTest(unittest.TestCase):
    def test_perplexity_at_2048(self):
        with tempfile.TemporaryDirectory() as folder:
            common = [
                "--model",
                REAL_MODEL,
                "--data",
                REAL_DATA / "jargon",
                "--seq_len=2048",
                "--max_tokens=4096",
            ]
            script("hf_perplexity.py", *common, "--json", Path(folder) / "hf.json")
            run(
                [
                    BIN / "drrl-eval",
                    *common,
                    "--attention=exact",
                    "--json",
                    Path(folder) / "drrl.json",
                ]
            )
            theirs, ours = (
                json.loads((Path(folder) / name).read_text()) for name in ("hf.json", "drrl.json")
            )
            self.assertEqual(ours["tokens"], theirs["tokens"])
            print(
                f"perplexity {ours['perplexity']:.6f}, Transformers {theirs['perplexity']:.6f}, "
                f"over {ours['tokens']} tokens"
            )
            self.assertLess(
                abs(ours["perplexity"] / theirs["perplexity"] - 1), PERPLEXITY_TOLERANCE
            )


if __name__ == "__main__":
    if sys.argv[1:] == ["RealModelTest"] and not REAL_MODEL.exists():
        print(f"{REAL_MODEL} is not there: tests/run.sh prepares it")
        sys.exit(77)
    unittest.main(verbosity=2)
