"""Fails where a Markdown file in the repository links to a path that is not in it."""

import re
import subprocess
import sys
from pathlib import Path

LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")
ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    command = ["git", "-C", ROOT, "ls-files", "*.md"]
    documents = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    broken = [
        f"{document}: {target}"
        for document in documents
        for target in LINK.findall((ROOT / document).read_text())
        if not (ROOT / document).parent.joinpath(target).exists()
    ]
    print("\n".join(["broken links:", *broken]) if broken else f"links of {len(documents)} Markdown files resolve")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
