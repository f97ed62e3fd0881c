"""Errors caused by user input. Any other error is a bug in w2sg and keeps its traceback."""


class UserError(ValueError):
    """Bad input. The message names what is wrong and says how to fix it."""


class ConfigError(UserError):
    """Every problem of one configuration, reported at once.

    Args:
        problems: one line each, ``"key: what is wrong and what to do"``.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        words = f"Invalid configuration ({len(problems)} problems):\n" + "\n".join(f"  {p}" for p in problems)
        super().__init__(problems[0] if len(problems) == 1 else words)


class TrainingError(UserError):
    """Training cannot continue, for instance because a loss is not finite. Finished stages are kept."""


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
