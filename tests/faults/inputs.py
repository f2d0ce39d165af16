#!/usr/bin/env python3
"""Damages the files that drrl's programs read, one place at a time, and checks that each is refused
by name or read as what it is.

    DRRL_BIN=build/cpu-release/bin tests/faults/inputs.py [--trials 100] [--only REGEX] [--seed 1]
            [--json inputs.json]

A tiny model of random weights, its text, questions, calibrated ranks with an agent, traces, a
latency table and a checkpoint are made first. Each trial damages one of these files (a value of its
JSON or header replaced or left out, all numbers of a tensor replaced, a bit flipped, bytes cut or
added, the file empty, gone or a folder) and runs the program that reads it. It must end within a
minute and in 8 GiB of address space, and then either by exit code 0, with only finite numbers in
what it writes, or by the code documented for such a file with the file's name in the message, or by
8 where tensors are read that are not finite. A model, tokenizer or latency table that is sound but
of another case than text and options may be refused as these are, by 2 or 4. Exit status: 0 when
all trials did.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from study import write_model, write_tokens

USAGE, MODEL, DATA, CHECKPOINT, NUMERICS = 2, 3, 4, 5, 8  # launch/runtime/exit_codes.h
SECONDS, BYTES = 60, 8 << 30
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    3,
    0.5,
    1e30,
    2**31,
    2**63,
    2**64,
    float("nan"),
    "",
    "drrl",
    "F64",
    [],
    [1],
    [0, 1],
    {},
    {"a": 1},
]


def places(value, path=()):
    """Paths to all members of a JSON value."""
    members = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, member in members:
        yield (*path, key)
        yield from places(member, (*path, key))


def damage_json(text, rng):
    """(other text, what was done)"""
    value = json.loads(text)
    path = rng.choice(list(places(value)))
    at = value
    for key in path[:-1]:
        at = at[key]
    if rng.random() < 0.25:
        del at[path[-1]]
        return json.dumps(value), f"without {path}"
    old, at[path[-1]] = at[path[-1]], rng.choice(VALUES)
    if isinstance(old, str) and rng.random() < 0.5:  # metadata are numbers as text
        at[path[-1]] = str(at[path[-1]])
    return json.dumps(value), f"{path} = {json.dumps(at[path[-1]])}, was {json.dumps(old)[:60]}"


def damage_bytes(data, rng):
    kind = rng.randrange(4)
    if kind == 0:
        size = rng.randrange(len(data))
        return data[:size], f"cut to {size} of {len(data)} bytes"
    if kind == 1:
        return data + bytes(rng.randrange(1, 100)), "zeros added"
    at = rng.randrange(min(len(data), 4000) if kind == 2 else len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[
        at + 1 :
    ], f"a bit of byte {at} flipped"


def damage_safetensors(data, rng):
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.6:
        text, what = damage_json(header.decode(), rng)
        return len(text.encode()).to_bytes(8, "little") + text.encode() + body, what
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    name = rng.choice(sorted(entries))
    begin, end = entries[name]["data_offsets"]
    if begin == end:
        return damage_bytes(data, rng)
    fill = rng.choice([b"\x00", b"\xff", b"\x7f", b"\x80", b"\x3f"])
    return data[: 8 + size] + body[:begin] + fill * (end - begin) + body[
        end:
    ], f"all bytes of {name} are {fill.hex()}"


def damage(file, rng):
    """Damages it where it stands; what was done."""
    if rng.random() < 0.06:
        file.unlink()
        if rng.random() < 0.5:
            file.mkdir()
            return "a folder"
        return "gone"
    data = file.read_bytes()
    if rng.random() < 0.03:
        file.write_bytes(b"")
        return "empty"
    if rng.random() < 0.25 or file.suffix not in (".json", ".jsonl", ".safetensors"):
        data, what = damage_bytes(data, rng)
    elif file.suffix == ".safetensors":
        data, what = damage_safetensors(data, rng)
    else:
        text, what = damage_json(data.decode(), rng)
        data = text.encode()
    file.write_bytes(data)
    return what


def write_shards(model, folder):
    """The same model with an index, of one shard."""
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    shard, data = "model-00001-of-00001.safetensors", (model / "model.safetensors").read_bytes()
    (folder / shard).write_bytes(data)
    names = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)})
    )


def change_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def limit():
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(binaries, command, folder):
    """(exit code or None, messages)"""
    environment = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    program, *flags = command
    try:
        ended = subprocess.run(
            [binaries / program, *(flag.format(folder=folder) for flag in flags)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
            preexec_fn=limit,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return ended.returncode, ended.stderr


SHAPE = ["--near_block=8", "--seq_len=512", "--basis_updates=1", "--sink_tokens=4", "--threads=1"]
INPUT = ["--model={folder}/model", "--data={folder}/text"]
POLICY, TRACES = "--policy={folder}/policy.safetensors", "--traces={folder}/traces.safetensors"
EVAL = [
    "drrl-eval",
    *INPUT,
    "--seq_len=64",
    "--max_tokens=64",
    "--threads=1",
    "--json={folder}/result.json",
]
ANSWER = [
    "drrl-eval",
    INPUT[0],
    "--examples={folder}/questions.jsonl",
    "--threads=1",
    "--json={folder}/result.json",
]
LOW_RANK = [
    "drrl-eval",
    *INPUT,
    *SHAPE,
    POLICY,
    "--attention=lowrank",
    "--rank_budget=0.95",
    "--max_tokens=512",
    "--json={folder}/result.json",
]
TRAIN = [
    "drrl-train",
    *INPUT,
    "--seq_len=24",
    "--micro_batch=1",
    "--global_batch=2",
    "--save_every=2",
    "--threads=1",
    "--valid_fraction=0",
    "--output={folder}/run",
]
AGENT = [
    "drrl-policy",
    "train",
    "--basis_updates=1",
    POLICY,
    TRACES,
    "--fit_steps=2",
    "--reward_steps=2",
]

QUESTION = {
    "id": "one",
    "context": list(range(40)),
    "questions": [
        {"at": 20, "targets": [[3], [4, 5]], "answer": 1},
        {"at": 40, "targets": [[7]], "answer": 0},
    ],
}

SETUP = [
    ["drrl-policy", "calibrate", *INPUT, *SHAPE, POLICY, "--calibration_tokens=1024"],
    [
        "drrl-policy",
        "record",
        *INPUT,
        *(flag for flag in SHAPE if flag != "--basis_updates=1"),
        POLICY,
        "--calibration_tokens=2048",
        TRACES,
    ],
    [
        "drrl-bench",
        "latency",
        "--gates",
        "--model={folder}/model",
        *SHAPE,
        "--latency={folder}/latency.json",
    ],
    [*AGENT, "--gates"],
    [*TRAIN, "--steps=2"],
]
RESUME = [*TRAIN, "--steps=2", "--resume"]
CHECKPOINTS = "run/checkpoints/"
STEP = CHECKPOINTS + "step-00000002/"

# file -> (program that reads it, its exit code for a damaged one)
FILES = {
    "model/config.json": (EVAL, MODEL),
    "model/model.safetensors": (EVAL, MODEL),
    "sharded/model.safetensors.index.json": ([*EVAL, "--model={folder}/sharded"], MODEL),
    "model/tokenizer.json": (EVAL, MODEL),
    "text.bin": (EVAL, DATA),
    "text.json": (EVAL, DATA),
    "text.idx": (EVAL, DATA),
    "questions.jsonl": (ANSWER, DATA),
    "policy.safetensors": ([*LOW_RANK, "--rank_policy=rl", "--gates"], MODEL),
    "latency.json": (
        [*LOW_RANK, "--rank_policy=dp", "--gates", "--latency={folder}/latency.json"],
        MODEL,
    ),
    "traces.safetensors": (AGENT, MODEL),
    CHECKPOINTS + "latest": (RESUME, CHECKPOINT),
    **{
        STEP + name: (RESUME, CHECKPOINT)
        for name in (
            "manifest.json",
            "run.json",
            "shard-tp0.safetensors",
            "rank-tp0-dp0.safetensors",
            "rank-tp0-dp0.rank-policy",
        )
    },
}
# exit codes for files that are sound, but of another case than the text and the options
OTHER = {"config.json": (USAGE, DATA), "latency.json": (USAGE,), "tokenizer.json": (DATA,)}


def prepare(binaries, whole, rng):
    """All files, undamaged."""
    whole.mkdir()
    write_model(whole / "model", rng)
    change_json(whole / "model/config.json", max_position_embeddings=512)
    write_shards(whole / "model", whole / "sharded")
    write_tokens(whole / "text", rng)
    (whole / "questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (whole / "model/tokenizer.json").write_text(
        json.dumps({"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}})
    )
    (whole / "text.json").write_text(
        json.dumps(
            {
                "vocabulary": {
                    "tokenizer": "tokenizer.json",
                    "size": 2,
                    "sha1": hashlib.sha1(b"0\ta\n1\tb\n").hexdigest(),
                }
            }
        )
    )
    for command in SETUP:
        code, messages = run(binaries, command, whole)
        if code != 0:
            sys.exit(f"inputs.py: error: {command[0]} {command[1]} ended by {code}:\n{messages}")
    change_json(
        whole / "latency.json", exact={"setup": 0, "pair": 0, "row": 1, "area": 1}
    )  # so slow that low rank meets any budget


def broken_promise(name, documented, code, messages, result):
    """None, or what is wrong with how a program ended."""
    if code == 0:
        finite = not result.exists() or isinstance(json.loads(result.read_text())["nll"], float)
        return None if finite else "success with a loss that is not finite"
    if code == NUMERICS and name.endswith(".safetensors"):
        return None
    file = Path(name).name
    if code not in (documented, *OTHER.get(file, ())):
        return f"exit code {code}, expected {documented}"
    another = file == "config.json" and code != documented  # the text or an option is named instead
    return None if another or file in messages else "the message does not name the file"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100, help="of each file")
    parser.add_argument(
        "--only", default="", help="files whose name has a match of this expression"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    binaries = Path(os.environ["DRRL_BIN"]).resolve()

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        whole, tried = Path(temporary) / "whole", Path(temporary) / "tried"
        prepare(binaries, whole, random.Random(arguments.seed))
        for name, (command, documented) in FILES.items():
            if not re.search(arguments.only, name):
                continue
            codes = collections.Counter()
            for trial in range(arguments.trials + 1):
                shutil.rmtree(tried, ignore_errors=True)
                shutil.copytree(whole, tried)
                what = (
                    damage(tried / name, random.Random(f"{arguments.seed} {name} {trial}"))
                    if trial
                    else "none"
                )
                code, messages = run(binaries, command, tried)
                codes[str(code)] += 1
                broken = broken_promise(
                    name, documented if trial else 0, code, messages, tried / "result.json"
                )
                rows.append(
                    {
                        "file": name,
                        "trial": trial,
                        "damage": what,
                        "exit_code": code,
                        "broken": broken,
                        "messages": messages.strip()[-1000:],
                    }
                )
                if broken:
                    print(
                        f"BROKEN {name}, trial {trial}: {what}: {broken}\n    "
                        + messages.strip()[-600:].replace("\n", "\n    ")
                    )
            print(
                f"{name}: "
                + ", ".join(f"{count} ended by {code}" for code, count in sorted(codes.items())),
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    broken = sum(row["broken"] is not None for row in rows)
    print(f"{len(rows)} trials, {broken} broken promises")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
