#!/usr/bin/env python3
"""Checks that relative links and anchors in Markdown files lead somewhere; exit 1 if one does not.

links.py FILE...
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def broken(page: Path) -> list[str]:
    problems = []
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            problems.append(f"{page}: {link}: there is no {target}")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            problems.append(f"{page}: {link}: {target} has no heading #{anchor}")
    return problems


def main() -> int:
    problems = [problem for name in sys.argv[1:] for problem in broken(Path(name))]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
