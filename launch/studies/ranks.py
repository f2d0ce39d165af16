#!/usr/bin/env python3
"""Which ranks policies choose: by layer, KV group and tree level, and along the sequence.

    launch/studies/ranks.py --model DIR --data PREFIX --policy FILE [--seq_len 4096]
            [--budget 0.585] [--energy 0.99] --out DIR [--json FILE] [--log FILE]

`dp`, `gates` (dp with --gates), `energy` and, if the file holds a trained agent, `rl`. Every
decision goes to OUT/POLICY.jsonl (drrl-eval --decisions, launch/OPTIONS.md); --json holds their
means over sequences: ranks of scores and values for each layer, KV group and level, and for each
layer along the sequence, over the KV groups and the far pairs that a block of queries sees; with
gates also the share of entries that were exact. launch/studies/plots.py draws both. Exit status: 0
measured, 1 a run failed.
"""

import json
import pathlib

import numpy
import study


def summary(lines):
    """Means of a --decisions file: {"map": {kind: [layers, groups, levels]}, "along": {"begin",
    "end" of stretches of queries that see the same far pairs, kind: [layers, stretches]}}."""
    kinds = ["rank_qk", "rank_v"] + (["exact"] if any(line["exact"] for line in lines) else [])
    first, layers = lines[0], 1 + max(line["layer"] for line in lines)
    begin, rows, level = (numpy.array(first[key]) for key in ("query_begin", "query_rows", "level"))
    levels = 1 + level.max()
    edges = numpy.unique([*begin, *(begin + rows)])
    sees = numpy.array(
        [(begin <= at) & (at < begin + rows) for at in edges[:-1]], dtype=float
    )  # [stretches, pairs]
    result = {"map": {}, "along": {"begin": edges[:-1].tolist(), "end": edges[1:].tolist()}}
    for kind in kinds:
        exact = numpy.zeros(
            (len(first["rank_qk"]), len(level))
        )  # of "exact": a layer without gates makes none exact
        mean = numpy.array(
            [
                numpy.mean(
                    [
                        exact if line[kind] is None else line[kind]
                        for line in lines
                        if line["layer"] == layer
                    ],
                    axis=0,
                )
                for layer in range(layers)
            ]
        )  # [layers, groups, pairs]
        weight = numpy.array(
            [(level == i) * rows for i in range(levels)], dtype=float
        )  # a level's pairs by their queries
        result["map"][kind] = numpy.einsum(
            "lgp,np->lgn", mean, weight / weight.sum(axis=1, keepdims=True)
        ).tolist()
        result["along"][kind] = numpy.einsum(
            "lp,sp->ls", mean.mean(axis=1), sees / sees.sum(axis=1, keepdims=True)
        ).tolist()
    return result


def main():
    parser = study.arguments(__doc__)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--budget", type=float, default=0.585)
    parser.add_argument("--energy", type=float, default=0.99)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the decisions")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = study.Study(arguments)

    budget = ["--policy", arguments.policy, f"--rank_budget={arguments.budget}"]
    policies = {
        "dp": ["--rank_policy=dp", *budget],
        "energy": [
            "--rank_policy=energy",
            "--policy",
            arguments.policy,
            f"--energy={arguments.energy}",
        ],
    }
    if study.has_gates(arguments.policy):
        policies["gates"] = ["--rank_policy=dp", "--gates", *budget]
    if study.has_agent(arguments.policy):
        policies["rl"] = [*study.agent_flags(arguments.policy), *budget]
    if not all((arguments.out / f"{name}.jsonl").exists() for name in policies):
        runs.log.held.clear()
    decisions = {}
    for name, flags in policies.items():
        file = arguments.out / f"{name}.jsonl"
        row = runs.row(
            name,
            arguments.energy if name == "energy" else arguments.budget,
            arguments.seq_len,
            *flags,
            "--decisions",
            file,
        )
        if row:
            decisions[name] = summary([json.loads(line) for line in file.read_text().splitlines()])
    runs.save("ranks", decisions=decisions)


if __name__ == "__main__":
    main()
