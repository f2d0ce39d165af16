"""Python packages that only some programs of this folder need: kept out of
launch/setup/requirements.txt, in a folder of their own under the cache."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def add(name: str, packages: list[str]) -> None:
    """Makes pinned packages importable, without dependencies, after everything that is there; pip
    installs them the first time."""
    cache = Path(
        os.environ.get("DRRL_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drrl"
    )
    folder = cache / f"{name}-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                    "--no-deps",
                    "--target",
                    f"{work}/new",
                    *packages,
                ],
                check=True,
                stdin=subprocess.DEVNULL,
            )
            os.rename(f"{work}/new", folder)  # complete or not there
    sys.path.append(str(folder))
