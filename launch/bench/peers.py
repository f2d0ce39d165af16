#!/usr/bin/env python3
"""Low-rank attention against Performer, Nystromformer and Linformer, from their Python packages, on
the queries, keys and values that the layers of a real model see of a real text: output error at
equal operations, and time, in one table.

    launch/bench/peers.py --model DIR --data PREFIX [--seq_len 4096] [--layers 3,15,27]
            [--ranks 16,32] [--json FILE]

drrl-bench peers measures PyTorch's SDPA and drrl's own methods and hands over its inputs; then the
packages are measured here, on as many threads. SDPA is measured here once more, and speeds are
against the SDPA of the same process. For every drrl row, each peer gets the size (features,
landmarks, projected length) that spends the same share of the operations of exact attention.

Only Performer has a causal form, whose package runs a slow loop of running sums unless a CUDA
extension of pytorch-fast-transformers is there. Nystromformer and Linformer mix later tokens into
earlier ones by construction, so they are compared with exact attention *without* the causal mask,
at the same share of its operations, which are twice as many. None of the peers is trained to be
one: each stands in for exact attention as drrl does. Linformer's learned projection is taken twice:
random, as the package starts it, and as the mean of neighbouring tokens, the untrained choice that
its paper names.

Packages (installed into a folder of their own under the cache, without dependencies):
performer-pytorch, nystrom-attention, linformer, and einops, local-attention and
axial-positional-embedding, which they import. Papers: Performer arXiv 2009.14794, Nystromformer
arXiv 2102.03902, Linformer arXiv 2006.04768.

Exit status: 0 measured, 1 a program, pip or a package failed.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "prepare"))
import packages  # noqa: E402
from drrl_prepare.files import write_atomically  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [
    "performer-pytorch==1.1.4",
    "nystrom-attention==0.0.14",
    "linformer==0.2.3",
    "einops==0.8.2",
    "local-attention==1.9.15",
    "axial-positional-embedding==0.3.12",
    "setuptools==80.9.0",
]  # setuptools: distutils, which Python 3.12 dropped

ONCE_MS = 2e3  # what takes longer than this is measured once: no warm-up matters to it


def install_packages():
    """Makes the packages importable."""
    packages.add("peers", PACKAGES)
    warnings.filterwarnings("ignore")  # they are older than this PyTorch


def largest(cost, budget, limit):
    """The largest size in 1..limit whose cost is within the budget (costs grow with the size), at
    least 1."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


# Operations of one head, multiply and add as two, of length L, head dim d and size m, as the
# packages execute them.
def performer_flops(L, d, m):
    return (
        8 * L * d * m
    )  # features of q and of k, state of keys and values, product with the queries


def nystrom_flops(L, d, m):
    return (
        8 * L * d * m + 2 * L * m * m + 48 * m**3
    )  # three score matrices and their products; six iterations of the pseudoinverse


def linformer_flops(L, d, m):
    return 8 * L * d * m  # two projections along the sequence, scores, values


class Columns:
    """In place of a layer's input projection: the queries, keys or values out of rows [q | k |
    v]."""

    def __init__(self, index, width):
        self.part = slice(index * width, (index + 1) * width)

    def __call__(self, x):
        return x[..., self.part]


def replace(module, **parts):
    """Puts functions in the place of submodules."""
    import torch

    class Function(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    for name, function in parts.items():
        setattr(module, name, Function(function))
    return module


def rows_of(q, k, v):
    """[1, H, L, d] each -> [1, L, 3 H d]"""
    import torch

    return torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)


def heads_of(rows, heads):
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def performer(L, d, heads, m, causal):
    from performer_pytorch.performer_pytorch import FastAttention

    with contextlib.redirect_stdout(
        sys.stderr
    ):  # it says there that its CUDA code for the causal form is not installed
        return FastAttention(dim_heads=d, nb_features=m, causal=causal)


def nystrom(L, d, heads, m):
    from nystrom_attention import NystromAttention

    module = NystromAttention(
        dim=heads * d, dim_head=d, heads=heads, num_landmarks=m, residual=False
    )
    replace(module, to_qkv=lambda x: x, to_out=lambda x: x)
    return lambda q, k, v: heads_of(module(rows_of(q, k, v)), heads)


def linformer(L, d, heads, m, pooled):
    import torch
    from linformer.linformer import LinformerSelfAttention

    width = heads * d
    module = LinformerSelfAttention(dim=width, seq_len=L, k=m, heads=heads)
    if pooled:
        segment = torch.arange(L) * m // L
        mean = torch.nn.functional.one_hot(segment, m).float()
        mean /= mean.sum(dim=0)
        module.proj_k.data, module.proj_v.data = mean, mean
    replace(
        module,
        to_q=Columns(0, width),
        to_k=Columns(1, width),
        to_v=Columns(2, width),
        to_out=lambda x: x,
    )
    return lambda q, k, v: heads_of(module(rows_of(q, k, v)), heads)


def peers_at(share, L, d, heads):
    """(name, causal, size, share of operations that is spent, function of q, k, v)"""
    exact = {True: 2 * d * L * (L + 1), False: 4 * d * L * L}
    rows = []
    for name, causal, flops, make in [
        ("Performer", True, performer_flops, lambda m: performer(L, d, heads, m, True)),
        ("Performer", False, performer_flops, lambda m: performer(L, d, heads, m, False)),
        ("Nystromformer", False, nystrom_flops, lambda m: nystrom(L, d, heads, m)),
        ("Linformer, random", False, linformer_flops, lambda m: linformer(L, d, heads, m, False)),
        ("Linformer, pooled", False, linformer_flops, lambda m: linformer(L, d, heads, m, True)),
    ]:
        size = largest(lambda m, flops=flops: flops(L, d, m), share * exact[causal], L)
        rows.append((name, causal, size, flops(L, d, size) / exact[causal], make(size)))
    return rows


def relative(a, b):
    return float((a - b).norm() / b.norm())


def after(out, w_o):
    """[1, H, L, d] -> [L, hidden], what the layer adds to the residual stream"""
    return out[0].transpose(0, 1).flatten(1) @ w_o.T


def measure_packages(layers, projections, shares, repeats):
    """Rows as drrl-bench peers writes them, two of SDPA (causal or not) among them."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    _, heads, L, d = layers[0][0].shape
    methods = [
        (
            "SDPA, here",
            causal,
            None,
            1.0,
            lambda q, k, v, causal=causal: sdpa(q, k, v, is_causal=causal),
        )
        for causal in (True, False)
    ]
    for share in shares:
        methods += peers_at(share, L, d, heads)
    exact = {
        causal: [sdpa(*layer, is_causal=causal) for layer in layers] for causal in (True, False)
    }
    times = [[] for _ in methods]
    errors = [None] * len(methods)
    layer_errors = [None] * len(methods)
    for turn in range(
        repeats + 1
    ):  # all in turn, so that a slow moment hits all; the first turn is a warm-up
        for i, (_, causal, _, _, run) in enumerate(methods):
            if turn and times[i] and times[i][0] > ONCE_MS:
                continue
            start = time.perf_counter()
            outputs = [run(*layer) for layer in layers]
            ms = 1e3 * (time.perf_counter() - start)
            if turn or ms > ONCE_MS:
                times[i].append(ms)
            if not turn:
                errors[i] = [relative(a, b) for a, b in zip(outputs, exact[causal])]
                layer_errors[i] = [
                    relative(after(a, w), after(b, w))
                    for a, b, w in zip(outputs, exact[causal], projections)
                ]
        print(f"packages: round {turn} of {repeats}", file=sys.stderr, flush=True)
    ms = [statistics.median(t) for t in times]
    reference = {True: ms[0], False: ms[1]}
    return [
        {
            "method": name,
            "causal": causal,
            "size": size,
            "flops_fraction": share,
            "error": statistics.mean(error),
            "worst_error": max(error),
            "layer_error": statistics.mean(after_error),
            "ms": t,
            "speedup": reference[causal] / t,
        }
        for (name, causal, size, share, _), error, after_error, t in zip(
            methods, errors, layer_errors, ms
        )
    ]


def load_layers(path):
    """[(q, k, v)] with keys and values copied for each query head, which is what the packages take;
    [W_O]."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    numbers = sorted({int(name.split(".")[1]) for name in tensors})
    layers = []
    for n in numbers:
        q, k, v = (tensors[f"layers.{n}.{x}"] for x in "qkv")
        copies = q.shape[1] // k.shape[1]
        layers.append((q, k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)))
    return layers, [tensors[f"layers.{n}.w_o"] for n in numbers]


def print_table(rows):
    table = [
        ["attention", "causal", "size", "FLOPs", "error", "worst layer", "after W_O", "ms", "speed"]
    ]
    for r in rows:
        table.append(
            [
                r["method"],
                "yes" if r["causal"] else "no",
                "-" if r["size"] is None else str(r["size"]),
                f"{r['flops_fraction']:.3f}",
                f"{r['error']:.2e}",
                f"{r['worst_error']:.2e}",
                f"{r['layer_error']:.2e}",
                f"{r['ms']:.1f}",
                f"{r['speedup']:.2f}",
            ]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--data", required=True, help="prefix of .bin and .idx")
    parser.add_argument(
        "--build",
        default=str(ROOT / "build" / os.environ.get("DRRL_PRESET", "cpu-release")),
        help="build folder",
    )
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--layers", default="all", help="all, or a comma list")
    parser.add_argument("--ranks", default="16,32", help="a comma list (default 16,32)")
    parser.add_argument("--repeats", type=int, default=5, help="at least 5 (default)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    try:
        install_packages()
        with tempfile.TemporaryDirectory(prefix="drrl-peers.") as work:
            command = [
                f"{options.build}/bin/drrl-bench",
                "peers",
                f"--model={options.model}",
                f"--data={options.data}",
                f"--seq_len={options.seq_len}",
                f"--layers={options.layers}",
                f"--ranks={options.ranks}",
                f"--repeats={options.repeats}",
                f"--threads={options.threads}",
                f"--json={work}/drrl.json",
                f"--dump={work}/inputs.safetensors",
            ]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            result = json.loads(Path(work, "drrl.json").read_text())
            import torch

            torch.set_num_threads(options.threads)
            torch.manual_seed(1)
            layers, projections = load_layers(f"{work}/inputs.safetensors")
        shares = [r["flops_fraction"] for r in result["results"] if r["method"] == "drrl"]
        with torch.no_grad():
            result["results"] += measure_packages(layers, projections, shares, options.repeats)
    except (
        subprocess.CalledProcessError,
        OSError,
        ImportError,
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:
        print(f"bench_peers: error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    result["packages"] = PACKAGES
    print(
        f"forward, {result['inputs']}, fp32, {options.threads} threads, median of {options.repeats}"
    )
    print(
        "error: ||O' - O||_F / ||O||_F against exact attention, causal or not as the method is, "
        "mean over the layers;"
    )
    print(
        "after W_O: the same of the layers' outputs; ms: of all layers; speed: against SDPA of the "
        "same mask"
    )
    print("and process; size: rank, features, landmarks or projected length")
    print_table(result["results"])
    if options.json:
        write_atomically(options.json, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
