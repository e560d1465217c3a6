"""Which of several processes this one is, as torchrun says in its environment; one that it did not start is alone."""

import os


def rank() -> int:
    """0 ... world() - 1, over all machines."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Processes over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """`rank` on this machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world())))


def is_main_process() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0
