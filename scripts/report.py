"""Compares finished runs: one row for each kind of run, mean ± spread over its seeds.

python scripts/report.py runs=runs/digits                                  a table in the terminal
python scripts/report.py 'runs=[runs/digits,runs/mnist]' out=table.md      and as Markdown
python scripts/report.py runs=runs/digits out=report/                      a page with curves, costs and robustness
"""

from omegaconf import DictConfig, ListConfig

from litdistill.cli import command


@command("report")
def main(cfg: DictConfig) -> None:
    from rich.console import Console

    from litdistill.report.tables import tables as report
    from litdistill.utils.checkpoint import write_text

    places = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
    found = report.summaries(places)
    rows = report.rows(found)
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)  # in a file no line is too long
    console.print(report.table(rows))
    if cfg.out is not None and cfg.out.endswith(".md"):
        write_text(cfg.out, report.markdown(rows))
        print(f"Written to {cfg.out}")
    elif cfg.out is not None:
        from litdistill.config.trust import packages
        from litdistill.report.build import build
        from litdistill.report.collect import Settings

        settings = Settings(
            cfg.threads, cfg.rounds, cfg.robustness, tuple(cfg.epsilons), cfg.device, packages(cfg.trust)
        )
        build(places, cfg.out, cfg.title, settings)
        print(f"Written to {cfg.out.rstrip('/')}/index.html and report.md")
    if cfg.picture is not None:
        report.picture(found, cfg.picture)
        print(f"Drawn to {cfg.picture}")


if __name__ == "__main__":
    main()
