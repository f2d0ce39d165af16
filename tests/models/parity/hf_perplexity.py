#!/usr/bin/env python3
"""Perplexity of a Hugging Face model over a token file with Transformers + SDPA: what drrl-eval's
figure must equal.

The file is cut into windows as drrl-eval cuts it (window w: tokens w L ... (w + 1) L, L of them
labels), in order.
"""

import argparse
import json
import math
import sys
import time

import torch
from reference import Windows, load_model, loss_sum, read_tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--data", required=True, help="prefix of .bin and .idx")
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument(
        "--max_tokens",
        type=int,
        default=0,
        help="stop after this many labels, rounded up to whole windows; 0: all",
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp64"], default="fp32")
    parser.add_argument("--json", help="file to write, default standard output only")
    options = parser.parse_args()

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[options.dtype]
    model = load_model(options.model, dtype).eval()
    windows = Windows(read_tokens(options.data), options.seq_len)
    count = windows.count
    if options.max_tokens:
        count = min(count, math.ceil(options.max_tokens / options.seq_len))
    total, start = 0.0, time.perf_counter()
    with torch.no_grad():
        for window in range(count):
            total += float(loss_sum(model, *windows.ordered(window)))
    nll = total / (count * options.seq_len)
    result = {
        "perplexity": math.exp(nll),
        "nll": nll,
        "tokens": count * options.seq_len,
        "seq_len": options.seq_len,
        "dtype": options.dtype,
        "seconds": time.perf_counter() - start,
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": __import__("transformers").__version__,
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        with open(options.json, "w") as file:
            file.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
