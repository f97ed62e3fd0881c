"""Defaults of options as files of Hydra's: ``/options/<dotted path>`` in a defaults list is what Python says.

The path names a class of `w2sg.config.option.Options` or a function that takes options, in w2sg or anywhere else::

    defaults:
      - /options/w2sg.methods.cong.cong@_here_
      - _self_

So a key can be typed whether or not a file of ``conf/`` lists it. Nothing is imported but what a run composes.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from w2sg.config.option import defaults_of

GROUP = "options"


class Defaults(ConfigSource):
    """What stands below ``options/``: defaults by the dotted path of what has them."""

    @staticmethod
    def scheme() -> str:
        return GROUP

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") == GROUP

    def is_config(self, config_path: str) -> bool:
        group, _, path = config_path.partition("/")
        return group == GROUP and "." in path

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []  # they are no choices of a group

    def load_config(self, config_path: str) -> ConfigResult:
        path = config_path.partition("/")[2].removesuffix(".yaml")
        try:
            source = pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigLoadError(f"{GROUP}/{path}: there is no {path} ({error})") from error
        node: Any = OmegaConf.create(defaults_of(source))
        return ConfigResult(self.provider, f"{GROUP}://", node, header={"package": None})


class AddDefaults(SearchPathPlugin):
    """Puts `Defaults` behind every folder of files."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("w2sg-options", f"{GROUP}://")


def register_defaults() -> None:
    """Offer ``/options/<dotted path>`` to whatever Hydra composes from now on; more than once does nothing."""
    for plugin in (Defaults, AddDefaults):
        Plugins.instance().register(plugin)
