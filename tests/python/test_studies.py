#!/usr/bin/env python3
"""Reduced runs of launch/study_policies.py, study_finetune.py and study_straggler.py on a small random model: what they report is what the programs measured.
Environment: DRRL_BIN."""

import json
import os
import statistics
import sys
import unittest

import numpy

from test_parity import BIN, HERE, SharedModel, run

LAUNCH = HERE.parents[1] / "launch"
SHAPE = ["--near_block=32", "--sink_tokens=2"]


class StudiesTest(SharedModel):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.policy = cls.folder / "ranks.safetensors"
        run([BIN / "drrl-policy", "calibrate", "--model", cls.model, "--data", cls.data, "--policy", cls.policy, "--seq_len=300", "--calibration_tokens=600",
             *SHAPE])

    def study(self, name, *arguments):
        result = self.folder / f"{name}.json"
        table = run([sys.executable, LAUNCH / f"{name}.py", "--model", self.model, "--data", self.data, "--policy", self.policy, "--build", BIN.parent,
                     "--seq_len=300", "--max_tokens=900", "--threads=1", "--json", result, *(f"--flag={flag}" for flag in SHAPE), *arguments])
        return table, json.loads(result.read_text())

    def test_policies(self):
        table, result = self.study("study_policies", "--budgets", 0.8, 0.9, 0.97, "--ranks", 8, "--energies", 0.9, "--time")
        rows = {(row["policy"], row["value"]): row for row in result["rows"]}
        self.assertEqual(list(rows), [("fixed", 8), ("energy", 0.9)] + [(p, b) for b in (0.8, 0.9, 0.97) for p in ("random", "greedy", "dp", "gates")])
        exact = numpy.array(result["exact"]["sequence_nll"])
        self.assertEqual(len(exact), 3)
        for (policy, value), row in rows.items():
            self.assertIn(f"{policy} {value}", table)
            difference = numpy.mean(numpy.array(row["sequence_nll"]) - exact)
            self.assertAlmostEqual(row["increase_percent"][0], 100 * (numpy.exp(difference) - 1))
            self.assertLessEqual(row["increase_percent"][1], row["increase_percent"][0])
            self.assertGreater(row["time"], 0)
            if policy in ("random", "greedy", "dp"):
                self.assertAlmostEqual(row["operations"], value, delta=0.05)
        by_operations = [row for row in result["comparisons"] if row["unit"] == "operations"]
        for row in by_operations:
            at = [rows["dp", budget]["operations"] for budget in (0.8, 0.9, 0.97)]
            loss = [numpy.mean(rows["dp", budget]["sequence_nll"]) for budget in (0.8, 0.9, 0.97)]
            expected = numpy.mean(rows["gates", row["value"]]["sequence_nll"]) - numpy.interp(row["cost"], at, loss)
            self.assertAlmostEqual(row["nats"][0], expected)

    def test_finetuning(self):
        table, result = self.study("study_finetune", "--valid_data", self.data, "--steps", 3, "--budgets", 0.9, "--lr", 1e-3, "--row_gates")
        self.assertEqual([(row["budget"], row["evaluated"]) for row in result["rows"]], [(0.9, "low rank"), (0.9, "exact")])
        self.assertEqual(len(result["training_losses"]), 3)
        self.assertLess(result["exact"]["perplexity"], result["before"]["perplexity"])
        low, exact = result["rows"]
        self.assertEqual(len(low["training_losses"]), 3)
        self.assertNotEqual(low["training_losses"], result["training_losses"])
        numpy.testing.assert_allclose(low["training_losses"], result["training_losses"], rtol=0.02)
        self.assertLess(low["operations"], 1)
        difference = numpy.mean(exact["sequence_nll"]) - result["exact"]["nll"]
        self.assertAlmostEqual(exact["increase_percent"][0], 100 * (numpy.exp(difference) - 1))
        self.assertIn("3 sequences of 300 tokens, 3 steps", table)

    @unittest.skipIf(len(os.sched_getaffinity(0)) < 2, "two processes need a core each")
    def test_straggler(self):
        table, result = self.study("study_straggler", "--valid_data", self.data, "--budgets", 1, "--slow", 1, "--steps", 2, "--rounds", 2,
                                   "--flag=--balance_damage=0.05")
        (row,) = result["rows"]
        self.assertEqual({name: len(times) for name, times in row["times"].items()}, {"undisturbed": 4, "slowed": 4, "balanced": 4})
        self.assertEqual(row["ms"], {name: statistics.median(times) for name, times in row["times"].items()})
        lost = row["ms"]["slowed"] - row["ms"]["undisturbed"]
        self.assertAlmostEqual(row["recovered"], (row["ms"]["slowed"] - row["ms"]["balanced"]) / lost)
        self.assertIn("process 1 slowed down", table)
        # So short a step may escape the loop; whatever was measured, ranks and speeds must fit each other.
        self.assertTrue(0 < row["balance_slowest"] <= 1)
        if row["speeds"]:
            self.assertEqual((len(row["speeds"]), max(row["speeds"])), (2, 1))
            self.assertLessEqual(row["balance_damage"], 0.05)
        else:
            self.assertEqual((row["balance_damage"], row["balance_time"], row["increase_percent"]), (0, 1, [0, 0, 0]))

    def test_balanced_ranks_are_evaluated(self):
        def evaluate(*flags):
            out = self.folder / "balanced.json"
            run([BIN / "drrl-eval", "--model", self.model, "--data", self.data, "--policy", self.policy, "--attention=lowrank", "--rank_policy=dp",
                 "--rank_budget=1", "--seq_len=300", "--max_tokens=900", *SHAPE, *flags, "--json", out])
            return json.loads(out.read_text())

        plain, lame, even = evaluate(), evaluate("--balance_speeds=0.5,1", "--balance_damage=0.05"), evaluate("--balance_speeds=2,2,2")
        self.assertEqual((plain["mean_rank_qk"], plain["mean_rank_v"]), (16, 16))
        self.assertEqual(even["sequence_nll"], plain["sequence_nll"])
        self.assertLess(lame["attention_flops_fraction"], 0.99)
        self.assertNotEqual(lame["nll"], plain["nll"])
        self.assertIn("balanced for speeds 0.5,1 within 0.05 nats", lame["attention"])


if __name__ == "__main__":
    unittest.main()
