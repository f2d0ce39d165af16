#!/usr/bin/env python3
"""Reduced runs of launch/study_policies.py and launch/study_finetune.py on a small random model: what they report is what the programs measured. Environment: DRRL_BIN."""

import json
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


if __name__ == "__main__":
    unittest.main()
