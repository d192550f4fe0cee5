"""Puts conf/, which lies at the top of the repository, beside the modules of the wheel: litdistill/conf."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """An editable install reads conf/ where it is."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in Path("conf").rglob("*.yaml"):
            target = Path(self.build_lib, "litdistill", source)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithConf})
