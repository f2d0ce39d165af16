#!/usr/bin/env python3
"""The closing table of quickstart.sh from the files under its output folder; exit 1 if training did not help."""

import json
import statistics
import sys
from pathlib import Path

KINDS = {"full": "full rank", "lowrank": "low rank"}


def main():
    out = Path(sys.argv[1])
    results = {when: {kind: json.loads((out / f"{when}-{kind}.json").read_text()) for kind in KINDS} for when in ("before", "after")}
    steps = {kind: [json.loads(line) for line in (out / kind / "metrics/metrics.jsonl").read_text().splitlines()] for kind in KINDS}

    after = results["after"]["lowrank"]
    exact_ms = {"full": after["full_attention_ms"], "lowrank": after["attention_ms"]}
    print(f"held-out text: {after['tokens']:,} tokens in sequences of {after['seq_len']:,}; attention time measured on the same tokens in one run")
    print()
    print(f"{'':10} {'held-out perplexity':>21} {'attention FLOPs':>16} {'attention':>13} {'training':>14} {'training loss':>16}")
    print(f"{'':10} {'before':>10} {'after':>10} {'of exact':>16} {'ms':>13} {'tokens/s':>14} {'first -> last':>16}")
    problems = []
    for kind, title in KINDS.items():
        before, later = (results[when][kind]["perplexity"] for when in ("before", "after"))
        fraction = 1.0 if kind == "full" else after["attention_flops_fraction"]
        losses = [s["loss"] for s in steps[kind]]
        few = max(1, len(losses) // 4)  # single batches are noisy
        first, last = statistics.mean(losses[:few]), statistics.mean(losses[-few:])
        speed = statistics.median(s["tokens_per_second"] for s in steps[kind][1:] or steps[kind])
        print(f"{title:10} {before:>10.3f} {later:>10.3f} {fraction:>16.3f} {exact_ms[kind]:>13.0f} {speed:>14.0f} {f'{first:.3f} -> {last:.3f}':>16}")
        if not last < first:
            problems.append(f"{title}: the training loss did not fall ({first:.4f} -> {last:.4f}, means over {few} steps)")
        if not later < before:
            problems.append(f"{title}: the held-out perplexity did not fall ({before:.4f} -> {later:.4f})")
    full, low = (results["after"][kind]["perplexity"] for kind in KINDS)
    print()
    print(f"low rank against full rank: perplexity {100 * (low / full - 1):+.2f} %, attention FLOPs {100 * (after['attention_flops_fraction'] - 1):+.1f} %, "
          f"attention time {100 * (exact_ms['lowrank'] / exact_ms['full'] - 1):+.1f} %")
    print(f"fine-tuned models: {out}/full/hf, {out}/lowrank/hf (Hugging Face directories); curves for TensorBoard: {out}/*/metrics")
    for problem in problems:
        print(f"quickstart: error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
