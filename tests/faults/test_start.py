#!/usr/bin/env python3
"""The start and the stop of the programs: files on a file system that does not answer, and signals
at every moment, from terminals too."""

import os
import pty
import random
import select
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

from study import write_model, write_tokens

BIN = Path(os.environ["DRRL_BIN"]).resolve()
STUCK = BIN.parent / "lib" / "libfaults_stuck_file.so"
RESTARTS = Path(__file__).resolve().parents[2] / "launch" / "run_with_restarts.sh"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
INTERRUPTED, COMMUNICATION, HUNG = 10, 7, 11
PATIENCE = 60


class Programs(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.shared = Path(folder.name)
        write_model(cls.shared / "model", random.Random(1))
        write_tokens(cls.shared / "text", random.Random(1))
        (cls.shared / "policy").write_bytes(bytes(100))
        (cls.shared / "runs.json").write_text("{}")
        cls.environment = dict(
            os.environ,
            OMP_NUM_THREADS="1",
            OMP_WAIT_POLICY="passive",
            OMPI_MCA_btl_vader_single_copy_mechanism="none",
            OMPI_MCA_mpi_yield_when_idle="1",
        )

    def setUp(self):
        self.output = Path(tempfile.mkdtemp(dir=self.shared)) / "out"

    def program(self, name="train", *more):
        return [
            str(BIN / f"drrl-{name}"),
            f"--model={self.shared}/model",
            f"--data={self.shared}/text",
            "--seq_len=24",
            "--threads=1",
            *more,
        ]

    def train(self, *more):
        return self.program(
            "train",
            "--global_batch=2",
            "--valid_fraction=0",
            f"--output={self.output}",
            "--log_every=10",
            "--resume",
            *more,
        )

    def start(self, command, **environment):
        run = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment | environment,
            start_new_session=True,
        )
        self.addCleanup(self.end, run)
        return run

    @staticmethod
    def end(run):
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()
        run.wait()

    def ended(self, run):
        """(exit code, output)"""
        text, _ = run.communicate(timeout=PATIENCE)
        return run.returncode, text

    def expect_saved(self, code, text=""):
        self.assertEqual(code, INTERRUPTED, text)
        self.assertTrue((self.output / "checkpoints" / "latest").exists(), text)


class StuckFileTest(Programs):
    def stuck(self, file, command, **environment):
        return self.start(
            [*command, "--watchdog_timeout_s=3"],
            LD_PRELOAD=str(STUCK),
            DRRL_STUCK_FILE=file,
            **environment,
        )

    def test_the_watchdog_says_which_file_does_not_answer(self):
        trained = subprocess.run(
            self.train("--steps=1"),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        self.assertEqual(trained.returncode, 0, trained.stderr)
        train = self.train("--steps=2")
        policy = [
            f"--output={self.output}-2",
            "--attention=lowrank",
            "--near_block=8",
            "--rank=4",
            f"--policy={self.shared}/policy",
        ]
        cases = [
            ("config.json", "reading the configuration", train),
            ("text.idx", "opening the data", train),
            ("text.bin", "opening the data", train),
            ("model/model.safetensors", "reading the configuration", train),
            ("manifest.json", "restoring", train),
            ("policy", "reading the rank policy", [*train, *policy]),
            ("model/model.safetensors", "reading the configuration", self.program("eval")),
            (
                "policy",
                "reading the rank policy",
                [
                    str(BIN / "drrl-policy"),
                    "train",
                    f"--policy={self.shared}/policy",
                    "--traces=none",
                ],
            ),
            (
                "runs.json",
                "reading runs",
                [str(BIN / "drrl-bench"), "model", f"--runs={self.shared}/runs.json"],
            ),
        ]
        runs = [self.stuck(file, command) for file, _, command in cases]
        for (file, section, _), run in zip(cases, runs):
            with self.subTest(section=section, file=file, program=run.args[0]):
                code, text = self.ended(run)
                self.assertEqual(code, HUNG, text)
                self.assertRegex(
                    text,
                    f"watchdog: world rank 0: #\\d+ step 0: {section}, begun .*no sign of life",
                )
                self.assertRegex(text, f'the last file: ".*{file}"')

    def test_a_slow_file_system_is_no_hang(self):
        run = self.stuck("model/model.safetensors", self.train("--steps=1"), DRRL_SLOW_MS="30")
        begun = time.monotonic()
        code, text = self.ended(run)
        self.assertEqual(code, 0, text)
        self.assertGreater(
            time.monotonic() - begun, 4
        )  # longer than the watchdog waits for a sign of life

    def test_the_others_say_who_does_not_come(self):
        flags = ["--timeout_s=3", "--watchdog_timeout_s=60", "--steps=1"]
        code, text = self.ended(
            self.start(
                [*MPIRUN, "-np", "2", *self.train(*flags)],
                LD_PRELOAD=str(STUCK),
                DRRL_STUCK_FILE="model/model.safetensors",
                DRRL_STUCK_RANK="1",
            )
        )
        self.assertEqual(code, COMMUNICATION, text)
        self.assertRegex(
            text,
            r"world rank 1, group 'agreement' \(rank 1 of 2\) has not come to the agreement on "
            r"inputs",
        )


class StopTest(Programs):
    def on_terminal(self, command, until):
        """Starts it on a terminal of its own, types Ctrl-C when it has written `until`, and returns
        its exit code and what it wrote."""
        pid, terminal = pty.fork()
        if pid == 0:
            os.execvpe(command[0], command, self.environment)
        text, typed, deadline = "", False, time.monotonic() + PATIENCE
        try:
            while time.monotonic() < deadline:
                if select.select([terminal], [], [], 0.2)[0]:
                    try:
                        text += os.read(terminal, 65536).decode(errors="replace")
                    except OSError:  # it has ended
                        break
                if until in text and not typed:
                    os.write(terminal, b"\x03")
                    typed = True
            else:
                self.fail(f"still running: {text[-2000:]}")
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
        finally:
            os.close(terminal)

    def test_ctrl_c(self):
        for prefix in ([], [str(RESTARTS), "--", *MPIRUN, "-np", "2"]):
            with self.subTest(prefix):
                shutil.rmtree(self.output, ignore_errors=True)
                self.expect_saved(
                    *self.on_terminal([*prefix, *self.train("--steps=100000")], "  loss ")
                )

    def test_a_terminal_that_is_closed(self):
        for command in (
            self.train("--steps=100000"),
            [str(RESTARTS), "--", *MPIRUN, "-np", "2", *self.train("--steps=100000")],
        ):
            with self.subTest(command[0]):
                shutil.rmtree(self.output, ignore_errors=True)
                run = self.start(command)
                while "step " not in run.stdout.readline():
                    self.assertIsNone(run.poll())
                os.killpg(run.pid, signal.SIGHUP)
                self.expect_saved(*self.ended(run))

    def test_signals_before_the_program_can_hear_them(self):
        script = [str(RESTARTS), "--", *MPIRUN, "-np", "2", *self.train("--steps=100000")]
        for delay, command in (
            (0.05, ["env", "--block-signal=USR1", *self.train("--steps=100000")]),
            (0.1, script),
            (0.4, script),
        ):
            with self.subTest(delay=delay, command=command[0]):
                shutil.rmtree(self.output, ignore_errors=True)
                run = self.start(command)
                time.sleep(delay)
                run.send_signal(signal.SIGUSR1)
                self.expect_saved(*self.ended(run))

    def test_signals_that_are_sent_more_than_once(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            with self.subTest(number):
                shutil.rmtree(self.output, ignore_errors=True)
                run = self.start(self.train("--steps=100000", "--global_batch=400"))
                while "step " not in run.stdout.readline():
                    self.assertIsNone(run.poll())
                for _ in range(5):
                    run.send_signal(number)
                    time.sleep(0.02)
                self.expect_saved(*self.ended(run))

    def test_a_reader_that_has_gone(self):
        run = self.start(self.train("--steps=200"))
        run.stdout.readline()
        run.stdout.close()
        self.assertEqual(run.wait(PATIENCE), 0)
        self.assertEqual((self.output / "checkpoints" / "latest").read_text(), "step-00000200\n")


if __name__ == "__main__":
    unittest.main(verbosity=2)
