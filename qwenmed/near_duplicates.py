"""Which of millions of texts are nearly the same: MinHash signatures (Broder, 1997), banded on disk.

datasketch makes the signatures. Its index lives in dictionaries, some kilobytes a text; here the bands are columns of
numbers in temporary files, sorted one at a time, so that five million texts take the memory of one column. Texts
whose band is equal are compared by their whole signatures with the first of their kind.

Limits: texts are compared as sets of 5-character pieces, letters and digits alone; the similarity is an estimate with
a standard error of about 0.035. A rewording, or another order of whole paragraphs, is another matter.
"""

import contextlib
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

PERMUTATIONS = 128
PIECE = 5
# How many similar pairs (at the threshold) the bands may miss.
MISSED = 0.02

_NO_TEXT = re.compile(r"[\W_]+")


def plain(text: str) -> str:
    """A text's letters and digits alone, full-width forms as usual ones."""
    return _NO_TEXT.sub("", unicodedata.normalize("NFKC", text).lower())


class Signer:
    """Makes the signatures of texts; the permutations are fixed, so that any process makes the same ones."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self._minhash = MinHash(PERMUTATIONS, seed=1, scheme="affine32", hashfunc=int)

    def sign(self, text: str) -> bytes | None:
        """The signature of a plain text: PERMUTATIONS numbers of 32 bits; None where it is too short to have one."""
        pieces = _hashes(text)
        if not len(pieces):
            return None
        self._minhash.clear()
        self._minhash.update_batch(pieces.tolist())
        return self._minhash.hashvalues.astype("<u4").tobytes()


def _hashes(text: str) -> "numpy.ndarray":
    """A 32-bit hash of each 5-character piece: what a hash function a piece would give, in one go."""
    import numpy

    codes = numpy.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(numpy.uint64)
    count = len(codes) - PIECE + 1
    if count < 1:
        return numpy.zeros(0, dtype=numpy.uint32)
    hashes = numpy.zeros(count, dtype=numpy.uint64)
    for offset in range(PIECE):  # a polynomial in the codes, then mixed as in splitmix64
        hashes = hashes * numpy.uint64(1_000_003) + codes[offset : offset + count]
    hashes ^= hashes >> numpy.uint64(30)
    hashes *= numpy.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> numpy.uint64(27)
    return (hashes >> numpy.uint64(16)).astype(numpy.uint32)


def bands(threshold: float) -> tuple[int, int]:
    """Number of bands and rows in each, the longest with which at most MISSED of the pairs at `threshold` are missed."""
    for size in range(32, 1, -1):
        number = PERMUTATIONS // size
        if (1 - threshold**size) ** number <= MISSED:
            return number, size
    return PERMUTATIONS, 1


class Index:
    """Signatures in temporary files, and the pairs among them that are similar.

    Args:
        folder: where the files lie; they have no name and are gone with the process.
        threshold: Jaccard similarity from which on two texts are near-duplicates.
    """

    def __init__(self, folder: Path, threshold: float) -> None:
        self._threshold = threshold
        self._number, self._size = bands(threshold)
        self._open = stack = contextlib.ExitStack()
        files: list[IO[bytes]] = [
            stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(self._number + 1)
        ]
        self._signatures: IO[bytes] = files[0]
        self._columns: list[IO[bytes]] = files[1:]
        self.count = 0

    def add(self, signature: bytes | None) -> None:
        """Take the next text's signature."""
        import numpy

        self._signatures.write(signature or bytes(4 * PERMUTATIONS))
        if signature:
            rows = numpy.frombuffer(signature, dtype="<u4").reshape(-1)[: self._number * self._size]
            keys = [hash(band.tobytes()) for band in rows.reshape(self._number, self._size)]
        else:
            keys = [0] * self._number
        for column, key in zip(self._columns, keys, strict=True):
            column.write((key & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little"))
        self.count += 1

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(first, later) of similar texts; each later one is compared with the first of its band only."""
        import numpy

        self._signatures.flush()
        for column in self._columns if self.count else ():
            column.flush()
            column.seek(0)
            keys = numpy.fromfile(column, dtype="<u8")
            order = numpy.argsort(keys, kind="stable")
            keys = keys[order]
            starts = numpy.flatnonzero(numpy.r_[True, keys[1:] != keys[:-1]])
            ends = numpy.r_[starts[1:], len(keys)]
            several = (ends - starts > 1) & (keys[starts] != 0)
            for start, end in zip(starts[several], ends[several], strict=True):
                first = int(order[start])
                signature = self._signature(first)
                for later in order[start + 1 : end]:
                    if (self._signature(int(later)) == signature).mean() >= self._threshold:
                        yield first, int(later)

    def close(self) -> None:
        """Let the files go."""
        self._open.close()

    def _signature(self, number: int) -> "numpy.ndarray":
        import numpy

        self._signatures.seek(number * 4 * PERMUTATIONS)
        return numpy.frombuffer(self._signatures.read(4 * PERMUTATIONS), dtype="<u4")
