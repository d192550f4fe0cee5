"""Writes the comments of conf/ and docs/reference.md anew, of the schema of all options (src/litdistill/config/schema).

python scripts/reference.py
"""

from pathlib import Path

from litdistill.cli.reference import FILES, commented, page
from litdistill.utils.paths import CONF

if __name__ == "__main__":
    for file in FILES:
        (CONF / file).write_text(commented(file))
    Path("docs/reference.md").write_text(page())
    print(f"Written: the comments of {len(FILES)} files of conf, and docs/reference.md")
