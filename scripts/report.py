"""Compares finished runs: one row for each kind of run, mean ± spread over its seeds.

python scripts/report.py runs=runs/digits
python scripts/report.py 'runs=[runs/digits,runs/mnist]' out=table.md
"""

from omegaconf import DictConfig, ListConfig

from litdistill.runtime import command


@command("report")
def main(cfg: DictConfig) -> None:
    from rich.console import Console

    from litdistill import report
    from litdistill.checkpoint import write_text

    places = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
    found = report.summaries(places)
    rows = report.rows(found)
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)  # in a file no line is too long
    console.print(report.table(rows))
    if cfg.out is not None:
        write_text(cfg.out, report.markdown(rows))
        print(f"Written to {cfg.out}")
    if cfg.picture is not None:
        report.picture(found, cfg.picture)
        print(f"Drawn to {cfg.picture}")


if __name__ == "__main__":
    main()
