r"""Text that does nothing but be read: on a terminal, on a page, in a figure."""

from __future__ import annotations

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
