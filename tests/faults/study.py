#!/usr/bin/env python3
"""Breaks training runs in many ways at random moments, and checks what drrl promises about it.

    DRRL_BIN=build/cpu-release/bin tests/faults/study.py --repeats 20 --json faults.json

Each trial trains a tiny random model with drrl-train under mpirun, injects one fault, and then
asks:
  ended     the job ended by itself, within the timeout and some seconds, with a documented exit
            code
  clean     no process of it is left
  sound     a restart with --resume finds a checkpoint that nothing is wrong with (or none, when
            none was due), at most --save_every steps back
  equal     the restarted run logs, step by step, bit for bit the losses of a run that nothing
            happened to
A fault that a run must survive (a slow or lossy link, a short outage, a wall clock that jumps) is
checked for that instead. Faults that this machine cannot make (no root, no network namespaces) are
reported as skipped, with the reason. Exit status: 0 when every promise was kept.
"""

import argparse
import array
import contextlib
import itertools
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

RESTARTS = Path(__file__).resolve().parents[2] / "launch" / "run_with_restarts.sh"
COMMUNICATION, NUMERICS, STORAGE, HUNG, KILLED = (
    7,
    8,
    6,
    11,
    137,
)  # launch/runtime/exit_codes.h; mpirun's for a process that SIGKILL ended
TIMEOUT, WATCHDOG, PATIENCE = (
    2,
    5,
    15,
)  # --timeout_s, --watchdog_timeout_s, and what a job may take beyond them to end, in seconds
HANG = 4  # --hang_s of run_with_restarts.sh
STEPS, SAVE_EVERY = 300, 20
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def send(pid, number):
    """False: there is no such process any more."""
    try:
        os.kill(pid, number)
        return True
    except ProcessLookupError:
        return False


class Skip(Exception):
    """This machine cannot make this fault."""


class Broken(Exception):
    """A promise was not kept."""


def expect(condition, text):
    if not condition:
        raise Broken(text)


# --------------------------------------------------------------------------------------------------
# what is trained


def write_model(folder, rng):
    """A Hugging Face directory of random weights."""
    hidden, inner, vocabulary, groups = (
        CONFIG[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_key_value_heads")
    )
    head = hidden // CONFIG["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": [hidden],
            layer + "post_attention_layernorm.weight": [hidden],
            layer + "self_attn.q_proj.weight": [hidden, hidden],
            layer + "self_attn.o_proj.weight": [hidden, hidden],
            layer + "self_attn.k_proj.weight": [groups * head, hidden],
            layer + "self_attn.v_proj.weight": [groups * head, hidden],
            layer + "mlp.gate_proj.weight": [inner, hidden],
            layer + "mlp.up_proj.weight": [inner, hidden],
            layer + "mlp.down_proj.weight": [hidden, inner],
        }
    header, data = {}, b""
    for name, shape in shapes.items():
        size = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = [rng.gauss(0, 0.05) for _ in range(size)] if len(shape) > 1 else [1.0] * size
        header[name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [len(data), len(data) + 4 * size],
        }
        data += struct.pack(f"<{size}f", *values)
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_tokens(prefix, rng):
    """One document in Megatron's format."""
    tokens = [(i * i + rng.randrange(3)) % 61 for i in range(20000)]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, len(tokens), 0, 0, 1)
    )


class Run:
    """One drrl-train job in the background. `prefix` starts mpirun, `hosts` are its options."""

    def __init__(self, study, output, tp, dp, *flags, prefix=(), hosts=(), supervised=False):
        self.mark = f"DRRL_FAULTS={uuid.uuid4()}"
        self.output, self.lines, self.seen = output, [], threading.Condition()
        environment = dict(
            os.environ,
            OMP_NUM_THREADS="1",
            OMP_WAIT_POLICY="passive",
            DRRL_FAULTS=self.mark.split("=")[1],
            OMPI_MCA_btl_vader_single_copy_mechanism="none",
            OMPI_MCA_mpi_yield_when_idle="1",
        )
        self.command = [
            *prefix,
            "mpirun",
            "--allow-run-as-root",
            "--oversubscribe",
            "--bind-to",
            "none",
            *hosts,
            "-x",
            "DRRL_FAULTS",
            "-np",
            str(tp * dp),
            study.bin / "drrl-train",
            f"--model={study.folder}/model",
            f"--data={study.folder}/text",
            f"--output={output}",
            f"--tp={tp}",
            "--seq_len=24",
            "--micro_batch=2",
            "--global_batch=8",
            f"--steps={STEPS}",
            f"--save_every={SAVE_EVERY}",
            "--lr=1e-3",
            "--threads=1",
            "--valid_fraction=0",
            f"--timeout_s={TIMEOUT}",
            f"--watchdog_timeout_s={WATCHDOG}",
            "--resume",
            *flags,
        ]
        if supervised:
            self.command = [RESTARTS, "--hang_s", str(HANG), "--pause_s", "3", "--", *self.command]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            with self.seen:
                self.lines.append(line)
                self.seen.notify_all()
        with self.seen:
            self.seen.notify_all()

    def text(self):
        with self.seen:
            return "".join(self.lines)

    def wait_for(self, pattern, seconds=60):
        """Until a line of the output matches; False when the job ended first."""
        deadline = time.monotonic() + seconds
        with self.seen:
            while not any(re.search(pattern, line) for line in self.lines):
                if self.process.poll() is not None:
                    return False
                expect(
                    time.monotonic() < deadline,
                    f"nothing like '{pattern}' within {seconds} s:\n" + "".join(self.lines)[-2000:],
                )
                self.seen.wait(0.05)
        return True

    def processes(self):
        """(pid, world rank or None for mpirun and orted) of everything that still runs, zombies
        left out."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    variables = (
                        (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                    )
                    if (
                        self.mark in variables
                        and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
                    ):
                        rank = [
                            v.split("=")[1]
                            for v in variables
                            if v.startswith("OMPI_COMM_WORLD_RANK=")
                        ]
                        found.append((int(entry.name), int(rank[0]) if rank else None))
        return found

    def pid(self, rank):
        found = [pid for pid, r in self.processes() if r == rank]
        return found[0] if found else None

    def end(self, seconds):
        """Exit code, or None when it is still there after so many seconds. Whatever is left is then
        removed."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        code = self.process.returncode
        return 128 - code if code < 0 else code

    def remove(self):
        for pid, _ in self.processes():
            send(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.reader.join(5)


def losses(output):
    rows = [
        json.loads(line) for line in (output / "metrics" / "metrics.jsonl").read_text().splitlines()
    ]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


# --------------------------------------------------------------------------------------------------
# faults: each a function (trial) that breaks trial.run and says which exit codes that may have. It
# returns None when the run was over before the fault could be made: the trial is then repeated.


def random_moment(trial):
    """Somewhere in the steps, checkpoints included. False: the run was over."""
    if not trial.run.wait_for(r"^step +1/"):
        return False
    time.sleep(trial.rng.random() * trial.study.seconds[trial.layout])
    return trial.run.process.poll() is None


def checkpoint_moment(trial):
    """While a checkpoint is being written."""
    if not trial.run.wait_for(
        rf"^step +{trial.rng.randrange(STEPS // SAVE_EVERY - 1) * SAVE_EVERY + 1}/"
    ):
        return False
    folder = trial.run.output / "checkpoints"
    while trial.run.process.poll() is None:
        if any(
            name.startswith(".tmp-step") for name in (os.listdir(folder) if folder.exists() else [])
        ):
            time.sleep(trial.rng.random() * 0.002)
            return True
    return False


def watch_restart(trial):
    """Waits for run_with_restarts.sh to give the broken job up: how long that took, and by which
    exit code."""
    begun = time.monotonic()
    trial.run.wait_for(r"^run_with_restarts: exit code", max(TIMEOUT, WATCHDOG) + HANG + PATIENCE)
    trial.took = time.monotonic() - begun


def kill_rank(moment):
    def fault(trial):
        rank = trial.rng.randrange(trial.world)
        pid = moment(trial) and trial.run.pid(rank)
        if not pid:
            return None
        trial.note = f"rank {rank}"
        return {KILLED} if send(pid, signal.SIGKILL) else None

    return fault


def stop_rank(moment):
    """The others end the job, unless they were done already: then mpirun waits for the stopped one,
    and run_with_restarts.sh ends that."""

    def fault(trial):
        rank = trial.rng.randrange(trial.world)
        pid = moment(trial) and trial.run.pid(rank)
        if not pid:
            return None
        if not send(pid, signal.SIGSTOP):
            return None
        trial.note = f"rank {rank}"
        watch_restart(trial)
        return {0}

    return fault


def end_moment(trial):
    """On the way out: in the last barrier, in MPI_Finalize."""
    if not trial.run.wait_for(r"^step +1/") or not trial.run.wait_for(r"^exported "):
        return False
    time.sleep(trial.rng.random() * 0.01)
    return True


def kill_mpirun(trial):
    if not random_moment(trial):
        return None
    return {KILLED} if send(trial.run.process.pid, signal.SIGKILL) else None


def broken_memory(trial):
    """A NaN in the memory of one process: its copy of a norm's weights, found by the bytes of a
    checkpoint that was written just now. The step after it changes them, so it must be a new one
    each time that they are not found."""
    rank = trial.rng.randrange(trial.world)
    pid = random_moment(trial) and trial.run.pid(rank)
    if not pid:
        return None
    name, shards = (
        "model.model.layers.1.post_attention_layernorm.weight",
        trial.run.output / "checkpoints",
    )
    searched = newest = None
    while trial.run.process.poll() is None:
        with contextlib.suppress(OSError):
            newest = (shards / "latest").read_text().strip()
        if searched is None or newest == searched:
            searched = newest
            time.sleep(0.001)
            continue
        searched = newest
        if not send(pid, signal.SIGSTOP):  # for less than the timeout
            return None
        try:
            hits = 0
            with contextlib.suppress(OSError):
                raw = (shards / newest / "shard-tp0.safetensors").read_bytes()
                size = struct.unpack("<Q", raw[:8])[0]
                begin, end = json.loads(raw[8 : 8 + size])[name]["data_offsets"]
                hits = poke(
                    pid, raw[8 + size + begin : 8 + size + end], struct.pack("<f", float("nan"))
                )
        finally:
            send(pid, signal.SIGCONT)
        if hits:
            if newest.endswith(f"{STEPS:08d}"):  # no step follows that could meet it
                return None
            trial.note = f"rank {rank}"
            return {NUMERICS}
    return None


def poke(pid, pattern, value):
    """Overwrites the start of each occurrence of `pattern` in writable anonymous memory; returns
    how many there were."""
    hits = 0
    with (
        open(f"/proc/{pid}/maps") as maps,
        open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory,
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pages,
    ):
        for line in maps:
            span, rights, _, _, inode, *_ = line.split()
            if rights[:2] != "rw" or inode != "0":
                continue
            for begin, end in present(pages, *(int(x, 16) for x in span.split("-"))):
                with contextlib.suppress(OSError):
                    memory.seek(begin)
                    data = memory.read(end - begin)
                    at = data.find(pattern)
                    while at >= 0:
                        memory.seek(begin + at)
                        memory.write(value)
                        hits += 1
                        at = data.find(pattern, at + 1)
    return hits


def present(pages, begin, end):
    """The stretches of [begin, end) that are in memory: reading what was only reserved takes longer
    than the trial."""
    pages.seek(begin // mmap.PAGESIZE * 8)
    entries = array.array("Q", pages.read((end - begin) // mmap.PAGESIZE * 8))
    at = begin
    for there, run in itertools.groupby(entries, key=lambda entry: entry >> 63):
        size = sum(1 for _ in run) * mmap.PAGESIZE
        if there:
            yield at, at + size
        at += size


def full_disk(trial):
    """The file system of the output fills up and stays full; room is made before the restart."""
    filler = trial.run.output.parent / "filler"
    if not random_moment(trial):
        return None
    begun = time.monotonic()
    with open(filler, "wb", buffering=0) as file:
        while trial.run.process.poll() is None and time.monotonic() < begun + PATIENCE:
            try:
                file.write(b"\0" * 65536)
            except OSError:
                time.sleep(0.005)
    trial.took = time.monotonic() - begun
    return None if trial.run.process.returncode == 0 else {STORAGE}  # 0: all was written before


def hung_write(trial):
    """The log of metrics blocks for ever: a pipe that is full and that nobody reads any more, as a
    dead network file system would."""
    return {HUNG} if trial.world == 1 else {COMMUNICATION, HUNG}


def partition(trial):
    """The link goes down, and comes back when run_with_restarts.sh has given the job up."""
    if not random_moment(trial):
        return None
    trial.network.link("down")
    watch_restart(trial)
    trial.network.link("up")
    return {0}


def outage(trial):
    """A link that is down for less than the timeout."""
    if not random_moment(trial):
        return None
    trial.network.link("down")
    time.sleep(TIMEOUT * 0.4)
    trial.network.link("up")
    return {0}


def slow_link(trial):
    if not random_moment(trial):
        return None
    trial.network.shape("20mbit", latency="100ms")
    return {0}


def lossy_link(trial):
    """A link whose queue holds a few packets and drops the others: TCP has to send them again."""
    if not random_moment(trial):
        return None
    trial.network.shape("20mbit", limit="32k")
    give_up = time.monotonic() + PATIENCE
    while (
        (lost := trial.network.dropped()) == 0
        and trial.run.process.poll() is None
        and time.monotonic() < give_up
    ):
        time.sleep(0.05)
    if lost == 0 and trial.run.process.poll() is not None:
        return None  # too late
    expect(lost > 0, "packets are lost")
    return {0}


def clock_jump(trial):
    """The wall clock of all processes is set forward or back by up to a day, and a little later set
    right."""
    pid = random_moment(trial) and trial.run.pid(0)
    if not pid:
        return None
    with contextlib.suppress(FileNotFoundError):  # it has ended
        expect(
            "libfaults_wall_clock" in Path(f"/proc/{pid}/maps").read_text(),
            "the run has its own wall clock",
        )
    seconds = trial.rng.choice((-1, 1)) * 10 ** trial.rng.uniform(0, 4.94)
    trial.note = f"{seconds:+.0f} s"
    trial.set_clock(seconds)
    time.sleep(trial.rng.random())
    trial.set_clock(0)
    return {0}


FAULTS = {
    "SIGKILL at a random moment": kill_rank(random_moment),
    "SIGKILL in a checkpoint": kill_rank(checkpoint_moment),
    "SIGSTOP at a random moment": stop_rank(random_moment),
    "SIGSTOP in a checkpoint": stop_rank(checkpoint_moment),
    "SIGSTOP at the end": stop_rank(end_moment),
    "SIGKILL of mpirun": kill_mpirun,
    "NaN in one memory": broken_memory,
    "full disk": full_disk,
    "hung write": hung_write,
    "network partition": partition,
    "short network outage": outage,
    "slow network": slow_link,
    "lossy network": lossy_link,
    "clock jump": clock_jump,
}
SUPERVISED = {
    "SIGSTOP at a random moment",
    "SIGSTOP in a checkpoint",
    "SIGSTOP at the end",
    "network partition",
}
NETWORKED = {"network partition", "short network outage", "slow network", "lossy network"}
GOES_ON = SUPERVISED | NETWORKED | {"clock jump"}  # and so may take as long as a whole run
FIXED_LAYOUTS = {kind: [(1, 2)] for kind in NETWORKED} | {"hung write": [(1, 1), (1, 2)]}


class Network:
    """Two hosts, each a network namespace, with one cable between them."""

    def __init__(self, folder):
        self.names = [f"drrl{os.getpid()}{side}" for side in "ab"]
        self.devices = [f"d{os.getpid()}{side}" for side in "ab"]
        a, b = self.names
        self.close()
        try:
            for name in self.names:
                self.ip("netns", "add", name)
            self.ip(
                "link",
                "add",
                self.devices[0],
                "netns",
                a,
                "type",
                "veth",
                "peer",
                "name",
                self.devices[1],
                "netns",
                b,
            )
            for name, device, number in zip(self.names, self.devices, (1, 2)):
                self.ip("-n", name, "link", "set", "lo", "up")
                self.ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", device)
                self.ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            raise Skip(
                f"no network namespaces here: {getattr(error, 'stderr', '') or error}"
            ) from error
        # What mpirun calls in place of ssh: HOST COMMAND.
        agent = folder / "agent.sh"
        agent.write_text(
            f"#!/bin/sh\nshift\nexec ip netns exec {b} unshare -u sh -c 'hostname hostb; exec "
            '"$@"\' - sh -c "$*"\n'
        )
        agent.chmod(0o755)
        self.prefix = [
            "ip",
            "netns",
            "exec",
            a,
            "unshare",
            "-u",
            "sh",
            "-c",
            'hostname hosta; exec "$@"',
            "-",
        ]
        self.hosts = [
            "--host",
            "10.213.7.1:1,10.213.7.2:1",
            "--mca",
            "plm_rsh_agent",
            agent,
            "--mca",
            "btl",
            "tcp,self",
            "--mca",
            "btl_tcp_if_include",
            "10.213.7.0/24",
            "--mca",
            "oob_tcp_if_include",
            "10.213.7.0/24",
        ]

    @staticmethod
    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    def link(self, state):
        self.ip("-n", self.names[0], "link", "set", self.devices[0], state)

    def tc(self, *arguments):
        return subprocess.run(
            ["ip", "netns", "exec", self.names[0], "tc", *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def shape(self, rate, **queue):
        """From now on so many bits a second one way, and no more waiting than queue says (of
        tc-tbf: latency or limit); what does not fit is lost."""
        self.tc(
            "qdisc",
            "add",
            "dev",
            self.devices[0],
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "10k",
            *itertools.chain(*queue.items()),
        )

    def dropped(self):
        """Packets lost so far."""
        return int(
            re.search(
                r"dropped (\d+)", self.tc("-s", "qdisc", "show", "dev", self.devices[0], "root")
            )[1]
        )

    def close(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


class Trial:
    def __init__(self, study, kind, layout, rng):
        self.study, self.kind, self.layout, self.rng = study, kind, layout, rng
        self.world = layout[0] * layout[1]
        self.note, self.network, self.clock, self.took, self.cleanup = "", None, None, None, []

    def set_clock(self, seconds):
        """What the wall clock of the run's processes is off by, from now on."""
        with open(self.clock, "r+b" if self.clock.exists() else "wb") as file:
            file.write(struct.pack("d", seconds))

    def start(self, output, *flags, supervised=False):
        prefix, hosts = (self.network.prefix, self.network.hosts) if self.network else ((), ())
        if self.clock:
            prefix = [
                "env",
                f"LD_PRELOAD={self.study.bin.parent / 'lib/libfaults_wall_clock.so'}",
                f"DRRL_WALL_CLOCK={self.clock}",
            ]
        return Run(
            self.study,
            output,
            *self.layout,
            *flags,
            prefix=prefix,
            hosts=hosts,
            supervised=supervised,
        )

    def attempt(self, folder):
        """A result, or None when the fault came too late."""
        output = folder / "out"
        if self.kind == "full disk":
            if (
                subprocess.run(
                    ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder],
                    capture_output=True,
                    check=False,
                ).returncode
                != 0
            ):
                raise Skip("cannot mount a small file system here")
            self.cleanup.append(lambda: subprocess.run(["umount", folder], check=True))
        if self.kind in NETWORKED:
            self.network = Network(folder)
            self.cleanup.append(lambda: self.network.close())
        if self.kind == "clock jump":
            self.clock = folder / "clock"
            self.set_clock(0)
        if self.kind == "hung write":
            (output / "metrics").mkdir(parents=True)
            os.mkfifo(output / "metrics" / "metrics.csv")
            pipe = os.open(output / "metrics" / "metrics.csv", os.O_RDWR | os.O_NONBLOCK)
            self.cleanup.append(lambda: os.close(pipe))
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(pipe, bytes(4096))
        # To look through the memory of a process takes longer than the others' patience here.
        flags = ["--timeout_s=20"] if self.kind == "NaN in one memory" else []
        self.run = self.start(output, *flags, supervised=self.kind in SUPERVISED)
        try:
            codes = FAULTS[self.kind](self)
            if codes is None:
                return None
            injected = time.monotonic()
            code = self.run.end((90 if self.kind in GOES_ON else max(TIMEOUT, WATCHDOG)) + PATIENCE)
            expect(
                code is not None,
                "the job has not ended after the fault; left: "
                f"{self.run.processes()}\n{self.run.text()[-3000:]}",
            )
            left = self.leftovers()
            took = self.took or time.monotonic() - injected
            expect(
                code in codes,
                f"exit code {code}, expected {sorted(codes)}\n{self.run.text()[-3000:]}",
            )
            expect(not left, f"processes are left: {left}\n{self.run.text()[-3000:]}")
        finally:
            self.run.remove()
        text = self.run.text()
        ends = [
            int(c) for c in re.findall(r"^run_with_restarts: exit code (\d+);", text, re.MULTILINE)
        ] + [code]
        result = {
            "kind": self.kind,
            "layout": self.layout,
            "note": self.note,
            "codes": ends,
            "end_seconds": round(took, 2),
        }
        broken, restarted = text, ""
        if code != 0:
            restarted = self.restart(output)
        elif len(ends) > 1:
            broken, restarted = text.split("run_with_restarts: exit code", 1)
        if restarted:
            resumed = re.search(r"^resumed after step (\d+)", restarted, re.MULTILINE)
            done = [int(m) for m in re.findall(r"^step +(\d+)/", broken, re.MULTILINE)]
            result |= {"step": max(done, default=0), "resumed": int(resumed[1]) if resumed else 0}
            # The step of a checkpoint is logged before it is written.
            expect(
                result["step"] - result["resumed"] <= SAVE_EVERY, f"too many steps lost: {result}"
            )
        text = broken + restarted
        expect(
            "damaged" not in text and "instead" not in text,
            f"a restart found a checkpoint that is not sound:\n{text[-3000:]}",
        )
        self.compare(output)
        return result

    def leftovers(self):
        """What still runs; a process that mpirun lost may take the watchdog's time to notice."""
        deadline = time.monotonic() + max(TIMEOUT, WATCHDOG) + PATIENCE
        while (left := self.run.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def restart(self, output):
        """What the restarted run prints, after everything is well again."""
        if self.kind == "full disk":
            (output.parent / "filler").unlink(missing_ok=True)
        if self.kind == "hung write":
            (output / "metrics" / "metrics.csv").unlink()
        again = self.start(output)
        try:
            code = again.end(60)
        finally:
            again.remove()
        expect(code == 0, f"the restart ended with {code}:\n{again.text()[-3000:]}")
        return again.text()

    def compare(self, output):
        expected, got = self.study.reference[self.layout], losses(output)
        differing = [step for step in expected if got.get(step) != expected[step]]
        expect(
            not differing and len(got) == len(expected),
            f"losses differ at {len(differing)} steps, first at {differing[:1]}",
        )

    def run_once(self):
        for _ in range(20):
            folder = Path(tempfile.mkdtemp(dir=self.study.folder, prefix="trial-"))
            try:
                result = self.attempt(folder)
            finally:
                for action in reversed(self.cleanup):
                    action()
                self.cleanup.clear()
                shutil.rmtree(folder, ignore_errors=True)
            if result:
                return result
        raise Broken("the run was over before the fault, 20 times")


class Study:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.bin = Path(os.environ["DRRL_BIN"]).resolve()
        self.reference, self.seconds = {}, {}
        rng = random.Random(options.seed)
        write_model(folder / "model", rng)
        write_tokens(folder / "text", rng)

    def measure(self, layout):
        """The run that nothing happens to."""
        if layout in self.reference:
            return
        output = self.folder / f"whole-{layout[0]}-{layout[1]}"
        run = Run(self, output, *layout)
        try:
            run.wait_for(r"^step +1/")
            begun = time.monotonic()
            code = run.end(120)
        finally:
            run.remove()
        expect(code == 0, f"the run without a fault ended with {code}:\n{run.text()[-3000:]}")
        self.reference[layout] = losses(output)
        self.seconds[layout] = time.monotonic() - begun

    def run(self):
        rng = random.Random(self.options.seed)
        results = []
        for kind in FAULTS:
            if not re.search(self.options.only, kind):
                continue
            for repeat in range(self.options.repeats):
                layout = rng.choice(self.options.layouts)
                if kind in FIXED_LAYOUTS:
                    layout = FIXED_LAYOUTS[kind][repeat % len(FIXED_LAYOUTS[kind])]
                trial = Trial(
                    self, kind, layout, random.Random(f"{self.options.seed} {kind} {repeat}")
                )
                try:
                    self.measure(layout)
                    results.append(trial.run_once())
                except Skip as reason:
                    results.append({"kind": kind, "skipped": str(reason)})
                except Broken as reason:
                    results.append(
                        {"kind": kind, "layout": layout, "note": trial.note, "broken": str(reason)}
                    )
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
                if "skipped" in results[-1]:
                    break
        return results


def table(results):
    lines = [
        (
            "| fault | trials | kept | exit codes of the broken job | "
            "seconds to the end: median, most | steps lost: most |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for kind in FAULTS:
        mine = [r for r in results if r["kind"] == kind]
        good = [r for r in mine if "codes" in r]
        if any("skipped" in r for r in mine):
            lines.append(f"| {kind} | skipped: {mine[-1]['skipped']} | | | | |")
        elif mine:
            times = sorted(r["end_seconds"] for r in good) or [float("nan")]
            codes = ", ".join(str(c) for c in sorted({r["codes"][0] for r in good}))
            lost = max((max(r["step"] - r["resumed"], 0) for r in good if "step" in r), default="-")
            lines.append(
                f"| {kind} | {len(mine)} | {len(good)} | {codes} | {times[len(times) // 2]:.1f}, "
                f"{times[-1]:.1f} | {lost} |"
            )
    return "\n".join(lines)


def layout_of(text):
    tp, dp = text.split("x")
    return int(tp), int(dp)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1, help="trials of each fault (default 1)")
    parser.add_argument(
        "--only", default="", help="regular expression that a fault's name must match"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of moments, ranks and layouts (default 1)"
    )
    parser.add_argument(
        "--layouts",
        type=lambda t: [layout_of(x) for x in t.split(",")],
        default="1x2,2x1,2x2,1x3",
        help="TP x DP to draw from (default 1x2,2x1,2x2,1x3)",
    )
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drrl-faults-") as folder:
        results = Study(options, Path(folder)).run()
    print(table(results))
    if options.json:
        Path(options.json).write_text(
            json.dumps(
                {
                    "seed": options.seed,
                    "timeout_s": TIMEOUT,
                    "watchdog_timeout_s": WATCHDOG,
                    "steps": STEPS,
                    "save_every": SAVE_EVERY,
                    "results": results,
                },
                indent=2,
            )
            + "\n"
        )
    if all("skipped" in r for r in results):
        return 77  # ctest: skipped
    return 1 if any("broken" in r for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
