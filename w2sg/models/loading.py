"""Models of transformers: loaded with their weights looked at, with adapters or without, and saved."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from w2sg.errors import UserError
from w2sg.models.activations import in_one_kernel
from w2sg.models.attention import implementation
from w2sg.models.backbones import INSIDE, cut_to, name_body, offer_scorer, set_dropout
from w2sg.models.gguf_files import dequantised
from w2sg.models.low_bits import hold_in_bits
from w2sg.models.once import built, planned, together, told
from w2sg.models.quantise import round_weights
from w2sg.models.rope import rows_by_themselves
from w2sg.models.source import Source
from w2sg.models.spread import Spread, dispatch, say_places, spread
from w2sg.models.tensor_parallel import count_parts, mark, plan_of
from w2sg.models.unreadable import quiet_loading, reading
from w2sg.models.weights import check_finite, check_loaded, check_targets, fill

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from w2sg.config.model_schema import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# what is missing or of another shape is looked at by us, and not raised with a word that names nothing
_REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def load_transformer(
    auto: Any,
    source: Source,
    saved: Path | None = None,
    depth: int | None = None,
    frozen: bool = False,
    **settings: Any,
) -> tuple[nn.Module, list[str]]:
    """A transformers model of a role, without adapters, in the dtype that was asked for.

    Args:
        auto: the auto class that says which head.
        saved: folder of a finished stage to load in place of the pretrained weights; an adapter folder is left to
            `with_lora`.
        depth: use this many blocks only; default is ``spec.layers`` or all.
        frozen: it is never trained, so that it may stand on several devices (``spec.device_map``).
        settings: of the configuration, for instance ``num_labels``.

    Returns:
        The model, and the names of weights that the checkpoint did not have and that were drawn at random. Where ranks
        share a model (`w2sg.models.once`), one of them has its weights, and all know what was missing.
    """
    spec, missing = source.spec, list[str]()
    config = copy.deepcopy(source.config)
    cut_to(config, depth or source.depth)
    for key, value in settings.items():
        setattr(config, key, value)
    set_dropout(config, spec.dropout)
    if "num_labels" in settings:
        offer_scorer(config)
    options: dict[str, Any] = {
        "dtype": DTYPES[spec.dtype],
        "attn_implementation": implementation(config, spec.attention),
        "trust_remote_code": spec.trust_remote_code,
    }
    found = saved if spec.train != "lora" else None
    apart = frozen and spec.device_map is not None and not planned()
    if apart and saved is not None and found is None:
        raise UserError(
            f"{source.role}.device_map: adapters cannot be added to a model that stands on several devices; merge them "
            f"(export=RUN), and name the folder, or set {source.role}.device_map=null"
        )
    where: list[Spread] = []

    def placed() -> nn.Module:
        """With each part in its place as it is read, or, where weights are changed first, whole at first."""
        if spec.load or spec.quantise or spec.random_init or source.gguf:
            model = whole()
            if spec.load is not None:
                hold_in_bits(model, spec.load)
            where.append(spread(model, spec.device_map, spec.max_memory, source.role))
            if spec.load is not None and where[0].away:
                raise UserError(
                    f"{source.role}.device_map: weights in {spec.load} have to stay on GPUs, and {where[0].words()} "
                    f"blocks would be; use more GPUs, or {source.role}.load=null"
                )
        else:
            with torch.device("meta"):
                where.append(spread(bare(), spec.device_map, spec.max_memory, source.role))
            options.update(device_map=where[0].places, offload_folder=where[0].folder and where[0].folder.name)
            model = whole()
        dispatch(model, where[0])
        return model

    def whole() -> nn.Module:
        with quiet_loading(bars=source.gguf is not None), reading(source.role, spec.name, "cannot be loaded"):
            model = _with_weights(auto, source, found, config, options, depth, missing)
        if not spec.random_init or saved is not None:
            check_finite(model, source.role, spec.name)
        if spec.quantise is not None and found is None:
            round_weights(model, spec.quantise)
        return model

    def bare() -> nn.Module:
        with quiet_loading(), reading(source.role, spec.name, "cannot be loaded"):
            return auto.from_config(config if found is None or planned() else _config_in(found, spec), **options)

    if apart:
        model = placed()
        say_places(
            model, f"{source.role}: of {len(where[0].blocks)} blocks of {spec.name}, {where[0].words()}", where[0]
        )
    else:
        model = built(whole, bare, spec.load is not None)
        if spec.load is not None:
            hold_in_bits(model, spec.load)
    if frozen and planned():
        model.device_map_wanted = spec.device_map
    if frozen and spec.tp_plan is not None and together() > 1:
        if spec.train == "lora" and saved is not None:
            raise UserError(
                f"{source.role}.tp_plan: adapters cannot be added to a model that is cut over devices; merge them "
                f"(export=RUN), and name the folder, or set {source.role}.tp_plan=null"
            )
        mark(model, plan_of(model.config, source.role, together()))
        model.placed_in_words = f"{source.role}: the layers of {spec.name} are cut over {together()} processes"
        if planned():
            count_parts(model, together())
    name_body(model)
    rows_by_themselves(model)
    in_one_kernel(model)
    return model, told(lambda: missing)


def _config_in(saved: Path, spec: ModelConfig) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(saved, trust_remote_code=spec.trust_remote_code)


def _with_weights(
    auto: Any,
    source: Source,
    saved: Path | None,
    config: PretrainedConfig,
    options: dict[str, Any],
    depth: int | None,
    missing: list[str],
) -> nn.Module:
    """A model as its files have it, or as it is drawn; names of weights that they lack are added to ``missing``."""
    spec = source.spec
    if saved is not None:
        model, loaded = auto.from_pretrained(saved, **_REPORTED, **options)
        check_loaded(model, role=source.role, name=str(saved), **_key_lists(loaded))
        return model
    if spec.random_init:
        return auto.from_config(config, **options)
    if source.gguf:
        model, drawn = _from_gguf(auto, source, config, options)
        missing += drawn
        return model
    inside = {"key_mapping": INSIDE} if source.inside else {}
    model, loaded = auto.from_pretrained(
        source.folder, config=config, revision=source.identity.get("revision"), **inside, **_REPORTED, **options
    )
    if source.inside:  # else a trained model would be saved under the names of the whole one
        vars(model).pop("_weight_conversions", None)
    cut = None if (depth or source.depth) == source.full_depth else depth or source.depth
    missing += check_loaded(
        model, role=source.role, name=spec.name, depth=cut, inside=source.inside, **_key_lists(loaded)
    )
    return model


def _key_lists(loaded: dict[str, Any]) -> dict[str, Any]:
    return {name: loaded.get(f"{name}_keys") or () for name in ("missing", "unexpected", "mismatched")}


def _from_gguf(
    auto: Any, source: Source, config: PretrainedConfig, options: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    """transformers refuses to save a model that was read from GGUF, so its weights move into a fresh one."""
    from transformers.initialization import no_init_weights

    spec = source.spec
    try:
        read = dequantised(source.folder, source.gguf, DTYPES[spec.dtype], spec.trust_remote_code)
    except UserError as error:  # kept for all roles, so that it names none
        raise UserError(f"{source.role}.name: {error}") from error
    with no_init_weights():
        model = auto.from_config(config, **options)
    missing = sorted(model.state_dict().keys() - read.keys())
    if missing:  # a head that the file does not have is drawn, and with it all else
        model = auto.from_config(config, **options)
        missing = check_loaded(model, missing, (), (), source.role, spec.name)
    fill(model, read, source.role, spec.name)
    return model, missing


def save_transformer(model: nn.Module, folder: Path) -> None:
    """Write an ordinary ``save_pretrained`` folder; of a model with adapters, the adapters alone."""
    # peft would look for the base's configuration, on the hub if need be, to see whether tokens were added: none are
    options = {"save_embedding_layers": False} if hasattr(model, "get_base_model") else {}
    with quiet_loading(bars=True):
        model.save_pretrained(folder, **options)


def with_lora(model: nn.Module, source: Source, saved: Path | None, task: Any, trainable: bool = False) -> nn.Module:
    """The model with fresh adapters, or with those of a finished stage.

    Args:
        task: peft's task type.
        trainable: whether saved adapters are trained on.

    Raises:
        UserError: layers that are to have adapters are not there, or saved adapters do not fit.
    """
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

    spec, role = source.spec, source.role
    if saved is not None and not planned():

        def whole() -> nn.Module:
            with quiet_loading(), reading(role, str(saved), "has adapters that do not fit"), warnings.catch_warnings():
                warnings.filterwarnings("error", message="Found missing adapter keys")
                return PeftModel.from_pretrained(model, saved, is_trainable=trainable)

        def bare() -> nn.Module:
            config = PeftConfig.from_pretrained(saved)
            config.inference_mode = not trainable
            return get_peft_model(model, config)

        return built(whole, bare, spec.load is not None)
    lora = spec.lora
    check_targets(model, lora.targets, role, spec.name)
    config = LoraConfig(
        task_type=task,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=lora.targets,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's layers
    )

    def adapted() -> nn.Module:
        with reading(role, spec.name, "takes no adapters", "name layers that it has in {role}.lora.targets"):
            return get_peft_model(model, config)

    return built(adapted, adapted, spec.load is not None)
