#!/usr/bin/env python3
"""launch/bench/peers.py: its sizes, and that each package, fed queries, keys and values directly,
computes attention where it should."""

import subprocess
import unittest

import peers as bench_peers
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

L, HEADS, D = 48, 3, 16


def inputs(scale=1.0):
    torch.manual_seed(1)
    return [scale * torch.randn(1, HEADS, L, D) for _ in range(3)]


class SizesTest(unittest.TestCase):
    def test_the_largest_size_within_the_budget(self):
        self.assertEqual(bench_peers.largest(lambda m: m * m, 50, 100), 7)
        self.assertEqual(bench_peers.largest(lambda m: m * m, 49, 100), 7)
        self.assertEqual(bench_peers.largest(lambda m: m, 1000, 100), 100)
        self.assertEqual(bench_peers.largest(lambda m: m, 0, 100), 1)

    def test_linear_peers_spend_the_share(self):
        for length, share in ((1024, 0.3), (4096, 0.5)):
            for flops in (bench_peers.performer_flops, bench_peers.linformer_flops):
                m = bench_peers.largest(
                    lambda m, flops=flops, length=length: flops(length, 64, m),
                    share * 4 * 64 * length**2,
                    length,
                )
                self.assertAlmostEqual(m, share * length / 2, delta=1)


class PackagesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        try:
            bench_peers.install_packages()
        except subprocess.CalledProcessError as error:
            raise unittest.SkipTest("pip cannot install the peers' packages here") from error

    def error(self, method, exact):
        with torch.no_grad():
            return bench_peers.relative(method, exact)

    def test_linformer_that_keeps_every_token_is_attention(self):
        q, k, v = inputs()
        full = bench_peers.linformer(L, D, HEADS, L, pooled=True)(q, k, v)
        self.assertLess(self.error(full, sdpa(q, k, v)), 1e-5)
        half = bench_peers.linformer(L, D, HEADS, L // 2, pooled=True)(q, k, v)
        self.assertGreater(self.error(half, sdpa(q, k, v)), 1e-2)

    def test_nystrom_with_a_landmark_for_each_token_is_attention(self):
        q, k, v = inputs(0.5)
        with torch.no_grad():
            full = bench_peers.nystrom(L, D, HEADS, L)(q, k, v)
            few = bench_peers.nystrom(L, D, HEADS, 8)(q, k, v)
        self.assertLess(self.error(full, sdpa(q, k, v)), 0.2)  # six iterations of the pseudoinverse
        self.assertGreater(self.error(few, sdpa(q, k, v)), self.error(full, sdpa(q, k, v)))

    def test_performer_with_many_features_is_near_attention_and_causal(self):
        q, k, v = inputs(0.4)
        with torch.no_grad():
            for causal in (True, False):
                torch.manual_seed(2)
                exact = sdpa(q, k, v, is_causal=causal)
                many = bench_peers.performer(L, D, HEADS, 4096, causal)(q, k, v)
                self.assertLess(self.error(many, exact), 0.1, f"causal={causal}")
                few = bench_peers.performer(L, D, HEADS, 16, causal)(q, k, v)
                self.assertGreater(self.error(few, exact), 0.1, f"causal={causal}")
            model = bench_peers.performer(L, D, HEADS, 64, True)
            before = model(q, k, v)
            v[:, :, 30:] += 1
            self.assertTrue(torch.equal(before[:, :, :30], model(q, k, v)[:, :, :30]))

    def test_rows_name_every_method(self):
        layers = [tuple(inputs())]
        with torch.no_grad():
            rows = bench_peers.measure_packages(layers, [torch.randn(40, HEADS * D)], [0.5], 2)
        self.assertEqual(
            [r["method"] for r in rows],
            [
                "SDPA, here",
                "SDPA, here",
                "Performer",
                "Performer",
                "Nystromformer",
                "Linformer, random",
                "Linformer, pooled",
            ],
        )
        for row in rows:
            self.assertLessEqual(row["flops_fraction"], 1.0)
            self.assertGreater(row["ms"], 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
