"""The function of each verb, called with its composed config. torch is imported only after the config was validated."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from litdistill.cli import starting
from litdistill.utils import terminal
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.text import printable


def train(cfg: DictConfig) -> float:
    """Trains a student, and its teacher where there is none yet; returns the monitored metric."""
    from litdistill.training.train import train

    starting.end(loaded=True)
    return train(cfg)


def sweep(cfg: DictConfig) -> None:
    """Searches for the best hyperparameters with repeated distillation runs."""
    from litdistill.sweep.study import sweep

    starting.end(loaded=True)
    hydra_config = HydraConfig.get()
    sweep(cfg, list(hydra_config.overrides.task), Path(hydra_config.runtime.output_dir))


def compare(cfg: DictConfig) -> None:
    """Trains every technique of conf/experiment/compare, and writes a page of comparison."""
    from litdistill.benchmarks.compare import compare

    starting.end(loaded=True)
    compare(cfg)


def evaluate(cfg: DictConfig) -> None:
    """Evaluates a finished run again, and prints the differences from its summary."""
    from litdistill.evaluation.evaluate import differences, draw, evaluate, load_run
    from litdistill.report.writers import attack_table, class_table, evaluation_table

    starting.end(loaded=True)
    data = OmegaConf.create({"data": cfg.data})
    if cfg.pictures:
        place = Path(cfg.pictures) if isinstance(cfg.pictures, str) else None
        draw(cfg.run, data, cfg.device, cfg.trust, place)
        print(f"Drawn: {f'tensorboard --logdir {cfg.run} shows the pictures' if place is None else place}.")
        return
    results = evaluate(cfg.run, data, cfg.device, cfg.trust, cfg.robustness, cfg.eps)
    terminal.show(*evaluation_table(results), terminal.stdout(140))
    if cfg.robustness:
        terminal.show(*attack_table(results["robustness"], cfg.eps), terminal.stdout(140))
    head, rows = class_table(results["by_class"])
    if rows:
        terminal.show(head, rows, terminal.stdout(140))
    changed = differences(results, load_run(Path(cfg.run), cfg.trust)[1])
    if changed:
        Console().print("[bold yellow]The run's summary differs:[/]")
        print("\n".join(f"  {printable(line)}" for line in changed))
    else:
        print("The run's summary is reproduced to the digit.")
    _warn(results["findings"])


def doctor(cfg: DictConfig) -> None:
    """Prints what is wrong with a finished run, the weightiest first, each with the one change to try."""
    from litdistill.evaluation.doctor import diagnose, lines
    from litdistill.evaluation.evaluate import pick_device

    starting.end(loaded=True)
    found = diagnose(cfg.run, OmegaConf.create({"data": cfg.data}), pick_device(cfg.device), cfg.trust)
    print("\n".join(map(printable, lines(found))))


def export(cfg: DictConfig) -> None:
    """Exports the student of a finished run, or verifies its exported files."""
    from litdistill.export.export import check_table, export, verify

    starting.end(loaded=True)
    data = OmegaConf.create({"data": cfg.data})
    limits = (cfg.tolerance.difference, cfg.tolerance.agreement)
    if cfg.verify:
        checks = verify(cfg.run, data, limits, cfg.trust, cfg.allow_code)
        terminal.show(*check_table(checks), terminal.stdout(140))
        _warn({name: text for check in checks.values() for name, text in check["findings"].items()})
        return
    options = (cfg.format, cfg.precision, cfg.preprocessing, cfg.calibration)
    path, check = export(cfg.run, *options, limits, data, cfg.trust)
    terminal.show(*check_table({path.name: check}), terminal.stdout(140))
    if cfg.format == "safetensors" and cfg.preprocessing:
        print("safetensors has weights alone: the normalization is in its metadata, and predict applies it.")
    print(f"Written to {path}")
    _warn(check["findings"])


def outputs(cfg: DictConfig) -> None:
    """Writes the outputs of a finished run's network for all samples of its data."""
    from litdistill.export.outputs import Form, record

    starting.end(loaded=True)
    form = Form(cfg.views, cfg.precision, cfg.top, cfg.rest, cfg.embedding)
    print("\n".join(record(cfg.run, cfg.to, cfg.of, form, cfg.device, OmegaConf.create({"data": cfg.data}), cfg.trust)))


def report(cfg: DictConfig) -> None:
    """Compares finished runs: as tables in the terminal or in a file, as a page, or as a picture."""
    from litdistill.report import tables, writers
    from litdistill.report.picture import picture
    from litdistill.report.pivot import pivot

    starting.end()
    ending = writers.ending(cfg.out)
    folders = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
    summaries = tables.summaries(folders)
    laid_out = pivot if cfg.pivot else tables.records
    made = [(tables.data_title(runs), laid_out(runs)) for runs in tables.by_data(summaries)]
    console = terminal.stdout(170)
    for title, rows in made:
        shown = writers.fitting(rows, console)
        console.print(writers.table(shown, title))
        if hidden := [name for name in rows[0] if name not in shown[0]]:
            print(f"A wider terminal, or out=table.md, also shows: {', '.join(hidden)}.")
    if ending in writers.FORMATS:
        write_text(cfg.out, writers.FORMATS[ending](made))
        print(f"Written to {cfg.out}")
    elif cfg.out is not None:
        from litdistill.config.trust import packages
        from litdistill.report.build import build
        from litdistill.report.collect import settings_of

        settings = settings_of(cfg, packages(cfg.trust), cfg.int8)
        for problem in (p for group in build(folders, cfg.out, cfg.title, settings) for p in group.problems):
            print(problem)
        print(f"Written to {cfg.out}" if ending else f"Written to {cfg.out.rstrip('/')}/index.html and report.md")
    if cfg.picture is not None:
        picture(summaries, cfg.picture)
        print(f"Drawn to {cfg.picture}")
    for run in summaries:
        _warn(
            {key: f"{run['experiment']}, seed {run['seed']}: {text}" for key, text in run.get("findings", {}).items()}
        )


def fetch(cfg: DictConfig) -> None:
    """Downloads and verifies a data set or published weights ahead of time, for example for a machine without network."""
    if cfg.weights is not None:
        print(f"{cfg.weights}: digest verified, in {published_weights(cfg.weights)}")
        return
    described = describe(cfg.data.name, cfg.data.root, cfg.data.image_size) if "name" in cfg.data else prepared(cfg)
    print("\n".join(described))


def prepared(cfg: DictConfig) -> list[str]:
    """Returns one line per split of data in memory, whose files are downloaded first if they are missing."""
    from litdistill.config.instantiate import instantiate

    data = instantiate(cfg.data, "data")
    starting.end(loaded=True)
    data.prepare_data()
    data.setup()
    name, shape = str(cfg.data["_target_"]).rpartition(".")[2], "x".join(map(str, data.input_shape))
    return [
        f"{name} {split}: {data.count(split):,} samples of {shape}, {data.num_classes} outputs, SHA-256 "
        f"{data.identity(split)[:16]}"
        for split in ("train", "val", "test")
    ]


def published_weights(name: str) -> Path:
    """Returns the file of published weights, downloaded if it is missing. Raises `UserError` for an unknown name."""
    from litdistill.data.weights import PUBLISHED, obtain_weights

    if name not in PUBLISHED:
        raise UserError(
            f"weights={name}: there is {', '.join(PUBLISHED)}. torchvision and timm fetch theirs on first use."
        )
    return obtain_weights(name)


def describe(name: str, root: str | Path, image_size: int | None = None) -> list[str]:
    """Returns one line per split of a data set, which is downloaded first if it is missing."""
    from litdistill.data.fetch import DATASETS, obtain
    from litdistill.data.sources import fingerprint, load

    starting.end(loaded=True)
    source = load(name, root, image_size)
    if name in DATASETS:
        where = f"digests verified, in {obtain(name, root).folder}"
    else:
        where = "bundled with scikit-learn" if name == "digits" else f"in {root}"
    return [
        f"{name} {kind}: {len(split.targets)} images of {'x'.join(map(str, split.images.shape[1:]))}, "
        f"{len(source.classes)} classes, SHA-256 {fingerprint(split)[:16]}, {where}"
        for kind, split in (("train", source.train), ("test", source.test))
    ]


def reproductions(arguments: Sequence[str]) -> None:
    """Published figures beside what runs gave.

    list                      the experiments of all published cells
    collect <run folder> …    measures finished runs anew and notes them in docs/results
    page                      writes docs/reproductions.md from docs/results
    """
    parser = argparse.ArgumentParser(
        "reproductions", description=reproductions.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("list", "collect", "page"))
    parser.add_argument("folders", nargs="*", type=Path, help="run folders, or folders that hold some")
    options = parser.parse_args(arguments)
    from litdistill.benchmarks import published_tables
    from litdistill.benchmarks import reproductions as figures
    from litdistill.report.tables import runs

    if options.what == "list":
        published = published_tables.published()
        for name in sorted({*published, *published_tables.experiments()}):
            print(f"experiment={name:<50} {published[name].value if name in published else ''}")
    elif options.what == "collect":
        for folder, _ in runs(options.folders):
            print(f"{folder.name}: {figures.collect(folder)}")
    else:
        write_text("docs/reproductions.md", figures.page())
        print("Written to docs/reproductions.md")


def _warn(findings: Mapping[str, str]) -> None:
    """Prints what is wrong with a student, as the last lines of a command."""
    for text in findings.values():
        terminal.stdout(140).print(f"[bold yellow]Warning:[/] {escape(text)}", highlight=False)
