"""What the comparison programs share: drrl's data order, written a second time
(models/data/sequence_dataset.h is the first), and model loading."""

import struct
import sys
from pathlib import Path

import numpy
import torch

MASK = (1 << 64) - 1


def read_tokens(prefix):
    """All tokens of a Megatron token file, in the order of the file."""
    index = Path(f"{prefix}.idx").read_bytes()
    if index[:9] != b"MMIDIDX\x00\x00":
        sys.exit(f"{prefix}.idx: not a Megatron index")
    version, code = struct.unpack_from("<QB", index, 9)
    dtypes = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
    if version != 1 or code not in dtypes:
        sys.exit(f"{prefix}.idx: version {version}, type {code}: not known")
    return numpy.fromfile(f"{prefix}.bin", dtype=dtypes[code]).astype(numpy.int64)


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def permuted_index(index, n, key):
    """A Feistel network on the next even power of two, walked until it lands in [0, n)."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, x = (1 << half) - 1, index
    while True:
        left, right = x >> half, x & mask
        for step in range(6):
            left, right = right, left ^ (mix(right ^ mix((key + step) & MASK)) & mask)
        x = left << half | right
        if x < n:
            return x


class Windows:
    """Windows of seq_len inputs and as many labels; neighbours share one token."""

    def __init__(self, tokens, seq_len, seed=0):
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.count = max(0, (len(tokens) - 1) // seq_len)
        if self.count == 0:
            sys.exit(f"{len(tokens)} tokens hold no window of {seq_len} + 1")

    def ordered(self, window):
        """(tokens [1, L], labels [1, L]) of one window in the order of the file"""
        row = torch.from_numpy(
            self.tokens[window * self.seq_len : (window + 1) * self.seq_len + 1]
        )[None]
        return row[:, :-1], row[:, 1:]

    def sample(self, index):
        """(tokens, labels) of a global training sample: a new permutation of the windows in each
        epoch"""
        epoch, position = divmod(index, self.count)
        return self.ordered(
            permuted_index(position, self.count, mix(self.seed) ^ mix(epoch ^ 0x5EED << 32))
        )


def load_model(directory, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )


def loss_sum(model, tokens, labels):
    """Sum over the labels of -log p, in fp32"""
    logits = model(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="sum"
    )
