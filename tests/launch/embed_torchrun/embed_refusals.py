#!/usr/bin/env python3
"""What drrl's attention in a Python trainer refuses, and that it leaves the process alone; every
process of torchrun runs it.

torchrun --nproc_per_node 2 tests/launch/embed_torchrun/embed_refusals.py MODEL"""

import ctypes
import os
import sys
import unittest
from pathlib import Path

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "launch/embed_torchrun"))
import drrl_attention  # noqa: E402

LIBRARY, MODEL = os.environ["DRRL_TORCH_OPS"], sys.argv.pop(1)


class Refusals(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        torch.distributed.init_process_group("gloo")
        cls.addClassCleanup(torch.distributed.destroy_process_group)
        cls.group = torch.distributed.group.WORLD.group_name
        cls.lowrank = drrl_attention.register(LIBRARY, head_dim=16, rank=4, near_block=32)
        cls.new = staticmethod(torch.classes.drrl.LowRankAttention)

    def test_options(self):
        for options, message in [
            ({"rank": 99}, "99"),
            ({"rank": -1}, "-1"),
            ({}, "neither a rank nor a policy"),
            ({"rank": "four"}, "four"),
            ({"rank": 4, "near_block": 0}, "near_block.* 0"),
            ({"rank": 4, "basis_updates": -2}, "basis_updates .*-2"),
            ({"policy": "/no/such/file"}, "/no/such/file"),
            ({"rank": 4, "block": 3}, "block"),
        ]:
            with (
                self.subTest(**options),
                self.assertRaisesRegex((RuntimeError, TypeError), message),
            ):
                self.new(head_dim=16, **options)

    def test_tensors(self):
        q, k = torch.randn(1, 6, 100, 16), torch.randn(1, 3, 100, 16)
        w_o = torch.randn(96, 96)
        self.assertEqual(self.lowrank.attend(0, q, k, k, w_o).shape, q.shape)
        for wrong in [
            (q, k[:, :, :50], k[:, :, :50], w_o),
            (q[:, :5], k, k, w_o),
            (q[0], k, k, w_o),
            (q, k, k[:, :2], w_o),
            (q, k, k, w_o[:, :90]),
        ]:
            with self.assertRaisesRegex(RuntimeError, "attend: .*expected"):
                self.lowrank.attend(0, *wrong)

    def test_masks_and_caches(self):
        model = AutoModelForCausalLM.from_pretrained(
            MODEL, attn_implementation="drrl", dtype=torch.float32, local_files_only=True
        )
        ids = torch.arange(100)[None]
        mask = torch.ones_like(ids)
        out = model(input_ids=ids, attention_mask=mask)  # nothing masked
        with self.assertRaisesRegex(RuntimeError, "attend: q .*expected"):
            model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
        mask[0, :3] = 0
        with self.assertRaisesRegex(ValueError, "no padding"):
            model(input_ids=ids, attention_mask=mask)
        with self.assertRaisesRegex(ValueError, "packed"):
            model(input_ids=ids, position_ids=torch.arange(50).repeat(2)[None], use_cache=False)
        model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
        with self.assertRaisesRegex(ValueError, "dropout 0.5"):
            model.train()(input_ids=ids)

    def test_groups(self):
        self.lowrank.check_agreement(self.group)
        with self.assertRaisesRegex(RuntimeError, "no-such-group"):
            self.lowrank.check_agreement("no-such-group")
        with self.assertRaisesRegex(RuntimeError, "timeout of 0 ms"):
            self.lowrank.check_agreement(self.group, 0.0)
        # The same policy, but another number of decisions.
        if torch.distributed.get_rank() == 1:
            self.lowrank.attend(
                0,
                torch.randn(1, 6, 100, 16),
                torch.randn(1, 3, 100, 16),
                torch.randn(1, 3, 100, 16),
                torch.randn(96, 96),
            )
        with self.assertRaisesRegex(
            RuntimeError, r"do not agree on rank decisions: .*\(rank 1 of 2\) has"
        ):
            self.lowrank.check_agreement(self.group)
        self.lowrank.check_agreement(self.group)
        own = self.new(head_dim=16, rank=4 + torch.distributed.get_rank())
        with self.assertRaisesRegex(RuntimeError, "do not agree on rank decisions"):
            own.check_agreement(self.group)

    def test_the_process_is_left_alone(self):
        loaded = Path("/proc/self/maps").read_text()
        self.assertIn("libdrrl_core", loaded)
        self.assertNotIn("libglog", loaded)
        self.assertEqual(
            len({line.split()[-1] for line in loaded.splitlines() if "libgomp" in line}), 1
        )  # two would fight over the cores
        if "libmpi.so" in loaded:
            initialized = ctypes.c_int(-1)
            ctypes.CDLL(
                next(line.split()[-1] for line in loaded.splitlines() if "libmpi.so" in line)
            ).MPI_Initialized(ctypes.byref(initialized))
            self.assertEqual(initialized.value, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
