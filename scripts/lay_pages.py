"""Lay the pages of the documentation's site: lay_pages.py OUT

docs/*.md and the documents of the main folder, side by side. A link to a file that is no page, such as a test
or a recipe, becomes its text with the path, because the site does not hold the repository.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LOG.md": "log.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def pages() -> dict[Path, str]:
    """Every document with the name of its page."""
    documents = {ROOT / name: page for name, page in TOP.items()}
    return {**documents, **{path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}}


def page(document: Path) -> str:
    """The document's text with the links of the site. Raises ValueError for a link to nothing."""
    known = pages()

    def linked(found: re.Match[str]) -> str:
        text, link = found[1], found[2]
        place, sign, anchor = link.partition("#")
        if "://" in link or not place:
            return found[0]
        path = (document.parent / place).resolve()
        if path in known:
            return f"[{text}]({known[path]}{sign}{anchor})"
        if not path.exists():
            raise ValueError(f"{document.relative_to(ROOT)} links to {place}, which does not exist")
        name = f"`{path.relative_to(ROOT)}`"
        return name if text.strip("`") in name else f"{text} ({name})"

    return LINK.sub(linked, document.read_text())


def lay(out: Path) -> None:
    """Write all pages; what is there from before goes. Raises ValueError."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for document, name in pages().items():
        (out / name).write_text(page(document))


if __name__ == "__main__":
    lay(Path(sys.argv[1]))
