"""Writes the student of a finished run in a format to ship, checks it in its own runtime, and adds it to the manifest.

python scripts/export.py run=runs/digits/<stamp>                                 student.onnx, takes uint8 images
python scripts/export.py run=runs/digits/<stamp> precision=int8                  student-int8.onnx
python scripts/export.py run=runs/digits/<stamp> format=pt2 preprocessing=false  student-normalised.pt2
python scripts/export.py run=runs/digits/<stamp> verify=true                     checks again what was exported
python -m litdistill.predict runs/digits/<stamp>/export/student.onnx image.png   uses it
"""

from omegaconf import DictConfig, OmegaConf

from litdistill.runtime import command


@command("export")
def main(cfg: DictConfig) -> None:
    from rich import print as show

    from litdistill.export import check_table, export, verify

    data = OmegaConf.create({"data": cfg.data})
    limits = (cfg.tolerance.difference, cfg.tolerance.agreement)
    if cfg.verify:
        show(check_table(verify(cfg.run, data, limits, cfg.trust)))
        return
    path, check = export(cfg.run, cfg.format, cfg.precision, cfg.preprocessing, cfg.calibration, limits, data)
    show(check_table({path.name: check}))
    show(f"Written to {path}")


if __name__ == "__main__":
    main()
