"""Which engine runs a model by itself: the one place that chooses, so that no stage names an engine."""

from __future__ import annotations

import json
import logging
from functools import partial

from w2sg.config.engine_schema import EngineConfig
from w2sg.data.table import digest
from w2sg.decoding import vllm
from w2sg.decoding.completions_limits import Kept
from w2sg.decoding.server_engine import ServerEngine
from w2sg.decoding.text_engine import TextEngine
from w2sg.errors import UserError
from w2sg.experiment.context import Context
from w2sg.experiment.keys import key_of
from w2sg.experiment.replies import load_trained
from w2sg.models.export import merged, write_model
from w2sg.models.policy import padding
from w2sg.models.trained import Trained
from w2sg.store.files import remove

log = logging.getLogger(__name__)


def text_engine(run: Context, model: Trained, asked: str | None = None) -> TextEngine | None:
    """What runs a model by itself; None is our own engine in this process. It starts when it is first asked.

    Args:
        model: with ``run.as_trained(source)``, one as it was found.
        asked: a stage's own choice (``decoder.engine``, ``method.sampling.engine``); None is that of the run.

    Raises:
        UserError: the engine that was chosen cannot run the model.
    """
    if (server := _server(run, model)) is not None:
        return server
    config = run.config.engine
    name = asked or config.name
    if name == "transformers":
        return None
    return _vllm(run, model, config if config.name == name else EngineConfig(name=name))


def _vllm(run: Context, model: Trained, config: EngineConfig) -> TextEngine:
    source = model.source
    if reason := vllm.why_not():
        raise UserError(f"engine: vLLM cannot run {model.name}: {reason}; use engine=transformers")
    kept = run.text_engines
    key = json.dumps(["vllm", key_of(run, model), source.spec.max_length, config.model_dump()], sort_keys=True)

    def make() -> TextEngine:
        return vllm.VLLM(
            partial(_folder, run, model),
            None if model.folder is not None or _changed(model) else source.identity.get("revision"),
            source.spec.dtype,
            source.spec.max_length,
            config,
            source.chat.ids.tolist() if padding(source) else None,
            before=partial(kept.alone, key),
            gpu=partial(_gpu, run),
            ranks=run.devices.world,
            remote_code=source.spec.trust_remote_code,
        )

    return kept.get(key, make)


def _server(run: Context, model: Trained) -> TextEngine | None:
    """The server that stands in for a model as it was found; None where none does."""
    options, source = run.config.server, model.source
    role = "judge" if model.name == "judge" else source.role
    if options.url is None or role not in options.roles:
        return None
    if model.folder is not None:
        run.reading.say(f"{model.name} was trained in this run, so it writes here and not on the server (server.url)")
        return None
    run.reading.say(
        f"a server writes as {options.model!r} in place of {model.name}: token ids and counts of replies are what the "
        f"tokenizer of {source.spec.name} makes of their text, and tokens have no log-probabilities"
    )
    key = json.dumps(["server", options.model, source.chat.fingerprint, source.spec.max_length])

    def make() -> TextEngine:
        folder = run.out / "asked" / digest(key)[:16]
        return ServerEngine(
            options, source.chat, source.spec.max_length, lambda: Kept(folder), run.devices.world, run.reading.say
        )

    return run.text_engines.get(key, make)


def _gpu(run: Context) -> int | None:
    device = run.devices.fabric.device
    return (device.index or 0) if device.type == "cuda" else None


def _changed(model: Trained) -> bool:
    """Whether no folder of transformers has the model as it is: with adapters, or unlike its files."""
    source, spec = model.source, model.source.spec
    if model.folder is not None:
        return spec.train == "lora"
    unlike = spec.layers is not None or spec.quantise is not None or spec.random_init
    return unlike or source.gguf is not None or bool(source.inside)


def _folder(run: Context, model: Trained) -> str:
    """Where another engine finds a model. One that no folder has is written beside the run's results, till it ends."""
    if not _changed(model):
        return str(model.saved or model.source.folder)
    folder = run.out / f".{model.name}-whole"

    def write() -> None:
        remove(folder)
        log.info("%s: written as a folder of its own, adapters merged, for the engine that runs it", model.name)
        write_model(merged(load_trained(run, model), model.name), folder)
        run.text_engines.at_end.append(partial(remove, folder))

    run.devices.first(write)
    return str(folder)
