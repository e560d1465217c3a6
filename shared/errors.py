"""What goes wrong by a user's doing, as opposed to ours."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake of input, path or configuration. Scripts print the message alone and exit with code 2.

    The message says what is wrong, where, and what to do about it, in one line wherever one line will do.
    """


def meant(name: str, known: Iterable[str]) -> str:
    """What a message says of a name that is not known, if one is that is nearly the same; else nothing."""
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
