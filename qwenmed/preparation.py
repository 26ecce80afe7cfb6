"""The one pass over a data set: every row parsed, repaired, examined and measured, and collected.

Where there is much to do, worker processes do it; the main process reads the rows and keeps their order.
"""

import collections
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenmed import chat, checkpoints, contamination, findings, lengths, near_duplicates, rows, scenarios, schemas
from qwenmed.collection import DECONTAMINATED, INVALID, Collection, Examined, Rejected, Tally
from qwenmed.errors import UserError
from qwenmed.records import Problem, Record

# Rows that a worker takes at a time, and the bytes of sources from which on workers pay for their start.
CHUNK, MUCH, MOST_WORKERS = 256, 50_000_000, 8


@dataclass(frozen=True)
class Source:
    """Where rows come from, and how often each of its training rows is taken."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Plan:
    """How rows are treated; it travels to the worker processes.

    Attributes:
        mapping: as in `schemas.parse_row`.
        limits: thresholds of the checks, and whether personal data are masked.
        drop: checks whose rows are dropped.
        near_duplicate: Jaccard similarity from which on texts are near-duplicates; 0 for no such check.
        held_out: what must not be trained on.
        tokenizer: the folder of the tokenizer that measures, or None for lengths in characters.
        max_length: in tokens; longer samples are a finding.
        general: the general system prompt, with which lengths are measured.
        scenarios: the known scenarios.
    """

    mapping: Mapping[str, str]
    limits: findings.Limits
    drop: frozenset[str]
    near_duplicate: float
    held_out: contamination.HeldOut | None
    tokenizer: Path | None
    max_length: int
    general: str
    scenarios: tuple[str, ...]


def collect(sources: Sequence[Source], plan: Plan, folder: Path, workers: int, progress: Any) -> Collection:
    """Read, examine and collect all rows of the sources.

    Args:
        folder: where the temporary files lie.
        workers: processes; 1 does everything here.
        progress: its `update(n)` is called with the rows done.

    Raises:
        UserError: a source is unusable as a whole, or a worker was killed.
        OSError: the disk is full.
    """
    collection = Collection(folder, plan.near_duplicate, plan.drop)
    try:
        for source, examined in _examined(_chunks(sources, plan, collection.tally), plan, workers):
            for each in examined:
                if isinstance(each, Rejected):
                    collection.drop(each.problem, each.kind)
                else:
                    collection.add(each, source)
            progress.update(len(examined))
    except BaseException:
        collection.close()
        raise
    return collection


def workers_for(sources: Iterable[Source]) -> int:
    """How many processes pay for their start: one below some ten thousand rows, else one a core."""
    paths = [path for source in sources for path in rows.data_files(source.path)]
    size = sum(path.stat().st_size * (4 if path.suffix.lower() == ".gz" else 1) for path in paths)
    if size < MUCH:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


class Examiner:
    """Turns rows into what is to be known of them; each process has one."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._signer = near_duplicates.Signer() if plan.near_duplicate else None
        self._lengths: lengths.SampleLengths | None = None
        if plan.tokenizer:
            tokenizer = checkpoints.load_tokenizer(plan.tokenizer)
            chat.check_template(tokenizer)
            self._lengths = lengths.SampleLengths(tokenizer)

    def examine(self, chunk: Sequence[tuple[str, Any]]) -> "list[Examined | Rejected]":
        """What became of each row; a conversation gives more than one."""
        outcomes: list[Examined | Rejected | tuple[Record, dict[str, str], Counter]] = []
        for place, row in chunk:
            parsed = row if isinstance(row, Problem) else schemas.parse_row(row, place, self._plan.mapping)
            if isinstance(parsed, Problem):
                outcomes.append(Rejected(parsed, INVALID))
            else:
                outcomes += [self._checked(record) for record in parsed]
        whole = [each for each in outcomes if isinstance(each, tuple)]
        measured = iter(zip(whole, self._measure([record for record, _, _ in whole]), strict=True))
        return [self._described(*next(measured)) if isinstance(each, tuple) else each for each in outcomes]

    def _checked(self, record: Record) -> "Rejected | tuple[Record, dict[str, str], Counter]":
        record, found, masked = findings.examine(record, self._plan.limits)
        again = schemas.parse_row(record.row, record.place)
        if isinstance(again, Problem):  # what was all written-out line breaks is empty once they are repaired
            return Rejected(again, INVALID)
        shared = self._plan.held_out.overlap(record) if self._plan.held_out else None
        if shared:
            return Rejected(Problem(record.place, f"与评估集重叠：“{shared[0]}”（{shared[1]}）"), DECONTAMINATED)
        return record, found, masked

    def _measure(self, records: Sequence[Record]) -> list[int]:
        if self._lengths is None:
            return [len(record.question + record.think + record.answer) for record in records]
        return self._lengths.of_many([(record, record.system or self._plan.general) for record in records])

    def _described(self, checked: tuple[Record, dict[str, str], Counter], length: int) -> Examined:
        record, found, masked = checked
        if self._lengths and length > self._plan.max_length:
            found["overlong"] = f"{length} 个 token"
        asked = near_duplicates.plain(record.question)
        text = asked + near_duplicates.plain(record.answer)
        return Examined(
            place=record.place,
            row=json.dumps(record.row, ensure_ascii=False, default=str),
            key=hashlib.blake2b(repr(record.key).encode(), digest_size=16).digest(),
            question_key=_number(repr((asked or record.question, record.history))),
            signature=self._signer.sign(text) if self._signer else None,
            length=length,
            scenario=record.scenario or scenarios.suggested(record.question, self._plan.scenarios),
            named=bool(record.scenario),
            found=found,
            masked=masked,
        )


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _chunks(sources: Sequence[Source], plan: Plan, tally: Tally) -> Iterator[tuple[int, list[tuple[str, Any]]]]:
    for number, source in enumerate(sources):
        for path in rows.data_files(source.path):
            stream, name = rows.read_rows(path), rows.shown(path)
            while chunk := list(itertools.islice(stream, CHUNK)):
                tally.read[name] += len(chunk)
                if not tally.schemas.get(name):
                    tally.schemas[name] = next(
                        filter(None, (schemas.recognise(row, plan.mapping) for _, row in chunk)), ""
                    )
                yield number, chunk


def _examined(
    chunks: Iterator[tuple[int, list[tuple[str, Any]]]], plan: Plan, workers: int
) -> "Iterator[tuple[int, list[Examined | Rejected]]]":
    if workers == 1:
        examiner = Examiner(plan)
        for source, chunk in chunks:
            yield source, examiner.examine(chunk)
        return
    # Spawned and not forked: the tokenizer's threads do not survive a fork, and Windows has none.
    context = multiprocessing.get_context("spawn")
    waiting: collections.deque[tuple[int, Future[list[Examined | Rejected]]]] = collections.deque()
    with ProcessPoolExecutor(workers, context, initializer=_begin_work, initargs=(plan,)) as pool:
        try:
            for source, chunk in chunks:
                waiting.append((source, pool.submit(_work, chunk)))
                if len(waiting) > 2 * workers:
                    source, future = waiting.popleft()
                    yield source, future.result()
            while waiting:
                source, future = waiting.popleft()
                yield source, future.result()
        except BrokenProcessPool:
            raise UserError("数据处理的子进程被终止", None, "可能是内存不够；请加 --workers 1") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# What a worker process keeps from one chunk to the next, or why it can't work; the main process never sets it.
_worker: list[Examiner | UserError] = []


def _begin_work(plan: Plan) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends the work
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        _worker.append(Examiner(plan))
    except UserError as error:  # raised here, it would be a traceback, and for the main process a worker that died
        _worker.append(error)


def _work(chunk: list[tuple[str, Any]]) -> "list[Examined | Rejected]":
    [examiner] = _worker
    if isinstance(examiner, UserError):
        raise examiner
    return examiner.examine(chunk)


def _leave_with_parent() -> None:
    """A killed main process can't end its workers."""
    parent = multiprocessing.parent_process()
    if parent:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
