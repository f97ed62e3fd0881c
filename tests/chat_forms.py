"""Chat templates in the shapes that models have, and small tokenizers of each kind."""

from conftest import WORDS

SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<think>",
    "</think>", "<|User|>", "<|Assistant|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|start|>", "<|channel|>",
    "<|message|>", "<|return|>", "[THINK]", "[/THINK]",
]  # fmt: skip
GENERATE = "{% if add_generation_prompt %}"
LOOP = "{% for m in messages %}"
CHATML = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = GENERATE + "<|im_start|>assistant\n{% endif %}"
USER = "{% if m.role == 'user' %}"
EMPTY = "<think>\n\n</think>\n\n"

# name -> template, the end of a turn (None: eos_token)
TEMPLATES = {
    "chatml": (CHATML + ASK, "<|im_end|>"),
    "llama3": (
        "{{ bos_token }}" + LOOP + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        "<|eot_id|>{% endfor %}" + GENERATE + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "llama3_date": (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ bos_token }}"
        "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}<|eot_id|>" + LOOP +
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        + GENERATE + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "llama2": (
        LOOP + USER + "{{ bos_token }}[INST] {{ m.content | trim }} [/INST]{% elif m.role == 'assistant' %}"
        " {{ m.content | trim }} {{ eos_token }}{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}",
        None,
    ),
    "mistral": (
        "{{ bos_token }}" + LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}" + USER +
        "[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        None,
    ),
    "mistral_tekken": (
        "{{ bos_token }}" + LOOP + USER + "[INST]{{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
        "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        None,
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + LOOP + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + GENERATE + "<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "phi3": (
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}" + GENERATE
        + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "phi4_mini": (
        LOOP + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}" + GENERATE
        + "<|assistant|>{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "zephyr": (
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% if loop.last and add_generation_prompt %}"
        "<|assistant|>\n{% endif %}{% endfor %}",
        None,
    ),
    "vicuna": (
        "A chat.{% for m in messages %}" + USER + " USER: {{ m.content }}{% elif m.role == 'assistant' %}"
        " ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}" + GENERATE + " ASSISTANT:{% endif %}",
        None,
    ),
    "deepseek_v2": (
        "{{ bos_token }}" + LOOP + USER + "User: {{ m.content }}\n\n{% elif m.role == 'assistant' %}"
        "Assistant: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}" + GENERATE + "Assistant:{% endif %}",
        None,
    ),
    "command_r": (
        "{{ bos_token }}" + LOOP + "<|START_OF_TURN_TOKEN|>" + USER + "<|USER_TOKEN|>{% else %}<|CHATBOT_TOKEN|>"
        "{% endif %}{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}" + GENERATE
        + "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "granite": (
        "{% set today = strftime_now('%B %d, %Y') %}<|start_of_role|>system<|end_of_role|>Today is {{ today }}."
        "<|end_of_text|>\n" + LOOP + "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
        "{% endfor %}" + GENERATE + "<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        "<|end_of_text|>",
    ),
    "olmo": (
        "{{ bos_token }}" + LOOP + "<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% if not loop.last %}\n{% endif %}{% endfor %}" + GENERATE + "\n<|assistant|>\n{% endif %}",
        None,
    ),
    "newline_before_end": (
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}\n<|end|>\n{% endfor %}" + GENERATE + "<|assistant|>\n{% endif %}",
        "<|end|>",
    ),
    "parts": (
        LOOP + "<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + ASK,
        "<|im_end|>",
    ),
    "parts_of_users": (
        LOOP + "<|im_start|>{{ m.role }}\n" + USER + "{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}"
        "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + ASK,
        "<|im_end|>",
    ),
    "qwen3": (
        LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}{% set c = m.content %}"
        "{% if '</think>' in c %}{{ '<think>\n' + c.split('</think>')[0].split('<think>')[-1].strip('\n') + "
        "'\n</think>\n\n' + c.split('</think>')[-1].lstrip('\n') }}{% else %}" + EMPTY + "{{ c }}{% endif %}"
        "{% else %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}<|im_end|>\n{% endfor %}"
        + GENERATE + "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
        + EMPTY + "{% endif %}{% endif %}",
        "<|im_end|>",
    ),
    "gpt_oss": (
        LOOP + "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
        "{{ m.content }}{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
        "{% endfor %}" + GENERATE + "<|start|>assistant{% endif %}",
        "<|return|>",
    ),
    "no_prompt": (CHATML, "<|im_end|>"),
    "trimmed": (
        LOOP + "<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}" + GENERATE + "<|assistant|>\n{% endif %}",
        "<|end|>",
    ),
}  # fmt: skip
# templates whose prompts open a thought that dialogues do not have
OPENING = {
    "r1": (
        "{{ bos_token }}" + LOOP + USER + "<|User|>{{ m.content }}{% elif m.role == 'assistant' %}<|Assistant|>"
        "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}" + GENERATE
        + "<|Assistant|><think>\n{% endif %}"
    ),
    "open_chatml": CHATML + ASK.replace("assistant\n", "assistant\n<think>\n"),
    "open_bare": CHATML + ASK.replace("assistant\n", "assistant\n<think>"),
    "open_everywhere": LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK.replace("assistant\n", "assistant\n<think>\n"),
}  # fmt: skip
MAY_THINK = CHATML + ASK.replace(
    "assistant\n", "assistant\n{% if enable_thinking is defined and enable_thinking is false %}" + EMPTY + "{% endif %}"
)
TEXTS = [
    " ".join(WORDS),
    "user assistant system Human: question? ASSISTANT: warm or cold A chat. USER Today Date final model",
    "\n\nHuman: question?\n\nAssistant: good. bad\n",
]


def _byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _gpt4():
    """Byte-level with the split of Llama 3 and GPT-4: a full stop and the line break after it are one token."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer, trainer = _byte_level()
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer, trainer


def _spaced(scheme):
    """As SentencePiece: ``prepend`` of Llama 2 (a space before all that stands between special tokens), ``first`` of
    others, ``spanning`` with tokens that reach over a space, as ":▁go".
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme in ("prepend", "spanning"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([] if scheme == "never" else [strip])]
    )
    alphabet = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789▁?:;.,!<>|[]/_'"})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    return tokenizer, trainers.BpeTrainer(
        vocab_size=700, special_tokens=pieces, initial_alphabet=alphabet, show_progress=False
    )


def _unigram():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ▁?:;.,!<>|[]/_'\n", *"0123456789"})
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )


MAKERS = {
    "byte_level": _byte_level,
    "gpt4": _gpt4,
    "prepend": lambda: _spaced("prepend"),
    "first": lambda: _spaced("first"),
    "never": lambda: _spaced("never"),
    "unigram": _unigram,
    "spanning": lambda: _spaced("spanning"),
}


def tokenizer_of(kind: str, template: str | None = None, special: bool = True):
    """A small tokenizer of a kind, with a template; ``special=False`` makes tags plain added ones."""
    from tokenizers import pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer, trainer = MAKERS[kind]()
    if kind == "prepend":  # no token reaches over a space
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    if kind == "prepend":
        tokenizer.pre_tokenizer = None
    if kind != "byte_level":  # puts a beginning before every text
        first = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=first)
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    plain = ["<think>", "</think>", "[THINK]", "[/THINK]"] if not special else []
    found.add_special_tokens({"additional_special_tokens": [t for t in SPECIALS if t not in plain]})
    found.add_tokens(plain)
    found.chat_template = template
    return found
