"""What the studies of rank policies share: runs of drrl-eval on the same sequences, and statistics
of paired differences."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
from statistics import NormalDist

import numpy
import safetensors

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "prepare"))
from drrl_prepare.files import write_atomically  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / os.environ.get("DRRL_PRESET", "cpu-release")


class Refused(Exception):
    """The budget of a run cannot be met at its length; says what the least is that can."""


def run(command):
    """Standard error of a program that must succeed, else this one ends with its complaint."""
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    refusal = re.search(r"rank budget .* cannot be met .*", done.stderr)
    if refusal:
        raise Refused(refusal.group())
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")


def flagfile(folder, flags):
    """A flag of drrl's programs for these, which several runs share: in a file of `folder`, since
    what one of the runs has no use for is an error elsewhere."""
    file = pathlib.Path(folder) / "shared.flags"
    file.write_text("".join(f"{flag}\n" for flag in flags))
    return f"--flagfile={file}"


def evaluate(build, flags, shared=()):
    """The JSON of one drrl-eval run; `shared` as for flagfile. Errors: Refused."""
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "result.json"
        run([build / "bin/drrl-eval", flagfile(folder, shared), *flags, "--json", result])
        return json.loads(result.read_text())


def arguments(doc, max_tokens=32768):
    """The options that studies of perplexity share, as an ArgumentParser to add to."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument(
        "--data",
        required=True,
        help="prefix of .bin and .idx: text that neither calibration nor traces have seen",
    )
    parser.add_argument(
        "--policy",
        required=True,
        help="file of drrl-policy calibrate, and train if `rl` shall take part",
    )
    parser.add_argument("--max_tokens", type=int, default=max_tokens, help="of --data")
    parser.add_argument(
        "--flag",
        action="append",
        default=[],
        help="a further flag of drrl-eval at low rank, e.g. --flag=--near_block=128",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--build", type=pathlib.Path, default=BUILD)
    parser.add_argument(
        "--json", type=pathlib.Path, help="file for all figures; launch/studies/plots.py draws them"
    )
    log_argument(parser)
    return parser


def log_argument(parser):
    parser.add_argument(
        "--log",
        type=pathlib.Path,
        help="file that gets all that drrl-eval reports, a line as soon as a run ends; what it "
        "holds already of the same programs and --policy is not run again",
    )


def training_arguments(doc, seq_len):
    """The options that studies of training share, likewise."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--data", required=True, help="prefix of .bin and .idx, to train on")
    parser.add_argument("--valid_data", required=True, help="prefix of .bin and .idx, to judge by")
    parser.add_argument("--policy", required=True, help="file of drrl-policy calibrate")
    parser.add_argument("--seq_len", type=int, default=seq_len)
    parser.add_argument("--max_tokens", type=int, default=65536, help="of --valid_data")
    parser.add_argument(
        "--flag",
        action="append",
        default=[],
        help="a further flag of drrl-train and drrl-eval at low rank, e.g. --flag=--near_block=128",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--build", type=pathlib.Path, default=BUILD)
    parser.add_argument("--json", type=pathlib.Path)
    return parser


@contextlib.contextmanager
def kept_or_temporary(folder):
    """The folder, made if need be; None: one that is gone afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def save(arguments, **figures):
    """--json, if it is given: the options, then the figures."""
    if arguments.json:
        options = {name: str(value) for name, value in vars(arguments).items()}
        write_atomically(
            arguments.json, json.dumps({"options": options, **figures}, indent=1) + "\n"
        )


def evaluate_held_out(arguments, model, flags):
    """`evaluate` on --valid_data of training_arguments."""
    return evaluate(
        arguments.build,
        [
            "--model",
            model,
            "--data",
            arguments.valid_data,
            f"--seq_len={arguments.seq_len}",
            f"--max_tokens={arguments.max_tokens}",
            f"--threads={arguments.threads}",
            *flags,
        ],
    )


class Log:
    """What runs of drrl-eval told, a line of JSON each in the file `path`, as soon as it is known;
    None: kept in memory alone."""

    def __init__(self, path, build, policy):
        used = [
            build / "bin/drrl-eval",
            *sorted((build / "lib").glob("libdrrl*")),
            pathlib.Path(policy),
        ]
        self.path, self.held, self.lock = path, {}, threading.Lock()
        self.digest = hashlib.sha256(b"".join(file.read_bytes() for file in used)).hexdigest()[:16]
        if path and path.exists():
            text = path.read_text()
            whole = text[
                : text.rfind("\n") + 1
            ]  # a study that was killed may leave a piece of a line
            if whole != text:
                write_atomically(path, whole)
            self.held = {
                tuple(line["flags"]): line["result"]
                for line in map(json.loads, whole.splitlines())
                if line["digest"] == self.digest
            }

    def result(self, flags, run):
        """run(), or what the log holds of the same programs, policy file and flags, strings. May be
        called by several threads. Errors: Refused, now or then."""
        if flags not in self.held:
            try:
                result = run()
            except Refused as refused:
                result = {"refused": str(refused)}
            with self.lock:
                self.held[flags] = result
                if self.path:
                    with open(self.path, "a") as log:
                        log.write(
                            json.dumps({"flags": flags, "digest": self.digest, "result": result})
                            + "\n"
                        )
        if "refused" in self.held[flags]:
            raise Refused(self.held[flags]["refused"])
        return self.held[flags]


class Study:
    """Runs of drrl-eval as `arguments` (above) say, compared with exact attention on the same
    sequences."""

    def __init__(self, options):
        self.options, self.rows, self.exact_runs = options, [], {}
        self.log = Log(options.log, options.build, options.policy)

    def evaluate(self, seq_len, *flags, shared=()):
        """As evaluate() above, of sequences of this length."""
        o = self.options
        flags = tuple(
            str(flag)
            for flag in (
                "--model",
                o.model,
                "--data",
                o.data,
                f"--seq_len={seq_len}",
                f"--max_tokens={o.max_tokens}",
                f"--threads={o.threads}",
                *flags,
            )
        )
        return self.log.result(
            (*map(str, shared), *flags), lambda: evaluate(o.build, flags, shared)
        )

    def exact(self, seq_len):
        """Exact attention at this length; announces it the first time."""
        if seq_len not in self.exact_runs:
            self.exact_runs[seq_len] = result = self.evaluate(seq_len, "--attention=exact")
            print(
                f"exact attention: perplexity {result['perplexity']:.3f}, "
                f"{len(result['sequence_nll'])} sequences of {seq_len} tokens\n"
                f"{'policy':22} {'operations':>10} {'time':>6} {'perplexity':>11}  95 % interval",
                flush=True,
            )
        return self.exact_runs[seq_len]

    def row(self, name, value, seq_len, *flags, time=False):
        """The figures of low-rank attention under these flags, printed and added to `rows`. time:
        exact attention runs beside it, sequence by sequence, and the time of its attention is the
        unit. A budget that cannot be met makes a row of "met": False and "reason", and None is
        returned."""
        exact = numpy.array(self.exact(seq_len)["sequence_nll"])
        row = {"policy": name, "value": value, "seq_len": seq_len, "met": True}
        self.rows.append(row)
        label = f"{name} {'' if value is None else value}"
        try:
            result = self.evaluate(
                seq_len,
                "--attention=lowrank",
                *flags,
                *(["--compare_exact"] if time else []),
                shared=self.options.flag,
            )
        except Refused as refused:
            row.update(met=False, reason=str(refused))
            print(f"{label:22} {refused}", flush=True)
            return None
        percent = [
            100 * (numpy.exp(x) - 1) for x in interval(numpy.array(result["sequence_nll"]) - exact)
        ]
        row.update(
            operations=result["attention_flops_fraction"],
            time=result["attention_ms"] / result["exact_attention_ms"] if time else None,
            perplexity=result["perplexity"],
            increase_percent=percent,
            **{key: result[key] for key in KEPT},
        )
        shown = f"{row['time']:6.3f}" if time else ""
        print(
            f"{label:22} {row['operations']:10.4f} {shown:>6} {percent[0]:+10.2f} %  "
            f"{percent[1]:+.2f} .. {percent[2]:+.2f} %",
            flush=True,
        )
        return row

    def save(self, study, **more):
        """--json, as launch/studies/plots.py reads it."""
        if self.options.json:
            write_atomically(
                self.options.json,
                json.dumps(
                    {"study": study, "exact": self.exact_runs, "rows": self.rows, **more}, indent=1
                )
                + "\n",
            )


# Of drrl-eval's report, in a row.
KEPT = (
    "attention_ms",
    "basis_ms",
    "decompositions",
    "basis_updates",
    "guard_raises",
    "mean_rank_qk",
    "mean_rank_v",
    "tokens",
    "sequence_nll",
    "attention",
    "options",
)


def has_agent(policy):
    """Whether a policy file serves `rl`, too."""
    return b"agent.head" in pathlib.Path(policy).read_bytes()[: 1 << 20]


def agent_flags(policy):
    """Of drrl-eval, for `rl`: gates, if its agent has learned with them."""
    with safetensors.safe_open(policy, framework="numpy") as file:
        return [
            "--rank_policy=rl",
            *(["--gates"] if file.get_tensor("agent.with_gates")[0] else []),
        ]


def has_gates(policy):
    return b"gated_damage" in pathlib.Path(policy).read_bytes()[: 1 << 20]


def interval(difference, seed=1, draws=10000, level=0.95, groups=None):
    """Mean and bootstrap interval of paired differences. groups [n]: what each belongs to; groups
    are drawn whole, as what they hold may be alike."""
    sums, counts = difference, numpy.ones(len(difference))
    if groups is not None:
        members = numpy.unique(groups, return_inverse=True)[1]
        sums, counts = numpy.bincount(members, weights=difference), numpy.bincount(members)
    picks = numpy.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    low, high = numpy.percentile(
        sums[picks].sum(axis=1) / counts[picks].sum(axis=1), [50 * (1 - level), 50 * (1 + level)]
    )
    return float(difference.mean()), float(low), float(high)


def design_effect(difference, groups):
    """By how much the variance of the mean of `difference` [n] is larger than of n that have
    nothing to do with each other, where those of a group [n] may be alike; 1 at least, n for a
    single group (Rao and Scott, Biometrics 48, 1992)."""
    members = numpy.unique(groups, return_inverse=True)[1]
    away = difference - difference.mean()
    k, n, alone = int(members.max()) + 1, len(difference), (away**2).sum()
    if k < 2 or alone == 0:
        return 1.0 if k > 1 else float(n)
    together = (numpy.bincount(members, weights=away) ** 2).sum()
    return max(1.0, k / (k - 1) * together / (n / (n - 1) * alone))


def score_statistic(better, worse, n, delta):
    """Tango's score statistic (Statistics in Medicine 17, 1998) of n pairs, for a difference
    `delta` of their two rates. It falls as delta grows.

    better, worse: pairs of which only the first, only the second counts. The variance is that under
    delta, so that pairs that all agree still leave doubt: without any difference, 268 pairs are
    needed to exclude one of 0.01 at level 0.05.
    """
    a, b, c = (
        2 * n,
        -better - worse + (2 * n - better + worse) * delta,
        -worse * delta * (1 - delta),
    )
    worse_rate = (math.sqrt(max(0, b * b - 4 * a * c)) - b) / (2 * a)
    distance = better - worse - n * delta
    return distance and distance / math.sqrt(n * max(1e-300, 2 * worse_rate + delta * (1 - delta)))


def tost(difference, margin, alpha=0.05, groups=None):
    """Two one-sided tests of equivalence: is the mean of paired differences of right (1) and wrong
    (0) answers within +- margin?

    difference [n] of -1, 0 and 1. Returns {"p": the larger of the two p values, "interval":
    Tango's, of level 1 - 2 alpha, "equivalent": p < alpha, which is the same as the interval within
    the margin (Nam, Biometrics 53, 1997), "design_effect": of groups [n], what each belongs to, by
    which the counts are divided; 1 without}.
    """
    if not numpy.isin(difference, (-1, 0, 1)).all():
        raise ValueError("differences of right and wrong answers are -1, 0 or 1")
    effect = 1.0 if groups is None else design_effect(difference, groups)
    pairs = (
        (difference > 0).sum() / effect,
        (difference < 0).sum() / effect,
        len(difference) / effect,
    )

    def crossing(z):
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score_statistic(*pairs, middle) > z else (low, middle)
        return (low + high) / 2

    p = max(
        NormalDist().cdf(-score_statistic(*pairs, -margin)),
        NormalDist().cdf(score_statistic(*pairs, margin)),
    )
    z = NormalDist().inv_cdf(1 - alpha)
    return {
        "p": p,
        "interval": [crossing(z), crossing(-z)],
        "equivalent": p < alpha,
        "design_effect": effect,
    }
