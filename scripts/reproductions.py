"""Published figures beside what runs gave.

python scripts/reproductions.py list                      the experiments of all published cells
python scripts/reproductions.py collect <run folder> …    measures finished runs anew and notes them in docs/results
python scripts/reproductions.py page                      writes docs/reproductions.md from docs/results
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("list", "collect", "page"))
    parser.add_argument("folders", nargs="*", type=Path, help="run folders, or folders that hold some")
    arguments = parser.parse_args()
    from litdistill.benchmarks import published_tables as papers
    from litdistill.benchmarks import reproductions
    from litdistill.report.tables import runs
    from litdistill.utils.checkpoint import write_text
    from litdistill.utils.errors import UserError

    try:
        if arguments.what == "list":
            figures = papers.published()
            for name in sorted({*figures, *papers.experiments()}):
                print(f"experiment={name:<50} {figures[name].value if name in figures else ''}")
        elif arguments.what == "collect":
            for folder, _ in runs(arguments.folders):
                print(f"{folder.name}: {reproductions.collect(folder)}")
        else:
            write_text("docs/reproductions.md", reproductions.page())
            print("Written to docs/reproductions.md")
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
