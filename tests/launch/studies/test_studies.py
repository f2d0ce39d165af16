#!/usr/bin/env python3
"""Reduced runs of the studies in launch/ on a small random model: what they report is what the
programs measured, and what launch/studies/plots.py draws. Environment: DRRL_BIN."""

import json
import os
import statistics
import sys
import unittest
from pathlib import Path

import numpy
import safetensors
from test_parity import BIN, ROOT, SharedModel, run

LAUNCH = ROOT / "launch/studies"
SHAPE = ["--near_block=32", "--sink_tokens=2"]


class StudiesTest(SharedModel):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.policy = cls.folder / "ranks.safetensors"
        run(
            [
                BIN / "drrl-policy",
                "calibrate",
                "--model",
                cls.model,
                "--data",
                cls.data,
                "--policy",
                cls.policy,
                "--seq_len=300",
                "--calibration_tokens=600",
                *SHAPE,
            ]
        )

    def study(self, name, *arguments):
        result = self.folder / f"{name}.json"
        table = run(
            [
                sys.executable,
                LAUNCH / f"{name}.py",
                "--model",
                self.model,
                "--data",
                self.data,
                "--policy",
                self.policy,
                "--build",
                BIN.parent,
                "--max_tokens=900",
                "--threads=1",
                "--json",
                result,
                *(f"--flag={flag}" for flag in SHAPE),
                *arguments,
            ]
        )
        return table, json.loads(result.read_text())

    def pictures(self, name):
        """The SVG files of a study, drawn twice: text by file name."""
        texts = []
        for _ in range(2):
            try:
                files = run(
                    [sys.executable, LAUNCH / "plots.py", self.folder / f"{name}.json"]
                ).split()
            except AssertionError as error:
                if "pip" in str(error):
                    self.skipTest("pip cannot install matplotlib here")
                raise
            texts.append({Path(file).name: Path(file).read_text() for file in files})
        self.assertEqual(*texts)
        return texts[0]

    def assert_increase(self, row, exact, key="increase_percent"):
        difference = numpy.mean(numpy.array(row["sequence_nll"]) - exact)
        self.assertAlmostEqual(row[key][0], 100 * (numpy.exp(difference) - 1))
        self.assertLessEqual(row[key][1], row[key][0])
        self.assertLessEqual(row[key][0], row[key][2])

    def test_policies(self):
        log, tables = self.folder / "policies.jsonl", self.folder / "policies.md"
        budgets, lengths = (0.2, 0.8, 0.9, 0.97), (300, 500)
        arguments = [
            "--seq_len",
            *lengths,
            "--budgets",
            *budgets,
            "--ranks",
            8,
            "--energies",
            0.9,
            "--time",
            "--log",
            log,
            "--markdown",
            tables,
        ]
        table, result = self.study("policies", *arguments)
        rows = {(row["seq_len"], row["policy"], row["value"]): row for row in result["rows"]}
        self.assertEqual(
            list(rows),
            [
                (length, *of)
                for length in lengths
                for of in [("fixed", 8), ("energy", 0.9)]
                + [(p, b) for b in budgets for p in ("random", "greedy", "dp", "gates")]
            ],
        )
        for (length, policy, value), row in rows.items():
            self.assertEqual(row["met"], value != 0.2, row)
            if not row["met"]:
                self.assertIn(f"rank budget 0.2 cannot be met at {length} tokens", row["reason"])
                continue
            self.assertIn(f"{policy} {value}", table)
            exact = result["exact"][str(length)]["sequence_nll"]
            self.assertEqual(len(exact), -(-900 // length))
            self.assert_increase(row, exact)
            self.assertGreater(row["time"], 0)
            if policy in ("random", "greedy", "dp"):
                self.assertAlmostEqual(row["operations"], value, delta=0.1)
        by_operations = [row for row in result["comparisons"] if row["unit"] == "operations"]
        for row in by_operations:
            dp = [rows[row["seq_len"], "dp", budget] for budget in budgets[1:]]
            loss = numpy.interp(
                row["cost"],
                [of["operations"] for of in dp],
                [numpy.mean(of["sequence_nll"]) for of in dp],
            )
            self.assertAlmostEqual(
                row["nats"][0],
                numpy.mean(rows[row["seq_len"], "gates", row["value"]]["sequence_nll"]) - loss,
            )
        lines = tables.read_text().splitlines()
        self.assertEqual(sum("cannot be met" in line for line in lines), 8)
        self.assertEqual(sum(line.startswith("| full rank") for line in lines), 2)

        logged = log.read_text()
        self.assertEqual(len(logged.splitlines()), len(rows) + 2)
        again = self.study("policies", *arguments)
        self.assertEqual(again, (table, result))
        self.assertEqual(log.read_text(), logged)  # nothing ran twice
        picture = self.pictures("policies")["policies.svg"]
        for text in ("L = 300", "L = 500", "cannot be met: 0.2", "energy", "attention time"):
            self.assertIn(text, picture)

    def test_updates(self):
        table, result = self.study(
            "updates", "--seq_len=300", "--budgets", 0.9, "--updates", 0, 1, -1, "--rank", 8
        )
        rows = {(row["policy"], row["value"]): row for row in result["rows"]}
        first_block = "fixed 8, from the first block"
        self.assertEqual(
            list(rows),
            [
                (name, updates)
                for name in ("dp 0.9", "gates 0.9", first_block)
                for updates in (0, 1, -1)
            ],
        )
        pairs = 3 * 3 * 3 * (-(-(300 - 2) // 32) - 1)  # sequences, layers, KV groups, far pairs
        for (name, updates), row in rows.items():
            self.assertGreater(row["basis_ms"], 0)
            if name == first_block:
                self.assertEqual(row["decompositions"], 2 * (27 if updates >= 0 else pairs))
                self.assertEqual(row["basis_updates"], 2 * pairs * max(0, updates))
            elif updates >= 0:
                self.assertEqual(row["decompositions"], 0)
        for name in ("dp 0.9", first_block):
            self.assertEqual(
                len({str(rows[name, updates]["sequence_nll"]) for updates in (0, 1, -1)}), 3
            )
        self.assertIn("solved", self.pictures("updates")["updates.svg"])

    def test_ranks(self):
        out = self.folder / "decisions"
        _, result = self.study(
            "ranks", "--seq_len=300", "--budget=0.7", "--energy=0.9", "--out", out
        )
        self.assertEqual(list(result["decisions"]), ["dp", "energy", "gates"])
        for row in result["rows"]:
            lines = [
                json.loads(line)
                for line in (out / f"{row['policy']}.jsonl").read_text().splitlines()
            ]
            self.assertEqual(
                [(line["sequence"], line["layer"]) for line in lines],
                [(s, layer) for s in range(3) for layer in range(3)],
            )
            for kind in ("rank_qk", "rank_v"):  # what drrl-eval counts by itself
                self.assertAlmostEqual(
                    numpy.mean([line[kind] for line in lines]), row[f"mean_{kind}"]
                )
            level, begin, rows = (
                numpy.array(lines[0][key]) for key in ("level", "query_begin", "query_rows")
            )
            self.assertEqual(
                sum(rows),
                sum(
                    min(300, 2 + 32 * (block + 1)) - (2 + 32 * block)
                    for block in range(10)
                    for bit in range(4)
                    if block >> bit & 1
                ),
            )
            self.assertTrue(
                all((at - 2) // 32 >> of & 1 for at, of in zip(begin, level))
            )  # an odd node of its level
            views = result["decisions"][row["policy"]]
            self.assertEqual(numpy.shape(views["map"]["rank_qk"]), (3, 3, 4))
            of_level = numpy.mean(
                [
                    numpy.array(line["rank_qk"])[1, level == 0]
                    for line in lines
                    if line["layer"] == 2
                ],
                axis=0,
            )
            self.assertAlmostEqual(
                views["map"]["rank_qk"][2][1][0], numpy.average(of_level, weights=rows[level == 0])
            )
            last = numpy.array([line["rank_v"] for line in lines if line["layer"] == 0])[
                :, :, begin + rows == 300
            ]  # the pairs that the last query sees
            self.assertAlmostEqual(views["along"]["rank_v"][0][-1], last.mean())
            self.assertEqual(row["policy"] == "gates", "exact" in views["map"])
            if row["policy"] == "dp":  # the same for every text
                self.assertEqual(
                    len({str(line["rank_qk"]) for line in lines if line["layer"] == 1}), 1
                )
        exact = [
            line["exact"]
            for line in map(json.loads, (out / "gates.jsonl").read_text().splitlines())
            if line["exact"]
        ]
        self.assertTrue(exact)
        self.assertTrue(0 < numpy.max(exact) <= 1)
        pictures = self.pictures("ranks")
        self.assertEqual(sorted(pictures), ["ranks-along.svg", "ranks-map.svg"])
        self.assertIn("gates: share of entries that gates make exact", pictures["ranks-map.svg"])

    def test_ablations(self):
        _, result = self.study(
            "ablations",
            "--seq_len=300",
            "--budget=0.9",
            "--rank=8",
            "--near_blocks",
            64,
            "--guard_eps=0.1",
            "--calibration_data",
            self.data,
            "--calibration_tokens=300",
            "--calibration_seq_len=300",
            "--calibrations",
            self.folder,
        )
        rows = {row["policy"]: row for row in result["rows"]}
        self.assertEqual(
            list(rows),
            [
                "dp",
                "fixed ranks",
                "random",
                "greedy",
                "no gates",
                "no updates",
                "decompositions",
                "no residual factors",
                "unweighted Grams",
                "guard",
                "no sinks",
                "near 64",
            ],
        )
        dp = rows.pop("dp")
        self.assertEqual(dp["over_dp_percent"], [0, 0, 0])
        for name, row in rows.items():
            self.assert_increase(row, dp["sequence_nll"], "over_dp_percent")
            if name not in (
                "greedy",
                "no gates",
            ):  # which for a model so small find the same ranks, and gates that no entry passes
                self.assertNotEqual(row["sequence_nll"], dp["sequence_nll"], name)
            self.assertNotEqual(row["attention"], dp["attention"], name)
        for ablated in ("residual", "mass"):  # without gates, which make exact what they meet
            out = self.folder / "ablated.json"
            run(
                [
                    BIN / "drrl-eval",
                    "--model",
                    self.model,
                    "--data",
                    self.data,
                    "--policy",
                    self.policy,
                    "--attention=lowrank",
                    "--rank_policy=dp",
                    "--rank_budget=0.9",
                    "--seq_len=300",
                    "--max_tokens=900",
                    f"--ablate={ablated}",
                    *SHAPE,
                    "--json",
                    out,
                ]
            )
            self.assertEqual(
                json.loads(out.read_text())["attention_flops_fraction"],
                rows["no gates"]["operations"],
            )
        self.assertGreater(rows["guard"]["guard_raises"], 0)
        self.assertGreater(rows["guard"]["operations"], dp["operations"])
        self.assertIn("no sinks", self.pictures("ablations")["ablations.svg"])

    def test_finetuning(self):
        table, result = self.study(
            "finetune",
            "--seq_len=300",
            "--valid_data",
            self.data,
            "--steps",
            3,
            "--budgets",
            0.9,
            "--lr",
            1e-3,
            "--gates",
        )
        self.assertEqual(
            [(row["budget"], row["evaluated"]) for row in result["rows"]],
            [(0.9, "low rank"), (0.9, "exact")],
        )
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
        for spent in (result["training"], low["training"]):
            self.assertTrue(0 < spent["attention_seconds"] < spent["step_seconds"])
        self.assertIn(
            "attention "
            f"{low['training']['attention_seconds'] / result['training']['attention_seconds']:.3f} "
            "of",
            table,
        )

    @unittest.skipIf(len(os.sched_getaffinity(0)) < 2, "two processes need a core each")
    def test_straggler(self):
        table, result = self.study(
            "straggler",
            "--valid_data",
            self.data,
            "--seq_len",
            300,
            "--budgets",
            1,
            "--slow",
            1,
            "--steps",
            2,
            "--rounds",
            2,
            "--flag=--balance_damage=0.05",
        )
        (row,) = result["rows"]
        self.assertEqual(
            {name: len(times) for name, times in row["times"].items()},
            {"undisturbed": 4, "slowed": 4, "balanced": 4},
        )
        self.assertEqual(
            row["ms"], {name: statistics.median(times) for name, times in row["times"].items()}
        )
        lost = row["ms"]["slowed"] - row["ms"]["undisturbed"]
        self.assertAlmostEqual(
            row["recovered"], (row["ms"]["slowed"] - row["ms"]["balanced"]) / lost
        )
        self.assertIn("process 1 slowed down", table)
        # So short a step may escape the loop; whatever was measured, ranks and speeds must fit each
        # other.
        self.assertTrue(0 < row["balance_slowest"] <= 1)
        if row["speeds"]:
            self.assertEqual((len(row["speeds"]), max(row["speeds"])), (2, 1))
            self.assertLessEqual(row["balance_damage"], 0.05)
        else:
            self.assertEqual(
                (row["balance_damage"], row["balance_time"], row["increase_percent"]),
                (0, 1, [0, 0, 0]),
            )

    def test_agent(self):
        traces, agents, out = (
            self.folder / "traces.safetensors",
            self.folder / "agents",
            self.folder / "agent.json",
        )
        run(
            [
                BIN / "drrl-policy",
                "record",
                "--model",
                self.model,
                "--data",
                self.data,
                "--policy",
                self.policy,
                "--seq_len=300",
                "--calibration_tokens=1800",
                "--traces",
                traces,
                *SHAPE,
            ]
        )
        with safetensors.safe_open(traces, framework="numpy") as file:
            recorded = file.get_tensor("tokens")
        text = numpy.fromfile(
            f"{self.data}.bin", dtype=numpy.uint16
        )  # evenly spread windows of 300
        windows = (len(text) - 1) // 300
        numpy.testing.assert_array_equal(
            recorded, [text[i * windows // 6 * 300 :][:300] for i in range(6)]
        )
        table = run(
            [
                sys.executable,
                LAUNCH / "agent.py",
                "--policy",
                self.policy,
                "--traces",
                traces,
                "--model",
                self.model,
                "--seeds",
                2,
                "--held_out",
                2,
                "--validation",
                2,
                "--build",
                BIN.parent,
                "--out",
                agents,
                "--json",
                out,
                "--",
                "--gates",
                "--fit_steps=20",
                "--reward_steps=20",
            ]
        )
        result = json.loads(out.read_text())
        self.assertEqual([run["seed"] for run in result["runs"]], [1, 2])
        for row, *reports in zip(result["rows"], *(one["held_out"] for one in result["runs"])):
            dp = numpy.mean(reports[0]["dp"])
            self.assertAlmostEqual(
                row["agent"][0], 1 - numpy.mean([report["agent"] for report in reports]) / dp
            )
            self.assertLessEqual(row["agent"][1], row["agent"][0] + 1e-12)
            self.assertGreaterEqual(
                row["bound"], max(row["oracle"], row["refitted"], *row["agents"])
            )  # nobody can save more than hindsight
            self.assertIn(f"{1e3 * dp:8.3f}", table)
        first, *_, last = result["rows"]
        self.assertIsNone(last["worth"])
        if first["worth"] is not None:
            self.assertEqual(first["worth"] > 0, first["oracle"] > 0)
        (told,) = result["foretold"].values()
        self.assertEqual(set(told), {"entries", "scores", "scores, gate", "values", "values, gate"})
        self.assertTrue(
            all(
                set(of) == {"states", "text", "both", "past"} and max(of.values()) < 1
                for of in told.values()
            )
        )
        self.assertIn("by states, by text, by both, by past", table)
        policies, result = self.study(
            "policies",
            "--seq_len",
            300,
            "--budgets",
            0.9,
            "--ranks",
            8,
            "--energies",
            "--policy",
            agents / "agent-1.safetensors",
        )
        self.assertIn("rl", [row["policy"] for row in result["rows"]])
        self.assertTrue(
            all(
                c["against"] == {"rl": "gates", "gates": "dp"}[c["policy"]]
                for c in result["comparisons"]
            )
        )

    def test_balanced_ranks_are_evaluated(self):
        def evaluate(*flags):
            out = self.folder / "balanced.json"
            run(
                [
                    BIN / "drrl-eval",
                    "--model",
                    self.model,
                    "--data",
                    self.data,
                    "--policy",
                    self.policy,
                    "--attention=lowrank",
                    "--rank_policy=dp",
                    "--rank_budget=1",
                    "--seq_len=300",
                    "--max_tokens=900",
                    *SHAPE,
                    *flags,
                    "--json",
                    out,
                ]
            )
            return json.loads(out.read_text())

        plain, lame, even = (
            evaluate(),
            evaluate("--balance_speeds=0.5,1", "--balance_damage=0.05"),
            evaluate("--balance_speeds=2,2,2"),
        )
        self.assertEqual((plain["mean_rank_qk"], plain["mean_rank_v"]), (16, 16))
        self.assertEqual(even["sequence_nll"], plain["sequence_nll"])
        self.assertLess(lame["attention_flops_fraction"], 0.99)
        self.assertNotEqual(lame["nll"], plain["nll"])
        self.assertIn("balanced for speeds 0.5,1 within 0.05 nats", lame["attention"])


if __name__ == "__main__":
    unittest.main()
