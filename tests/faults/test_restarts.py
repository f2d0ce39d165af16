#!/usr/bin/env python3
"""launch/run_with_restarts.sh with stand-ins for mpirun and drrl-train; and that no timeout can be
moved by a change of the date."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "run_with_restarts.sh"


class RestartTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        (self.folder / "checkpoints").mkdir()

    def command(self, body, *options):
        """`body`: what the training does; $run is 1, 2, ... and `save` makes a checkpoint."""
        training = self.folder / "training"
        training.write_text(f"""#!/bin/bash
cd {self.folder}
echo "$@" >> calls
run=$(wc -l < calls)
save() {{ printf 'step-%08d\\n' "$run" > checkpoints/latest; }}
{body}
""")
        training.chmod(0o755)
        return [
            SCRIPT,
            *options,
            "--pause_s",
            "0",
            "--",
            training,
            f"--output={self.folder}",
            "--steps=3",
        ]

    def run_it(self, body, *options):
        """(exit code, messages, the arguments of each run)"""
        ended = subprocess.run(
            self.command(body, *options), capture_output=True, text=True, timeout=60, check=False
        )
        calls = self.folder / "calls"
        return (
            ended.returncode,
            ended.stderr,
            calls.read_text().splitlines() if calls.exists() else [],
        )

    def test_success_needs_no_restart(self):
        code, _, calls = self.run_it("exit 0")
        self.assertEqual((code, calls), (0, [f"--output={self.folder} --steps=3 --resume"]))

    def test_what_a_restart_cures(self):
        for failure in ("exit 7", "exit 8", "exit 11", "exit 137", "kill -KILL $$"):
            with self.subTest(failure):
                (self.folder / "calls").unlink(missing_ok=True)
                code, messages, calls = self.run_it(f"[ $run = 3 ] && exit 0; save; {failure}")
                self.assertEqual((code, len(calls)), (0, 3), messages)
                self.assertIn("from the checkpoint 'step-00000002'", messages)

    def test_what_it_does_not_cure(self):
        for code in (1, 2, 3, 4, 5, 6, 9, 10, 130, 143):
            with self.subTest(code):
                (self.folder / "calls").unlink(missing_ok=True)
                got, messages, calls = self.run_it(f"save; exit {code}")
                self.assertEqual((got, len(calls)), (code, 1))
                self.assertIn(f"exit code {code}", messages)

    def test_no_progress(self):
        code, messages, calls = self.run_it("[ $run -gt 2 ] || save; exit 7")
        self.assertEqual((code, len(calls)), (7, 3))
        self.assertIn("no progress", messages)
        (self.folder / "calls").unlink()
        (self.folder / "checkpoints" / "latest").unlink()
        self.assertEqual(len(self.run_it("exit 7")[2]), 2, "no checkpoint at all")

    def test_the_number_of_restarts(self):
        code, messages, calls = self.run_it("save; exit 7", "--max_restarts", "2")
        self.assertEqual((code, len(calls)), (7, 3))
        self.assertIn("giving up", messages)

    def test_signals_are_passed_on_and_end_it(self):
        for number in (signal.SIGUSR1, signal.SIGTERM):
            with self.subTest(number):
                (self.folder / "calls").unlink(missing_ok=True)
                script = subprocess.Popen(
                    self.command(
                        "trap 'sleep 0.3; exit 10' USR1; touch ready; while true; do sleep 0.05; "
                        "done"
                    )
                )
                while not (self.folder / "ready").exists():
                    time.sleep(0.02)
                (self.folder / "ready").unlink()
                script.send_signal(number)
                self.assertEqual(script.wait(30), 10)

    def test_a_signal_in_the_pause_ends_it_at_once(self):
        command = self.command("exit 7")
        command[command.index("--pause_s") + 1] = "60"
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as script:
            self.assertIn("in 60 s", script.stderr.readline())
            script.terminate()
            self.assertEqual(script.wait(10), 10)

    def test_the_terminal_reaches_the_script_alone(self):
        """Ctrl-C, and a terminal that is closed: the command hears neither, but is asked to save,
        even if it cannot hear that at first."""
        body = (
            "trap 'echo INT >> heard; exit 1' INT; trap 'echo HUP >> heard; exit 1' HUP; "
            "touch ready; sleep 1; trap 'exit 10' USR1; while true; do sleep 0.05; done"
        )
        for number in (signal.SIGINT, signal.SIGHUP):
            with self.subTest(number):
                (self.folder / "ready").unlink(missing_ok=True)
                with subprocess.Popen(self.command(body), start_new_session=True) as script:
                    while not (self.folder / "ready").exists():
                        time.sleep(0.02)
                    os.killpg(script.pid, number)
                    self.assertEqual(script.wait(20), 10)
                self.assertFalse((self.folder / "heard").exists())

    def test_output_that_nobody_reads(self):
        with subprocess.Popen(
            self.command("[ $run = 3 ] && exit 0; save; exit 7"), stderr=subprocess.PIPE
        ) as script:
            script.stderr.close()
            self.assertEqual(script.wait(20), 0)

    def test_an_mpirun_that_outlives_its_job(self):
        shutil.copy("/bin/sleep", self.folder / "drrl-train")
        code, messages, calls = self.run_it(
            "[ $run = 2 ] && exit 0; ./drrl-train 1.5 & sleep 3600", "--hang_s", "2"
        )
        self.assertEqual((code, len(calls)), (0, 2), messages)
        self.assertIn("no drrl-train of this host has run for 2 s", messages)

    def test_usage(self):
        for arguments in (
            [],
            ["--"],
            ["--max_restarts", "many", "--", "true"],
            ["--bogus", "1", "--", "true"],
            ["--", "true", "--steps=3"],
        ):
            with self.subTest(arguments):
                ended = subprocess.run(
                    [SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False
                )
                self.assertEqual(ended.returncode, 2)
                self.assertIn("expected:" if arguments != ["--"] else "no command", ended.stderr)


class ClockTest(unittest.TestCase):
    def test_no_wait_looks_at_the_date(self):
        # Time stamps in logs and reports are all that the date may be used for.
        allowed = {
            "core/io/file_io.cpp": 1,
            "models/training/metrics.cpp": 1,
            "launch/bench/bench.cpp": 1,
        }
        pattern = re.compile(
            r"system_clock|high_resolution_clock|std::time\(|gettimeofday|CLOCK_REALTIME|"
            r"time\(nullptr\)"
        )
        found = {}
        for area in ("core", "distributed", "policy", "models", "launch"):
            for file in (ROOT / area).rglob("*"):
                if file.suffix in (".h", ".cpp", ".cu", ".cuh") and (
                    hits := len(pattern.findall(file.read_text()))
                ):
                    found[str(file.relative_to(ROOT))] = hits
        self.assertEqual(found, allowed)


if __name__ == "__main__":
    unittest.main(verbosity=2)
