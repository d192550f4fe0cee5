"""Published figures beside what runs gave.

python scripts/reproductions.py list                      the experiments of all published cells
python scripts/reproductions.py collect <run folder> …    measures finished runs anew and notes them in docs/results
python scripts/reproductions.py page                      writes docs/reproductions.md from docs/results
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("reproductions")
