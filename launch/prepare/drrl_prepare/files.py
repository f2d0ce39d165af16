"""Files that are written whole or not at all, and notes of what they were made of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

EXIT_BAD_INPUT = 3
FORMAT_VERSION = 1  # of what this program writes; a change makes earlier results be made again
TEXT_VERSION = 2  # the same, of token files


class BadInput(Exception):
    """An input that cannot be used; the message says which and why."""


def say(text: str) -> None:
    """What a user should know, apart from results."""
    print(f"prepare: {text}", file=sys.stderr)


def sha256(path: Path | str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Write `data` (bytes or str) so that `path` is either the old file or the whole new one. A
    link is followed; into what is no regular file (a device, a pipe), or is the own stdout, it is
    written instead."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    if path.is_dir():
        raise BadInput(f"{path}: is a folder, expected a file")
    if path.exists() and os.path.samestat(path.stat(), os.fstat(1)):
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        return
    if path.exists() and not path.is_file():
        descriptor = os.open(
            path, os.O_WRONLY | os.O_NONBLOCK
        )  # a pipe that nobody reads is an error, not waited for
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return
    path = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


class NewDirectory:
    """`with NewDirectory(out) as d:` fill d; it becomes `out` when the block ends without an
    exception."""

    def __init__(self, out: Path | str) -> None:
        self.out = Path(os.path.realpath(out))

    def __enter__(self) -> Path:
        if (
            self.out.exists()
            and not (self.out / "provenance.json").exists()
            and not (self.out.is_dir() and not any(self.out.iterdir()))
        ):
            raise BadInput(
                f"{self.out}: is there and was not made by this program, which would replace all "
                "of it: remove it, or give another --out"
            )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(dir=self.out.parent, prefix=f".{self.out.name}."))
        return self.temporary

    def __exit__(self, kind: type | None, *_error: object) -> bool:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return False
        for path in [*self.temporary.rglob("*"), self.temporary]:
            path.chmod(0o755 if path.is_dir() else 0o644)
            fsync_path(path)
        if self.out.exists():
            old = Path(tempfile.mkdtemp(dir=self.out.parent, prefix=f".{self.out.name}.old."))
            os.rename(self.out, old / "old")
            os.rename(self.temporary, self.out)
            shutil.rmtree(old)
        else:
            os.rename(self.temporary, self.out)
        fsync_path(self.out.parent)
        return False


def already_made(note_path: Path | str, recipe: dict, files: Iterable[Path]) -> bool:
    """True if the note beside a result names this recipe and every file is there with the noted
    size."""
    try:
        note = json.loads(Path(note_path).read_text())
        return note["recipe"] == recipe and all(
            Path(f).stat().st_size == note["sizes"][Path(f).name] for f in files
        )
    except (OSError, ValueError, KeyError):
        return False


def sizes(files: Iterable[Path | str]) -> dict[str, int]:
    return {Path(f).name: Path(f).stat().st_size for f in files}
