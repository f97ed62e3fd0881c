"""Defaults of options as files of Hydra's: ``/options/<dotted path>`` in a defaults list is what Python says.

The path names a class of `w2sg.config.option.Options` or a function that takes options, in w2sg or anywhere else::

    defaults:
      - /options/w2sg.methods.cong.cong@_here_
      - _self_

So a key can be typed whether or not a file of ``conf/`` lists it. Nothing is imported but what a run composes.

A method, a loss, a dataset, a decoder or a judge from outside needs no file at all: ``method=mine.distil`` chooses the
function ``distil`` of the module ``mine``, with its defaults.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from w2sg.config import renamed
from w2sg.config.option import MISSING, Options, defaults_of, options_class
from w2sg.config.plugins import CONF, resolve
from w2sg.errors import UserError

GROUP = "options"
CODE = {"method": 1, "loss": 3, "dataset": 0, "decoder": 0, "judge": 1}  # groups, and what we supply to a call

PACKAGES = {"judge": "method.judge"}  # where the choices of a group stand, if not under its name


def is_code(group: str, choice: str) -> bool:
    """Whether a choice is the dotted path of code, as ``mine.distil``, and no file's name, as ``llama3.1-8b``."""
    return group in CODE and "." in choice and all(part.isidentifier() for part in choice.split("."))


def node_of(group: str, path: str) -> dict[str, Any]:
    """What stands in a configuration for a dotted path: the target, where it is a choice, and its defaults.

    Raises:
        UserError: there is no such thing.
    """
    thing = resolve(path)
    if not callable(thing):
        raise UserError(f"{path} is not callable; name a function or a class")
    if group == "decoder" and not (inspect.isclass(thing) and issubclass(thing, Options) and hasattr(thing, "write")):
        kind = f"a kind of {thing.__base__.__name__}" if inspect.isclass(thing) else "a function"
        raise UserError(
            f"{path} is {kind}, so no decoder is named; name a class that inherits from w2sg.decoding.decoders.Decoder"
        )
    if group == GROUP and inspect.isclass(thing):
        return defaults_of(thing)
    defaults = defaults_of(thing, CODE.get(group, 1))
    if group == "dataset":
        from w2sg.config.data_schema import DatasetConfig

        defaults = defaults_of(DatasetConfig) | {"name": path.rpartition(".")[2]} | defaults
    if inspect.isclass(thing):  # they are made with their options, and not called once more
        defaults.pop("_partial_", None)
    if group == "decoder" and defaults.get("kind") == MISSING:
        del defaults["kind"]  # nobody is to type it: the decoders say what is missing in the class
    return {**defaults, "_target_": path}


def with_judge(node: dict[str, Any]) -> dict[str, Any]:
    """A method's node that chooses the kind of judge which is the default of its option ``judge``.

    Raises:
        UserError: the default has options of its own, which another choice of judge could not be rid of.
    """
    options = options_class(resolve(node["_target_"]))
    judge = options.model_fields["judge"].default if options is not None and "judge" in options.model_fields else None
    if not isinstance(judge, Options):
        return node
    if judge != type(judge)():
        raise UserError(f"{node['_target_']}: its default judge has options; give {type(judge).__name__}() alone")
    return {"defaults": ["_self_", {"override /judge@_global_.judge": judge.kind}], **node}


def with_defaults(group: str, name: str, content: dict[str, Any]) -> dict[str, Any]:
    """A user's file without a defaults list, with the defaults of the ``_target_`` that it names, or of all models.

    Of what cannot be used there are none: the check of the whole configuration says what is wrong with it.

    Args:
        name: of the file, which names the rows of a dataset.
    """
    target = content.get("_target_")
    if group == "model" and "defaults" not in content and not name.startswith("_"):
        return {"defaults": ["_base", "_self_"], **content}
    if group not in CODE or "defaults" in content or not isinstance(target, str):
        return content
    try:
        node = node_of(group, target)
        if group == "method" and "judge" not in content:
            node = with_judge(node)
    except UserError:
        node = {}
    names = {"name": name} if group == "dataset" else {}
    return {**node, **names, **content}


class Defaults(ConfigSource):
    """What stands below ``options/`` and, by its dotted path, in groups of code: defaults of what has them."""

    @staticmethod
    def scheme() -> str:
        return GROUP

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") == GROUP

    def is_config(self, config_path: str) -> bool:
        group, _, path = config_path.partition("/")
        return is_code(group, path) or (group == GROUP and "." in path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []  # they are no choices of a group

    def load_config(self, config_path: str) -> ConfigResult:
        group, _, path = config_path.removesuffix(".yaml").partition("/")
        try:
            node: Any = OmegaConf.create(
                with_judge(node_of(group, path)) if group == "method" else node_of(group, path)
            )
        except UserError as error:
            raise ConfigLoadError(f"{group}: {error}") from error
        return ConfigResult(self.provider, f"{GROUP}://", node, header={"package": PACKAGES.get(group)})


class AddDefaults(SearchPathPlugin):
    """Puts `Defaults` behind every folder of files."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("w2sg-options", f"{GROUP}://")


class FileConfigSource(file_config_source.FileConfigSource):
    """Files in which an option may stand under the name that it had; Hydra knows a source by the name of its class."""

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        content = OmegaConf.to_container(result.config)
        if isinstance(content, dict):
            path = config_path.removesuffix(".yaml")
            content = renamed.file(content, path)
            if not Path(self.path).samefile(CONF):
                group, _, name = path.partition("/")
                result.header["package"] = result.header.get("package") or PACKAGES.get(group)
                content = with_defaults(group, name, content)
            result.config = OmegaConf.create(content)
        return result


def register_defaults() -> None:
    """Offer ``/options/<dotted path>`` to whatever Hydra composes from now on; more than once does nothing."""
    for plugin in (Defaults, AddDefaults):
        Plugins.instance().register(plugin)
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource
