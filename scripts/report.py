"""Compares finished runs: one row for each kind of run, mean ± spread over its seeds.

python scripts/report.py runs=runs/digits                                  a table in the terminal
python scripts/report.py 'runs=[runs/digits,runs/mnist]' out=table.md      and as Markdown
python scripts/report.py runs=runs/digits out=report/                      a page with curves, costs and robustness
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("report")
