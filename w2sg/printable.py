r"""Text that does nothing but be read: on a terminal, on a page, in a figure, in a spreadsheet."""

from __future__ import annotations

from typing import Any

# C0 and C1 controls but tab and newline; marks that turn the direction of what follows; half of a surrogate pair, which
# is a byte of a path that is not UTF-8.
CONTROLS = (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in CONTROLS}
SHOWN |= {code: f"\\x{code - 0xDC00:02x}" for code in range(0xDC80, 0xDD00)}


def printable(text: str) -> str:
    r"""A text whose control characters and bytes that are no UTF-8 are written out, so that they do nothing.

    >>> print(printable("a\x1b[31mb\r"))
    a\x1b[31mb\x0d
    """
    return text.translate(SHOWN)


def inert(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula (OWASP's rule); numbers stay numbers.

    >>> inert("=1+1"), inert(-0.5), inert("-0.5"), inert("rkl")
    ("'=1+1", -0.5, '-0.5', 'rkl')
    """
    if not isinstance(value, str) or not value.startswith(
        ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
    ):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
