"""Writes the student of a finished run in a format to ship, checks it in its own runtime, and adds it to the manifest.

python scripts/export.py run=runs/digits/<stamp>                                 student.onnx, takes uint8 images
python scripts/export.py run=runs/digits/<stamp> precision=int8                  student-int8.onnx
python scripts/export.py run=runs/digits/<stamp> format=pt2 preprocessing=false  student-normalised.pt2
python scripts/export.py run=runs/digits/<stamp> verify=true                     checks again what was exported
python -m litdistill.export.predict runs/digits/<stamp>/export/student.onnx image.png   uses it
"""

from omegaconf import DictConfig, OmegaConf

from litdistill.cli import command


@command("export")
def main(cfg: DictConfig) -> None:
    from rich.console import Console

    from litdistill.export.export import check_table, export, verify

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # in a file no line is too long
    data = OmegaConf.create({"data": cfg.data})
    limits = (cfg.tolerance.difference, cfg.tolerance.agreement)
    if cfg.verify:
        console.print(check_table(verify(cfg.run, data, limits, cfg.trust, cfg.allow_code)))
        return
    options = (cfg.format, cfg.precision, cfg.preprocessing, cfg.calibration)
    path, check = export(cfg.run, *options, limits, data, cfg.trust)
    console.print(check_table({path.name: check}))
    if cfg.format == "safetensors" and cfg.preprocessing:
        print("safetensors holds weights alone: the normalisation stands in its metadata, and predict applies it.")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
