#!/usr/bin/env python3
"""Every flag file of configs/ is understood by its program: with it, a model that is not there is
what the program complains about."""

import os
import subprocess
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ["DRRL_BIN"])
MODEL_ERROR, USAGE_ERROR = 3, 2  # launch/runtime/exit_codes.h
PROGRAMS = {
    "eval": "drrl-eval",
    "finetune": "drrl-train",
    "quickstart-train": "drrl-train",
    "quickstart-eval": "drrl-eval",
    "quickstart-calibrate": "drrl-policy",
    "quickstart": "drrl-train",
}


def run(program, *flags):
    command = [
        BIN / program,
        *(["calibrate", "--policy=/nonexistent"] if program == "drrl-policy" else []),
        "--model=/nonexistent",
        "--data=/nonexistent",
        *flags,
        "--tp=1",
        "--device=cpu",
    ]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )


class ConfigTest(unittest.TestCase):
    def test_flag_files(self):
        files = sorted((ROOT / "configs").glob("*.flags"))
        self.assertGreater(len(files), 5)
        for file in files:
            program = PROGRAMS.get(file.stem) or PROGRAMS[file.stem.split("-")[0]]
            with self.subTest(file=file.name, program=program):
                result = run(program, f"--flagfile={file}")
                self.assertEqual(result.returncode, MODEL_ERROR, result.stdout + result.stderr)
                self.assertIn("/nonexistent", result.stderr)

    def test_an_unknown_flag_in_a_file_is_an_error(self):
        import tempfile

        with tempfile.NamedTemporaryFile("w", suffix=".flags") as file:
            file.write("--seq_len=8\n--no_such_flag=1\n")
            file.flush()
            result = run("drrl-train", f"--flagfile={file.name}")
        self.assertEqual(result.returncode, USAGE_ERROR, result.stdout + result.stderr)
        self.assertIn("no_such_flag", result.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
