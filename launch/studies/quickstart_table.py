#!/usr/bin/env python3
"""The closing table of quickstart.sh from the files under its output folder; exit 1 if training did
not help."""

import json
import statistics
import sys
from pathlib import Path

KINDS = {"exact": "exact", "lowrank": "low rank"}


def main():
    out = Path(sys.argv[1])
    before, after = (
        json.loads((out / "before.json").read_text()),
        {k: json.loads((out / f"after-{k}.json").read_text()) for k in KINDS},
    )
    perplexity = {
        "exact": (before["exact_perplexity"], after["exact"]["perplexity"]),
        "lowrank": (before["perplexity"], after["lowrank"]["perplexity"]),
    }
    steps = {
        kind: [
            json.loads(line)
            for line in (out / kind / "metrics/metrics.jsonl").read_text().splitlines()
        ]
        for kind in KINDS
    }

    measured = after["lowrank"]  # both kinds of attention, sequence by sequence
    attention_ms = {"exact": measured["exact_attention_ms"], "lowrank": measured["attention_ms"]}
    fraction = {"exact": 1.0, "lowrank": measured["attention_flops_fraction"]}
    print(
        f"held-out text: {measured['tokens']:,} tokens in sequences of {measured['seq_len']:,}; "
        f"attention measured in one run on the same tokens, forward only, bases and ranks included"
    )
    print()
    print(
        f"{'':10} {'held-out perplexity':>21} {'attention FLOPs':>16} {'attention':>13} "
        f"{'training':>14} {'training loss':>16}"
    )
    print(
        f"{'':10} {'before':>10} {'after':>10} {'of exact':>16} {'ms':>13} {'tokens/s':>14} "
        f"{'first -> last':>16}"
    )
    problems = []
    for kind, title in KINDS.items():
        earlier, later = perplexity[kind]
        losses = [s["loss"] for s in steps[kind]]
        few = max(1, len(losses) // 4)  # single batches are noisy
        first, last = statistics.mean(losses[:few]), statistics.mean(losses[-few:])
        speed = statistics.median(s["tokens_per_second"] for s in steps[kind][1:] or steps[kind])
        print(
            f"{title:10} {earlier:>10.3f} {later:>10.3f} {fraction[kind]:>16.3f} "
            f"{attention_ms[kind]:>13.0f} {speed:>14.0f} {f'{first:.3f} -> {last:.3f}':>16}"
        )
        if not last < first:
            problems.append(
                f"{title}: the training loss did not fall ({first:.4f} -> {last:.4f}, means over "
                f"{few} steps)"
            )
        if not later < earlier:
            problems.append(
                f"{title}: the held-out perplexity did not fall ({earlier:.4f} -> {later:.4f})"
            )
    exact, low = (perplexity[kind][1] for kind in KINDS)
    print()
    print(
        f"low rank against exact attention: perplexity {100 * (low / exact - 1):+.2f} %, "
        f"attention FLOPs "
        f"{100 * (fraction['lowrank'] - 1):+.1f} %, attention time "
        f"{100 * (attention_ms['lowrank'] / attention_ms['exact'] - 1):+.1f} %"
    )
    print(
        f"fine-tuned models: {out}/exact/hf, {out}/lowrank/hf (Hugging Face directories); curves "
        f"for TensorBoard: {out}/*/metrics"
    )
    for problem in problems:
        print(f"quickstart: error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
