"""What stays the same while tests run is worked out once in a process: shipped files put together, installed packages.

Nothing stands in for anything: what is remembered is what Hydra and Python gave when they were first asked.
"""

import copy
import functools
import gc
import importlib.metadata
import io
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList
from omegaconf import OmegaConf

from w2sg.config.defaults_source import is_code
from w2sg.config.plugins import CONF

SOURCES = {"pkg", "structured", "options"}  # of Hydra and w2sg, beside the files of conf/


class Chosen(NamedTuple):
    """Files that a command line chooses.

    Attributes:
        key: what was typed of them. files: in the order in which they are put together.
    """

    key: tuple[str, ...]
    files: list[Any]


@functools.cache
def remember() -> None:
    """From now on this process remembers."""
    gc.set_threshold(20_000, 20, 20)  # an eighth of the time of small runs; a file's garbage is collected after it
    _files()
    usual, texts = OmegaConf.load, {}

    def load(file):
        if isinstance(file, (str, Path)):
            return usual(file)
        text = file.read()
        if text not in texts:
            texts[text] = usual(io.StringIO(text))
        return copy.deepcopy(texts[text])

    OmegaConf.load = load
    # Lightning asks for them with every trainer, and all that is installed is read
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


def _files() -> None:
    """The same choice of shipped files is put together once, whatever is set of their keys."""
    lists: dict[tuple[str, ...], DefaultsList] = {}
    configs: dict[tuple[str, ...], Any] = {}
    usual, usual_config = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list

    def create_defaults_list(repo, config_name, overrides_list, **options):
        choices, keys = [], []
        for override in (o for o in overrides_list if not o.is_sweep_override()):
            is_choice = repo.group_exists(override.key_or_group) and not isinstance(override.value(), dict)
            (choices if is_choice else keys).append(override)
        shipped = all(source.scheme() in SOURCES or source.path == str(CONF) for source in repo.get_sources())
        if not shipped or any(is_code(o.key_or_group, str(o.value())) for o in choices):
            return usual(repo, config_name, overrides_list, **options)  # a user's file or code may change
        key = (config_name, str(options), *(override.input_line for override in choices))
        if key not in lists:
            lists[key] = usual(repo, config_name, choices, **options)
        found = copy.copy(lists[key])
        found.defaults, found.config_overrides = Chosen(key, lists[key].defaults), keys
        return found

    def config_of(loader, defaults, repo):
        if not isinstance(defaults, Chosen):
            return usual_config(loader, defaults, repo)
        if defaults.key not in configs:
            configs[defaults.key] = usual_config(loader, defaults.files, repo)
        return copy.deepcopy(configs[defaults.key])

    config_loader_impl.create_defaults_list = create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = config_of
