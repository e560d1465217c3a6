"""What goes wrong by a user's doing, as opposed to ours."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake of input, path or configuration. Scripts print the message alone and exit with code 2.

    The message says what is wrong, where, and what to do about it, in one line wherever one line will do.
    """


def meant(name: object, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """What a message says of a name that is not known, if one is that is nearly the same; else nothing.

    elsewhere   what it may have been instead, best first, if none is
    """
    near = [*get_close_matches(str(name), list(known), n=1), *elsewhere]
    return f"; did you mean {near[0]!r}?" if near else ""


def hint(name: object, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """The same, and all that is known."""
    known = list(known)
    return f"{meant(name, known, elsewhere)} (known: {', '.join(known)})"
