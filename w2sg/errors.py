"""Errors that are the user's to mend. Anything else that escapes is a fault of ours and keeps its traceback."""


class UserError(ValueError):
    """Bad input: the message names the thing that is wrong and says how to mend it."""


class ConfigError(UserError):
    """Every problem of one configuration, reported at once.

    Args:
        problems: one line each, ``"key: what is wrong and what to do"``.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        words = "The configuration does not hold together:\n" + "\n".join(f"  {p}" for p in problems)
        super().__init__(problems[0] if len(problems) == 1 else words)


class TrainingError(UserError):
    """Training cannot go on (for instance a loss that is not finite); finished stages are kept."""
