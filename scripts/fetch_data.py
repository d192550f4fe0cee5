"""Fetches and verifies a data set ahead of time, for a machine without network say.

    python scripts/fetch_data.py data=mnist data.root=data_files

Then copy `data_files/mnist` to `<data.root>/mnist` there. A data set that is already there is verified again.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from litdistill.cli import command


def describe(name: str, root: str | Path, image_size: int | None = None) -> list[str]:
    """One line per split of a data set, which is fetched first if it is not there."""
    from litdistill.data.fetch import DATASETS, obtain
    from litdistill.data.sources import fingerprint, load

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


@command("fetch_data")
def main(cfg: DictConfig) -> None:
    print("\n".join(describe(cfg.data.name, cfg.data.root, cfg.data.image_size)))


if __name__ == "__main__":
    main()
