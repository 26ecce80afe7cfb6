"""Train and validation rows: the original project's split, except that what belongs together stays on one side.

At 0.1 and seed 42 a data set without near-duplicates is split exactly as the scripts that this project replaces
split it; only groups that would straddle the cut are moved.
"""

import array
import random
from collections import Counter
from collections.abc import Sequence

from qwenmed.errors import UserError


class Groups:
    """Which of `count` rows belong together; a union-find over their numbers."""

    def __init__(self, count: int) -> None:
        self._parent = array.array("I", range(count))
        self._shared = bytearray(count)

    def join(self, one: int, other: int) -> bool:
        """Put two rows into one group; False if they were in one already."""
        first, second = sorted((self.of(one), self.of(other)))
        self._parent[second] = first
        if first != second:
            self._shared[one] = self._shared[other] = 1
        return first != second

    def is_shared(self, row: int) -> bool:
        """Whether a row has company."""
        return bool(self._shared[row])

    def of(self, row: int) -> int:
        """The group of a row: the smallest row in it."""
        root = row
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[row] != root:  # so that the next look is short
            self._parent[row], row = root, self._parent[row]
        return root


def split(
    rows: Sequence[int], val_ratio: float, seed: int, groups: Groups | None = None
) -> tuple[Sequence[int], Sequence[int]]:
    """Shuffle the rows by `seed` and cut; a group that straddles the cut goes to the training side as a whole.

    What the validation side loses by that is made good by whole groups next to the cut.

    Raises:
        UserError: too few rows, or too few groups, to leave at least one on each side.
    """
    shuffled = array.array("I", rows)
    random.Random(seed).shuffle(shuffled)
    cut = int(len(shuffled) * (1 - val_ratio))
    if cut == 0 or cut == len(shuffled):
        raise UserError(
            f"只有 {len(shuffled)} 条可用记录，无法按 {val_ratio} 划分", None, "请提供更多数据或调整 --val-ratio"
        )
    train, val = shuffled[:cut], shuffled[cut:]
    if groups and any(groups.is_shared(row) for row in shuffled):
        train, val = _kept_together(train, val, groups)
    if not val:
        remedy = "请提供更多不同的数据，或用 --near-duplicate 0 关闭近似重复的分组"
        raise UserError("记录之间都近似重复，无法划分出不泄漏的验证集", None, remedy)
    return train, val


def _kept_together(train: array.array, val: array.array, groups: Groups) -> tuple[array.array, array.array]:
    """The two sides with every group on one of them."""
    sizes = Counter(groups.of(row) for side in (train, val) for row in side if groups.is_shared(row))
    in_train = {groups.of(row) for row in train if groups.is_shared(row)}
    stays = [groups.of(row) not in in_train for row in val]
    moved = [row for row, keep in zip(val, stays, strict=True) if not keep]
    missing, left, wanted = len(moved), len(train) + len(moved), set()
    for row in reversed(train):
        if not missing:
            break
        group = groups.of(row)
        size = sizes.get(group, 1)
        if group not in wanted and size <= missing and size < left:
            wanted.add(group)
            missing, left = missing - size, left - size
    rest = [*train, *moved]
    kept = [row for row, keep in zip(val, stays, strict=True) if keep]
    return (
        array.array("I", (row for row in rest if groups.of(row) not in wanted)),
        array.array("I", [*(row for row in rest if groups.of(row) in wanted), *kept]),
    )
