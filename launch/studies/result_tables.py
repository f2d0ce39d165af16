#!/usr/bin/env python3
"""Writes the tables of configs/results/*.md that come from raw files beside them.

    launch/studies/result_tables.py            rewrites the tables
    launch/studies/result_tables.py --check    exit 1 if one is not what its raw files say

A page holds a table between the lines <!-- table: NAME --> and <!-- end of table -->.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "configs" / "results"
NAMES = {
    "fixed": "fixed rank {}",
    "energy": "adaptive SVD (`energy` {})",
    "rl": "DR-RL (`rl`), {}",
    "random": "`random`, {}",
    "greedy": "`greedy`, {}",
    "dp": "`dp`, {}",
    "gates": "`dp` with gates, {}",
}
GPU_RUNS = {
    "NVIDIA H100, 2026-11-27": "h100-2026-11-27",
    "NVIDIA H200, 2026-11-26": "h200-2026-11-26",
    "NVIDIA H200, 2026-11-27": "h200-2026-11-27",
}


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def percent(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:+.2f} % ({low:+.2f} .. {high:+.2f})"


def policies() -> str:
    """Every policy at every budget, at two lengths."""
    cells: dict[tuple[str, float], dict[int, list[str]]] = {}
    for seq_len in (2048, 8192):
        for row in read(f"cpu-2026-11-28/policies-{seq_len}.json")["rows"]:
            shown = (
                [percent(row["increase_percent"]), f"{row['operations']:.3f}"]
                if row["met"]
                else ["cannot be met", ""]
            )
            cells.setdefault((row["policy"], row["value"]), {})[seq_len] = shown
    rows = []
    for (policy, value), by_length in cells.items():
        if any(shown[1] for shown in by_length.values()):
            nothing = ["cannot be met", ""]
            rows.append(
                [
                    NAMES[policy].format(value),
                    *by_length.get(2048, nothing),
                    *by_length.get(8192, nothing),
                ]
            )
    return table(
        [
            "policy, budget",
            "L = 2048: perplexity (95 %)",
            "operations",
            "L = 8192: perplexity (95 %)",
            "operations",
        ],
        rows,
    )


def gpu_attention(head_dim: int, dtype: str) -> str:
    """Speed of attention, forward and backward, against PyTorch's SDPA, at ranks 32 and 64."""
    speeds: dict[int, dict[str, list[str]]] = {}
    for title, folder in GPU_RUNS.items():
        for row in read(f"{folder}/gpu-attention-{dtype}-d{head_dim}.json")["results"]:
            if row["rank_qk"] in (32, 64):
                speeds.setdefault(row["seq_len"], {}).setdefault(title, []).append(
                    f"{row['forward_backward_speedup']:.2f}x"
                )
    rows = [
        [str(seq_len), *(" / ".join(by_run.get(title, ["-"])) for title in GPU_RUNS)]
        for seq_len, by_run in sorted(speeds.items())
    ]
    return table(["L", *GPU_RUNS], rows)


TABLES = {
    "policies": policies,
    "gpu-bf16-d128": lambda: gpu_attention(128, "bf16"),
    "gpu-bf16-d64": lambda: gpu_attention(64, "bf16"),
    "gpu-fp32-d128": lambda: gpu_attention(128, "fp32"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    check = parser.parse_args().check
    seen, stale = set(), []
    for page in sorted(RESULTS.glob("*.md")):
        text = page.read_text()

        def written(found: re.Match[str]) -> str:
            seen.add(found[1])
            return f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}<!-- end of table -->"

        new = re.sub(
            r"<!-- table: ([\w-]+) -->\n.*?<!-- end of table -->", written, text, flags=re.DOTALL
        )
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new)
    missing = set(TABLES) - seen
    if missing:
        print(f"result_tables: error: no page has {', '.join(sorted(missing))}", file=sys.stderr)
    if check and stale:
        print(
            f"result_tables: error: {', '.join(stale)} is not what its raw files say: run "
            "launch/studies/result_tables.py",
            file=sys.stderr,
        )
    return 1 if missing or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
