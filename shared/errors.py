"""What goes wrong by a user's doing, as opposed to ours."""


class UserError(Exception):
    """A mistake of input, path or configuration. Scripts print the message alone and exit with code 2.

    The message says what is wrong, where, and what to do about it, in one line wherever one line will do.
    """
