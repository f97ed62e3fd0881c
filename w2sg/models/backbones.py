"""What an architecture of transformers needs before it can be read here, whatever it is called there.

A decoder is asked for its final states alone: its blocks are counted and cut, models that also see or hear are read
for their text, and architectures without a head for scoring get one.
"""

from __future__ import annotations

import copy
import logging
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from w2sg.errors import UserError
from w2sg.models.exact import asked, ordinary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
# names of a text model's weights inside of one that also sees or hears, as new and old files have them
INSIDE = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^model\.text_model\.": "model.",
    r"^text_model\.model\.": "model.",
    r"^(language_model|text_model)\.lm_head\.": "lm_head.",
}


def depth_of(config: PretrainedConfig, role: str, name: str) -> int:
    """How many blocks a model has.

    Raises:
        UserError: its configuration does not say.
    """
    for key in DEPTH:
        depth = getattr(config, key, None)
        if isinstance(depth, int) and not isinstance(depth, bool) and depth > 0:
            return depth
    raise UserError(
        f"{role}.name: the configuration of {name} ({type(config).__name__}) does not say how many layers it has; "
        "only decoders of text are supported here"
    )


def cut_to(config: PretrainedConfig, depth: int) -> None:
    """Keep the first blocks alone; lists with one entry a block are cut with them. The whole model stays as it is."""
    full = next((getattr(config, key) for key in DEPTH if isinstance(getattr(config, key, None), int)), depth)
    if depth == full:
        return
    if isinstance(kinds := getattr(config, "attention_types", None), list):  # GPT-Neo's, of which the rest is made
        flat = [kind for group, count in kinds for _ in range(count) for kind in group]
        config.attention_types = [[[kind], 1] for kind in flat[:depth]]
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == full and key != "attention_types":
            try:
                setattr(config, key, value[:depth])
            except AttributeError:  # made from others
                continue
    key = next(key for key in DEPTH if isinstance(getattr(config, key, None), int))
    setattr(config, key, depth)


def set_dropout(config: PretrainedConfig, p: float) -> None:
    """Set every dropout rate that the architecture's configuration knows."""
    for key in config.to_dict():
        if re.search(r"(^|_)(dropout|pdrop|dropout_prob|layerdrop)$", key):
            setattr(config, key, p)


def weights_in(config: PretrainedConfig, depth: int) -> int:
    """How many weights a language model of this configuration has with its first blocks alone; none are made."""
    config = copy.deepcopy(config)
    cut_to(config, depth)
    known = config.to_json_string()
    if known not in _WEIGHTS:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        _WEIGHTS[known] = sum(weight.numel() for weight in model.parameters())  # what is tied counts once
    return _WEIGHTS[known]


_WEIGHTS: dict[str, int] = {}


# ---------------------------------------------------------------------------------------------------------------------
# What can be read at all
# ---------------------------------------------------------------------------------------------------------------------


def text_part(config: PretrainedConfig, role: str, name: str) -> tuple[PretrainedConfig, list[str]]:
    """The configuration of a model's decoder of text, and what has to be said of it.

    Raises:
        UserError: it has none.
    """
    from transformers.models.auto import modeling_auto as auto

    kind = getattr(config, "model_type", None) or type(config).__name__
    no = f"{role}.name: {name} is no decoder of text"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{no}: {kind} is an encoder with a decoder; choose a decoder-only language model")
    text = config.get_text_config(decoder=True)
    notes = []
    if text is not config:
        if type(text) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
            _offer_writer(auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), text)
        if type(text) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(f"{no}: the text part of {kind} has no language model of its own; choose another model")
        text = copy.deepcopy(text)
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
        for key in ("quantization_config", "dtype"):
            if getattr(text, key, None) is None and getattr(config, key, None) is not None:
                setattr(text, key, getattr(config, key))
        notes.append(f"{role}: of {name} ({kind}) the text model is used alone; what it sees or hears is not read")
    if text.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text, "is_decoder", False):
        raise UserError(f"{no}: {kind} is an encoder that sees texts in both directions; choose a language model")
    both_ways = getattr(text, "use_bidirectional_attention", None)
    if both_ways in (True, "all") or text.model_type in ("xlnet", "bert-generation"):
        raise UserError(f"{no}: its attention looks in both directions; choose a language model")
    if getattr(text, "quantization_config", None) is not None:
        how = text.quantization_config
        how = how.get("quant_method", "?") if isinstance(how, dict) else getattr(how, "quant_method", "?")
        raise UserError(
            f"{role}.name: the weights of {name} are quantised ({getattr(how, 'value', how)}), which cannot be trained "
            f"or cut here; take the model that it was made from, with {role}.dtype=bfloat16 where memory is short"
        )
    return text, notes


def _offer_writer(whole: type | None, text: PretrainedConfig) -> None:
    """Tell transformers' auto classes of a text model that they know by the configuration of the whole alone."""
    from transformers import AutoModel, AutoModelForCausalLM

    if whole is None or whole.config_class is not type(text):
        return
    with torch.device("meta"):
        model = whole(copy.deepcopy(text))
    name_body(model)
    AutoModelForCausalLM.register(type(text), whole, exist_ok=True)
    AutoModel.register(type(text), type(model.base_model), exist_ok=True)


def positions_of(config: PretrainedConfig) -> tuple[int | None, bool]:
    """The positions that a model was made for, and whether there are no others (a table, and no rotation or slope)."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(positions, int) or positions <= 0:
        return None, False
    open_ended = getattr(config, "rope_parameters", None) or getattr(config, "alibi", False)
    return positions, not open_ended and config.model_type in TABLES


# architectures that look positions up in a table, which ends
TABLES = frozenset(
    ("gpt2", "gpt-sw3", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "opt", "openai-gpt", "biogpt", "ctrl", "xglm")
)


def check_positions(config: PretrainedConfig, max_length: int, role: str, name: str) -> list[str]:
    """What has to be said where texts may be longer than a model was made for.

    Raises:
        UserError: it has no positions there.
    """
    positions, no_more = positions_of(config)
    if positions is None or max_length <= positions:
        return []
    if no_more:
        raise UserError(
            f"{role}.max_length: {max_length} is more than the {positions} positions of {name}; set "
            f"{role}.max_length={positions} or less"
        )
    return [
        f"{role}: max_length={max_length} is more than the {positions} positions that {name} was made for; longer "
        "texts are read all the same"
    ]


def check_vocabulary(tokenizer: Any, config: PretrainedConfig, role: str, name: str) -> None:
    """Refuse a tokenizer with tokens that the model has no embeddings for; a token for filling alone is never read.

    Raises:
        UserError: there are such tokens.
    """
    rows = getattr(config, "vocab_size", None)
    if rows is None or len(tokenizer) <= rows:
        return
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    if tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        beyond.pop(tokenizer.pad_token_id, None)
    if beyond:
        shown = ", ".join(beyond[i] for i in sorted(beyond)[:3])
        raise UserError(
            f"{role}.name: the tokenizer of {name} has {len(tokenizer)} tokens and the model rows for {rows} of them, "
            f"so that it cannot read {shown}; take the model's own tokenizer, or resize its embeddings "
            "(resize_token_embeddings) and train them"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------


def offer_scorer(config: PretrainedConfig) -> None:
    """See to it that transformers has a model with a ``score`` layer for this architecture.

    Where it has none (Granite, Cohere, LFM2, Mamba, ...) it is the body with a linear layer, as transformers' own are.
    A folder of such a model is read back here; transformers alone reads its body.

    Raises:
        UserError: its body is an encoder with a decoder, as BART's is, of which a language model is the half.
    """
    from transformers import AutoModelForSequenceClassification as Auto
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto import modeling_auto as auto

    known = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if known is not None and _has_score(known):
        return
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal is not None and type(config) in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{causal.__name__} is the decoder of a model that has an encoder, too, and transformers has no body for "
            "it alone on which a head could stand; choose a model that is a decoder alone"
        )
    if causal is None or auto.MODEL_MAPPING.get(type(config), None) is None:
        return  # one of its own code, say: the auto class knows it, or says why not
    parents = [cls for cls in causal.__mro__ if issubclass(cls, PreTrainedModel) and cls is not PreTrainedModel]
    parent = next(cls for cls in reversed(parents) if cls.__name__.endswith(("PreTrainedModel", "Preln")))
    name = re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", causal.__name__)
    prefix = causal.base_model_prefix
    options = {
        "base_model_prefix": prefix if prefix in _names(causal) else "model",
        "config_class": type(config),
        # of a class from elsewhere transformers would leave computed buffers (Falcon-H1's) as memory happened to be
        "__module__": causal.__module__,
    }
    made = type(f"{name}ForSequenceClassification", (GenericForSequenceClassification, parent), options)
    Auto.register(type(config), made, exist_ok=True)


def _has_score(model: type) -> bool:
    return "score" in _names(model)


def _names(model: type) -> tuple[str, ...]:
    """What the making of a model speaks of, its parts among them."""
    return getattr(model.__init__, "__wrapped__", model.__init__).__code__.co_names


def name_body(model: nn.Module) -> None:
    """Let ``base_model`` be the body of a model that keeps it under another name than its architecture says (Llama 4
    without pictures), in place.
    """
    if model.base_model is model and isinstance(getattr(model, "model", None), nn.Module):
        model.base_model_prefix = "model"


def softcap_of(config: PretrainedConfig) -> float | None:
    """c where a language model bends its logits by c tanh(x / c)."""
    names = ("final_logit_softcapping", "logits_soft_cap")  # Gemma; Recurrent Gemma
    return next((cap for name in names if (cap := getattr(config, name, None))), None)


def named_scales(config: PretrainedConfig) -> list[float]:
    """Numbers in a configuration by which logits are multiplied, or divided."""
    named = [
        float(value)
        for key, value in config.to_dict().items()
        if re.search(r"(logit|lm_head).*(scal|mult)", key) and isinstance(value, int | float) and value not in (0, 1)
    ]
    if base := getattr(config, "dim_model_base", None):
        named.append(base / config.hidden_size)
    return named


@torch.no_grad()
def logit_scale(model: nn.Module) -> float:
    """The number that a language model multiplies its logits by (Granite, Cohere, Falcon-H1, MiniCPM), 1 for none.

    The configuration names it, but not whether it multiplies or divides; that is asked of the model itself.
    """
    config, named = model.config, named_scales(model.config)
    output = model.get_output_embeddings()
    if not named or output is None:
        return 1.0
    tokens = torch.from_numpy(ordinary(len(output.weight), 5)).to(output.weight.device)[None]

    def both() -> tuple[Tensor, Tensor]:
        states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        ours = output(states.to(output.weight.dtype)).double()
        return ours, model(input_ids=tokens, use_cache=False).logits.double()

    (ours, theirs), _ = asked(model, both)
    if cap := softcap_of(config):
        theirs = torch.atanh((theirs / cap).clamp(-0.999, 0.999)) * cap
    measured = float((ours * theirs).sum() / ours.square().sum())
    candidates = [1.0, *named, *(1.0 / value for value in named)]
    best = min(candidates, key=lambda value: abs(value - measured))
    return best if abs(best - measured) <= 0.02 * abs(measured) else 1.0


def recompute(model: Any) -> None:
    """Let blocks compute their activations again in the backward pass; transformers below 5.23 has another name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
