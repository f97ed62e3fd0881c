"""The one step that pyproject.toml cannot say: conf/ and the pages of docs/ are carried as w2sg/conf and w2sg/docs.

An editable installation reads both where they are.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = [
    *Path("conf").rglob("*.yaml"),
    *(file for file in Path("docs").rglob("*") if file.suffix in (".md", ".yaml", ".ipynb")),
]


class WithConf(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            for name in ("conf", "docs"):  # a file that was removed since an earlier build
                shutil.rmtree(Path(self.build_lib, "w2sg", name), ignore_errors=True)
            for file in CARRIED:
                place = Path(self.build_lib, "w2sg", file)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)

    def get_outputs(self, include_bytecode=True):
        places = [] if self.editable_mode else [Path(self.build_lib, "w2sg", file) for file in CARRIED]
        return [*super().get_outputs(include_bytecode), *map(str, places)]


setup(cmdclass={"build_py": WithConf})
