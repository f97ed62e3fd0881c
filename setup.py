"""The one step that pyproject.toml cannot say: conf/ of this folder is carried as w2sg/conf.

An editable installation reads conf/ where it is.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONF = Path("conf")


class WithConf(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            place = Path(self.build_lib, "w2sg", "conf")
            shutil.rmtree(place, ignore_errors=True)  # a file that was removed since an earlier build
            shutil.copytree(CONF, place)

    def get_outputs(self, include_bytecode=True):
        places = [] if self.editable_mode else [Path(self.build_lib, "w2sg", file) for file in CONF.rglob("*.yaml")]
        return [*super().get_outputs(include_bytecode), *map(str, places)]


setup(cmdclass={"build_py": WithConf})
