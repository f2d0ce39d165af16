#!/usr/bin/env python3
"""What an agent that looks at the text can gain over `dp`, what it does gain, and how sure that is:
agents of several seeds, trained on the same traces.

    launch/studies/agent.py --policy FILE --traces FILE... --model DIR [--seeds 5] [--held_out 4]
                          [--validation 4] [--out DIR] [--json FILE] [-- --gates --latency=FILE ...]

FILE is of drrl-policy calibrate, traces are of drrl-policy record with it; what follows -- goes to
drrl-policy train. For each length and budget, on the sequences held out, at equal cost: the damage
of `dp` [1e-3 nats per token], and what share of it is saved by
  refitted   dp with the damages of the training sequences, pair by pair: nothing looks at the text,
  agent      mean of the seeds, with the 95 % bootstrap interval over the sequences held out, of
             their means,
  oracle     choices by one measurement of the very sequence, judged by another one: noise misleads
             them,
  bound      choices by all measurements, judged by the same: noise included, no policy can save
             more,
  worth      by how much larger a budget would bring `dp` where the oracle is, its damage
             interpolated between budgets.
Then what can be foretold at all: by how much a pair's damage at the smallest rank, with the middle
gate and without one, and the entries which that gate makes exact, differ from their mean over
texts; share of the variance of the logarithm that linear regressions explain on sequences that they
have not seen, each left out in turn (R^2; 0 or less: nothing),
  by states  of the pair, what an agent sees,
  by past    what was really done to all earlier pairs of the same text, layer and KV group, and of
             the same text: more than any policy can know.
--out keeps the policy files, agent-SEED.safetensors. Exit status: 0 measured, 1 a run failed.
"""

import argparse
import json
import pathlib
import shutil
import sys

import numpy
import safetensors.numpy
import study


def train(arguments, seed, folder):
    """The report of one agent."""
    policy, report = folder / f"agent-{seed}.safetensors", folder / f"agent-{seed}.json"
    shutil.copyfile(arguments.policy, policy)
    study.run(
        [
            arguments.build / "bin/drrl-policy",
            "train",
            "--policy",
            policy,
            "--traces",
            ",".join(map(str, arguments.traces)),
            f"--seed={seed}",
            f"--held_out={arguments.held_out}",
            f"--validation={arguments.validation}",
            "--json",
            report,
            *arguments.flags,
        ]
    )
    return json.loads(report.read_text())


def saved(dp, agent, seed=1, draws=10000):
    """1 - agent / dp of sums over sequences, with its 95 % bootstrap interval; of each sequence."""
    picks = numpy.random.default_rng(seed).integers(0, len(dp), (draws, len(dp)))
    low, high = numpy.percentile(1 - agent[picks].sum(axis=1) / dp[picks].sum(axis=1), [2.5, 97.5])
    return [float(1 - agent.sum() / dp.sum()), float(low), float(high)]


PENALTIES = (10, 100, 1000)  # of squared weights, beside squares summed over sequences and pairs


def add_worth(rows):
    """ "worth" of each row: what more of the budget saves `dp` as much as the oracle saves; None
    where no larger budget was measured or none spoils less."""
    for row in rows:
        larger = [
            other
            for other in rows
            if other["seq_len"] == row["seq_len"] and other["budget"] > row["budget"]
        ]
        above = min(larger, key=lambda other: other["budget"], default=None)
        row["worth"] = None
        if above and above["dp"] < row["dp"]:
            row["worth"] = float(
                numpy.log(1 - row["oracle"])
                / numpy.log(above["dp"] / row["dp"])
                * (above["budget"] - row["budget"])
            )


def explained(features, target, out):
    """Squares that ridge regressions on the other sequences leave on sequence `out`, one for each
    penalty, and all of them; features [sequences, .., n], target [sequences, ..]."""
    columns, others = features.shape[-1], numpy.arange(len(target)) != out
    x, y = features[others].reshape(-1, columns), target[others].ravel()
    scale = x.std(axis=0) + 1e-3
    x, seen, left = x / scale, features[out].reshape(-1, columns) / scale, []
    for penalty in PENALTIES:
        weights = numpy.linalg.solve(x.T @ x + penalty * numpy.eye(columns), x.T @ y)
        left.append(((target[out].ravel() - seen @ weights) ** 2).sum())
    return numpy.array([*left, (target[out] ** 2).sum()])


def beyond_mean(values, out):
    """What each sequence has beyond the mean of the others, `out` not among them."""
    total, count = values.sum(axis=0) - values[out], len(values) - 1
    result = values - (total - values) / (count - 1)
    result[out] = values[out] - total / count
    return result


def text_features(file, traces, embeddings, first, begin, directions=8):
    """[sequences, pairs, 3 directions]: mean input embeddings of the pair's key blocks [first,
    begin), of the last of them, and of all blocks before `begin`."""
    with safetensors.safe_open(file, framework="numpy") as opened:
        block, sinks = (int(opened.metadata()[name]) for name in ("near_block", "sink_tokens"))
    tokens = traces["tokens"][:, sinks:]
    tokens = tokens[:, : tokens.shape[1] // block * block].reshape(len(tokens), -1, block)
    blocks = numpy.stack([embeddings[sequence].mean(axis=1) for sequence in tokens]).astype(
        numpy.float64
    )  # [sequences, blocks, hidden]
    blocks -= blocks.mean(axis=(0, 1))
    blocks = (
        blocks
        @ numpy.linalg.svd(blocks.reshape(-1, blocks.shape[-1]), full_matrices=False)[2][
            :directions
        ].T
    )
    return numpy.stack(
        [
            numpy.concatenate(
                [blocks[:, a:b].mean(axis=1), blocks[:, b - 1], blocks[:, :b].mean(axis=1)], axis=-1
            )
            for a, b in zip(first, begin)
        ],
        axis=1,
    )


def foretold(file, embeddings):
    """{what: {by what: R^2}} of a trace file of three sequences or more; embeddings [vocabulary,
    hidden]."""
    traces = safetensors.numpy.load_file(file)
    # [sequences, layers, groups, pairs, features]; the last two: level / 8,
    # log2(1 + first block) / 8
    state = traces["state"].astype(numpy.float64)
    level, begin = state[0, 0, 0, :, -2] * 8, 2 ** (state[0, 0, 0, :, -1] * 8) - 1
    level, begin = level.round().astype(int), begin.round().astype(int)
    end = begin + 2**level
    earlier = [numpy.flatnonzero(end <= first) for first in begin]  # in whole blocks
    text = text_features(file, traces, embeddings, begin - 2**level, begin)
    damage, gated = (
        traces[name].mean(axis=1) for name in ("damage", "gated_damage")
    )  # of all draws
    gate = gated.shape[-1] // 2
    targets = {"entries": traces["exact_entries"][..., 0, gate]}
    for kind, name in enumerate(("scores", "values")):
        targets[name] = damage[:, :, :, kind, :, 0]
        targets[f"{name}, gate"] = gated[:, :, :, kind, :, 0, gate]
    features = {
        "states": lambda layer, group: state[:, layer, group],
        "text": lambda layer, group: text,
        "both": lambda layer, group: numpy.concatenate([state[:, layer, group], text], axis=-1),
    }

    def by_features(of, beyond, out):
        return sum(
            explained(beyond_mean(of(layer, group), out), beyond[:, layer, group], out)
            for layer in range(state.shape[1])
            for group in range(state.shape[2])
        )

    def by_past(beyond, out):
        features, later = [], []
        for pair, past in enumerate(earlier):
            if len(past):
                own, last = (
                    beyond[..., past].mean(axis=-1),
                    beyond[..., past[numpy.argmax(end[past])]],
                )
                features.append(
                    numpy.stack(
                        [
                            own,
                            last,
                            numpy.broadcast_to(own.mean(axis=(1, 2), keepdims=True), own.shape),
                        ],
                        axis=-1,
                    )
                )
                later.append(beyond[..., pair])
        return explained(numpy.stack(features, axis=1), numpy.stack(later, axis=1), out)

    result = {}
    for what, target in targets.items():
        logarithm, squares = numpy.log(target.astype(numpy.float64) + 1e-12), []
        for out in range(len(target)):
            beyond = beyond_mean(logarithm, out)
            squares.append(
                {
                    **{name: by_features(of, beyond, out) for name, of in features.items()},
                    "past": by_past(beyond, out),
                }
            )
        result[what] = {}
        for name in squares[0]:
            *left, total = sum(of[name] for of in squares)
            result[what][name] = float(1 - min(left) / total)
    return result


def input_embeddings(model):
    """[vocabulary, hidden] float32."""
    for file in sorted(pathlib.Path(model).glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in ("model.embed_tokens.weight", "transformer.wte.weight", "wte.weight"):
                if name in opened.keys():
                    return opened.get_tensor(name).float().numpy()
    sys.exit(
        f"agent.py: error: no input embeddings in {model}/*.safetensors; expected "
        "model.embed_tokens.weight or wte.weight"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", required=True, help="file of drrl-policy calibrate")
    parser.add_argument(
        "--traces", required=True, nargs="+", type=pathlib.Path, help="files of drrl-policy record"
    )
    parser.add_argument(
        "--model",
        required=True,
        help="Hugging Face directory that the traces were recorded with, for its input embeddings",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--held_out", type=int, default=4, help="sequences of each trace file to judge by"
    )
    parser.add_argument(
        "--validation",
        type=int,
        default=4,
        help="sequences of each trace file that decide how far an agent is trusted",
    )
    parser.add_argument("--build", type=pathlib.Path, default=study.BUILD)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the policy files")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("flags", nargs="*", help="after --: more flags of drrl-policy train")
    arguments = parser.parse_args()

    with study.kept_or_temporary(arguments.out) as folder:
        runs = [train(arguments, seed, folder) for seed in range(1, arguments.seeds + 1)]
    rows = []
    print(
        "trusted by",
        ", ".join(f"{run['agent_strength']:g}" for run in runs),
        f"(seeds 1 to {arguments.seeds})",
    )
    print(
        f"{'L':>6} {'budget':>7} {'dp':>8} {'refitted':>9} {'agent':>8}  95 % interval     "
        f"{'oracle':>8} {'bound':>8} {'worth':>8}"
    )
    for reports in zip(*(run["held_out"] for run in runs)):
        first = reports[0]
        dp, agent = (
            numpy.array(first["dp"]),
            numpy.mean([report["agent"] for report in reports], axis=0),
        )
        row = {
            "seq_len": first["seq_len"],
            "budget": first["budget"],
            "dp": float(dp.mean()),
            "agent": saved(dp, agent),
            "agents": [float(1 - sum(report["agent"]) / dp.sum()) for report in reports],
            **{
                name: 1 - first[name] / float(dp.mean()) for name in ("refitted", "oracle", "bound")
            },
        }
        rows.append(row)
    add_worth(rows)
    for row in rows:
        share, low, high = (100 * x for x in row["agent"])
        worth = "" if row["worth"] is None else f"{row['worth']:+8.3f}"
        print(
            f"{row['seq_len']:6} {row['budget']:7} {1e3 * row['dp']:8.3f} "
            f"{100 * row['refitted']:+7.1f} % {share:+6.1f} %  {low:+6.1f} .. {high:+5.1f} % "
            f"{100 * row['oracle']:+6.1f} % {100 * row['bound']:+6.1f} % {worth}"
        )
    embeddings = input_embeddings(arguments.model)
    told = {str(file): foretold(file, embeddings) for file in arguments.traces}
    for file, what in told.items():
        print(f"{file}: R^2 {'by ' + ', by '.join(what['entries']):>40}")
        for name, of in what.items():
            print(f"  {name:14}", "  ".join(f"{r2:+.3f}" for r2 in of.values()))
    study.save(arguments, runs=runs, rows=rows, foretold=told)


if __name__ == "__main__":
    sys.exit(main())
