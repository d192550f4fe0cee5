"""Measures a finished run anew from its own folder, and says whether its summary is reproduced to the digit.

python scripts/evaluate.py run=runs/digits/<stamp>
"""

from omegaconf import DictConfig, OmegaConf

from litdistill.cli import command


@command("evaluate")
def main(cfg: DictConfig) -> None:
    from pathlib import Path

    from rich import print as show

    from litdistill.evaluation.evaluate import differences, evaluate, load_run
    from litdistill.report.tables import evaluation_table

    found = evaluate(cfg.run, OmegaConf.create({"data": cfg.data}), cfg.device, cfg.trust)
    show(evaluation_table(found))
    changed = differences(found, load_run(Path(cfg.run), cfg.trust)[1])
    if changed:
        show("[bold yellow]The run's summary says otherwise:[/]\n  " + "\n  ".join(changed))
    else:
        show("The run's summary is reproduced to the digit.")


if __name__ == "__main__":
    main()
