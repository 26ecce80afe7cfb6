"""Several processes that train one model: which of them this one is. `accelerate launch` and torchrun tell by variables.

Only the first says, locks, records and writes; each reads the data and works out the same rows.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

Value = TypeVar("Value")


def number() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one that says and writes."""
    return number() == 0


def shards() -> int:
    """Into how many parts weights, gradients and optimizer states are split: FSDP gives each process one."""
    return count() if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1") else 1


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process does what is inside, then the others, who find it done."""
    if count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def agree(value: Value) -> Value:
    """What the first process has, for all of them."""
    if count() == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState()
    return broadcast_object_list([value])[0]
