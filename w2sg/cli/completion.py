"""Completion by the Tab key: ``w2sg --install-completion bash``, or zsh, or fish.

The shell asks ``w2sg --complete`` at each Tab, with the words that are typed. Verbs, groups and their choices are read
from names of files, at once; keys below a group are Hydra's own completion, which composes what is typed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from w2sg.cli.docs import pages
from w2sg.cli.help import VERBS, choices_of, chosen_in, keys_of, plain_keys
from w2sg.config.programs import JOBS, STORE
from w2sg.console import Plain
from w2sg.errors import UserError

BASH = r"""# completion of w2sg; written by `w2sg --install-completion bash`
_w2sg() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\n' place
    local word="${line##* }" words
    IFS=' ' read -r -a words <<< "$line"
    [[ $line == *' ' ]] && words+=("")
    IFS=$'\n'
    COMPREPLY=($("${COMP_WORDS[0]}" --complete "${words[@]:1}" 2>/dev/null))
    for place in "${!COMPREPLY[@]}"; do
        case "${COMPREPLY[place]}" in *[=./@]) ;; *) COMPREPLY[place]+=" " ;; esac
        # what stands before the last sign at which bash parts words is not typed once more
        [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && COMPREPLY[place]="${COMPREPLY[place]#"${word%=*}="}"
    done
}
complete -o default -o nospace -F _w2sg w2sg
"""
ZSH = r"""#compdef w2sg
# completion of w2sg; written by `w2sg --install-completion zsh`
local -a found open
found=("${(@f)$("${words[1]}" --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
open=(${(M)found:#*[=./@]})
found=(${found:#*[=./@]})
(( $#open )) && compadd -S '' -a open
(( $#found )) && compadd -a found
(( $#open + $#found )) || _files
"""
FISH = r"""# completion of w2sg; written by `w2sg --install-completion fish`
complete -c w2sg -f -a '(w2sg --complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
complete -c w2sg -n 'test (count (commandline -opc)) -gt 1' -F
"""
SECTIONS = ("method", "decoder", "refine", "loss", "weak", "strong", "dataset", "optim", "trainer", "engine", "logger")
# Shell -> what is written, the variable of its base folder, the base folder without it, and the file below that.
SHELLS = {
    "bash": (BASH, "XDG_DATA_HOME", ".local/share", "bash-completion/completions/w2sg"),
    "zsh": (ZSH, "XDG_DATA_HOME", ".local/share", "zsh/site-functions/_w2sg"),
    "fish": (FISH, "XDG_CONFIG_HOME", ".config", "fish/completions/w2sg.fish"),
}


def install(words: Sequence[str]) -> None:
    """Write the completion of a shell where that looks for it, and say what is left to do.

    Raises:
        UserError: the shell is none of `SHELLS`, or the file cannot be written.
    """
    shell = words[0] if words else Path(os.environ.get("SHELL", "")).name
    if shell not in SHELLS or len(words) > 1:
        raise UserError(f"--install-completion: {shell or 'nothing'} is no shell here; give one of {', '.join(SHELLS)}")
    text, variable, base, name = SHELLS[shell]
    file = Path(os.environ.get(variable) or Path.home() / base) / name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--install-completion: {file} cannot be written ({error.strerror})") from error
    left = {
        "bash": f"Open a new terminal. Without the package bash-completion, add `source {file}` to ~/.bashrc.",
        "zsh": f"Add `fpath=({file.parent} $fpath)` before compinit in ~/.zshrc, and open a new terminal.",
        "fish": "Open a new terminal.",
    }[shell]
    console = Plain()
    console.say(f"written: {file}")
    console.say(left)


def complete(words: Sequence[str]) -> None:
    """Print what the last of some words may become, one a line."""
    for candidate in candidates(words):
        print(candidate)


def candidates(words: Sequence[str]) -> list[str]:
    """What the last word may become.

    Args:
        words: those after ``w2sg``, up to where the cursor is; the last one may be empty.
    """
    *before, last = words or [""]
    if not before:
        return [verb for verb in [*VERBS, "help"] if verb.startswith(last)]
    verb = before[0]
    if verb == "help":
        return [verb for verb in VERBS if verb.startswith(last)]
    if verb not in VERBS:
        return []
    if verb == "docs":
        return [page for page in pages() if len(before) == 1 and page.startswith(last)]
    if verb in JOBS:
        return [word for word in _of_job(verb, before[1:]) if word.startswith(last)]
    return _of_program(verb, before[1:], last)


def _of_job(verb: str, before: Sequence[str]) -> list[str]:
    first = STORE if verb == "store" and not before else []
    return [*first, *keys_of(verb)]


def _of_program(verb: str, before: Sequence[str], last: str) -> list[str]:
    groups = chosen_in(verb)
    key, equals, value = last.lstrip("+").partition("=")
    if equals and key in groups:
        choices, (swept, comma, part) = choices_of(verb, key), value.rpartition(",")
        return [f"{key}={swept}{comma}{choice}" for choice in choices if choice.startswith(part)]
    if not equals and "." not in key:
        names = [*(f"{group}=" for group in groups), *(f"{group}." for group in groups if group in SECTIONS)]
        return [name for name in sorted([*names, *(f"{name}=" for name in plain_keys())]) if name.startswith(key)]
    return _of_hydra(verb, before, last)


def _of_hydra(verb: str, before: Sequence[str], last: str) -> list[str]:
    """What Hydra says of a word after those before it: keys of sections, and the values that they have."""
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.bash_completion import BashCompletion
    from hydra.core.global_hydra import GlobalHydra

    from w2sg.config.hydra import register
    from w2sg.config.plugins import CONF
    from w2sg.config.typed import typed

    line = typed(before)
    register(users=line.folder)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return BashCompletion(loader)._query(config_name=verb, line=" ".join([*line.overrides, last]))
