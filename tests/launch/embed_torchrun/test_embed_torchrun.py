#!/usr/bin/env python3
"""launch/embed_torchrun, two processes over Gloo: a stock Transformers Llama with drrl's attention
against drrl-train, and wrong arguments.
Environment: DRRL_BIN, DRRL_TORCH_OPS (libdrrl_torch_ops.so)."""

import json
import os
import sys
import unittest
from pathlib import Path

import numpy
from reference import Windows, read_tokens
from test_parity import BIN, ROOT, SharedModel, run

LIBRARY = os.environ["DRRL_TORCH_OPS"]
STEPS, BATCH, LENGTH, SEED = 6, 2, 400, 5
TOLERANCE = 1e-4  # relative


def torchrun(program, *arguments):
    return run(
        [
            "env",
            "OMP_NUM_THREADS=1",
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            program,
            *arguments,
        ]
    )


class EmbedTest(SharedModel):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        windows = Windows(read_tokens(cls.data), LENGTH, SEED)
        samples = [windows.sample(index) for index in range(STEPS * BATCH)]
        numpy.save(
            cls.folder / "tokens.npy",
            numpy.concatenate([numpy.concatenate([x, y[:, -1:]], 1) for x, y in samples]),
        )

    def ours(self, name, *flags):
        out = self.folder / name
        run(
            [
                BIN / "drrl-train",
                "--model",
                self.model,
                "--data",
                self.data,
                "--output",
                out,
                f"--seq_len={LENGTH}",
                f"--global_batch={BATCH}",
                "--micro_batch=1",
                f"--steps={STEPS}",
                "--lr=3e-3",
                "--min_lr=3e-3",
                "--warmup_tokens=0",
                "--weight_decay=0",
                "--clip=1.0",
                f"--seed={SEED}",
                "--valid_fraction=0",
                *flags,
            ]
        )
        return [
            json.loads(line) for line in (out / "metrics/metrics.jsonl").read_text().splitlines()
        ]

    def theirs(self, *flags):
        out = torchrun(
            ROOT / "launch/embed_torchrun/train.py",
            "--library",
            LIBRARY,
            "--model",
            self.model,
            "--tokens",
            self.folder / "tokens.npy",
            f"--steps={STEPS}",
            f"--global_batch={BATCH}",
            "--lr=3e-3",
            "--near_block=32",
            *flags,
        )
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]

    def assert_same(self, steps, expected):
        self.assertEqual(len(steps), STEPS)
        for key in ("loss", "grad_norm"):
            difference = numpy.abs(
                numpy.divide([s[key] for s in steps], [s[key] for s in expected]) - 1
            )
            print(
                f"{self.id().split('.')[-1]}: largest relative difference of {key} "
                f"{difference.max():.1e}"
            )
            self.assertLess(difference.max(), TOLERANCE)

    def test_steps_at_a_fixed_rank(self):
        exact = self.ours("exact", "--attention=exact")
        expected = self.ours("fixed", "--attention=lowrank", "--rank=4", "--near_block=32")
        apart = numpy.abs(
            numpy.divide([s["loss"] for s in expected], [s["loss"] for s in exact]) - 1
        )
        self.assertGreater(apart.max(), 5 * TOLERANCE)  # low rank shows in the losses
        self.assertLess(expected[-1]["loss"], 0.9 * expected[0]["loss"])
        steps = self.theirs("--rank=4")
        self.assert_same(steps, expected)
        self.assertLess(steps[-1]["flops"], 0.9)
        self.assert_same(self.theirs("--rank=4", "--activation_checkpoint"), expected)

    def test_steps_at_calibrated_ranks(self):
        policy = self.folder / "ranks.safetensors"
        run(
            [
                BIN / "drrl-policy",
                "calibrate",
                "--model",
                self.model,
                "--data",
                self.data,
                f"--seq_len={LENGTH}",
                "--near_block=32",
                "--policy",
                policy,
                "--calibration_tokens=400",
            ]
        )
        expected = self.ours(
            "dp",
            "--attention=lowrank",
            "--rank_policy=dp",
            "--rank_budget=0.8",
            "--policy",
            policy,
            "--near_block=32",
        )
        steps = self.theirs("--policy", policy, "--rank_budget=0.8")
        self.assert_same(steps, expected)
        self.assertLess(
            max(s["flops"] for s in steps), 0.85
        )  # of the budget, whose figure is the forward's alone

    def test_refusals(self):
        torchrun(Path(__file__).with_name("embed_refusals.py"), self.model)


if __name__ == "__main__":
    unittest.main(verbosity=2)
