"""A build of a data set as tasks of datatrove, and its per-document stages as blocks, for corpora
that one process cannot hold. Needs the extra `[scale]`.

`TaskPool` divides the jobs of `build` among the tasks of an executor, on one machine or on many.
The data set has the bytes of one that one process builds, with duplicates removed:

    from stackproof.data.build import build
    from stackproof.data.scale import TaskPool

    build(cfg, folder, pool=TaskPool.on(tasks=8, workers=4))
    build(cfg, folder, pool=TaskPool.on(SlurmPipelineExecutor, tasks=512, **slurm))

For corpora whose documents one machine cannot compare, the stages are also blocks. A pipeline is a
list of blocks, independent of the executor:

    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor

    files = Files(paths=("/corpus/*.jsonl.gz",), languages=("en", "de"))
    tokenize = TokenizeBlock("/run/tokenizer.json", "/shards")
    pipeline = [ReadBlock(files), FilterBlock(files.languages), tokenize]

    LocalPipelineExecutor(pipeline, tasks=8, logging_dir="/logs").run()
    slurm = {"time": "12:00:00", "partition": "cpu", "mem_per_cpu_gb": 4, "logging_dir": "/logs"}
    SlurmPipelineExecutor(pipeline, tasks=4096, **slurm).run()
    ray = {"workers": 512, "mem_per_cpu_gb": 4, "logging_dir": "/logs"}
    RayPipelineExecutor(pipeline, tasks=4096, **ray).run()

    split, drops = collect("/shards", "train", n_tasks=4096), drop_counts("/logs", n_tasks=4096)

A task processes every `tasks`-th file in sorted order and writes its own folder, renamed into place
when it is complete. A failed task leaves no part; a repeated task replaces its part by the same
bytes; a task marked as done in `logging_dir` is not started again. Paths are local or on a file
system that all tasks share. The hidden folder of a task that was killed is removed by its next
attempt on the same host; on another host it is not known that the process has ended. Blocks do not
remove duplicates, because that needs all documents.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from stackproof.config import Files, Language
from stackproof.contracts.conditions import require
from stackproof.data import corpus, shards
from stackproof.data.files import Unreadable
from stackproof.data.filters import rejection
from stackproof.data.tokenizer import Encoding, Tokenizer, load_tokenizer
from stackproof.data.workers import Pool
from stackproof.evidence.file_lock import remove_abandoned
from stackproof.spec.canonical import canonical_json, read_json
from stackproof.spec.errors import DataError, EnvironmentUnfit, IntegrityError
from stackproof.spec.files import process_name, read_text, remedy
from stackproof.tensorfile import BadTensorFile

try:
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.writers.disk_base import DiskWriter
except ModuleNotFoundError as e:
    raise EnvironmentUnfit(
        f"processing a corpus in blocks needs {e.name}, which is not installed",
        allowed="corpora that one process can hold are prepared without it, by stack train",
        next_step="pip install 'stackproof[scale]'",
    ) from e

FORMAT = "stackproof/part/1"
LANGUAGES, DROPPED = get_args(Language), "dropped_"


class JobsBlock(PipelineStep):
    """A task's share of the jobs of a stage of `build`: jobs rank, rank + world_size, …, each of
    which writes its result into the folder of the data set.
    """

    name, type = "stackproof build", "🧱 - BUILD"

    def __init__(self, function: Callable[[Any], dict], jobs: Sequence[Any]):
        super().__init__()
        self.function, self.jobs = function, jobs

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        """Run the jobs. A finished one is not run again."""
        for job in self.jobs[rank::world_size]:
            self.function(job)
            self.stat_update("total")


class TaskPool(Pool):
    """Runs the jobs of a build as tasks of a datatrove executor, one pipeline for each stage."""

    def __init__(self, make_executor: Callable[..., PipelineExecutor], logs: Path):
        super().__init__(workers=1)
        self.make_executor, self.logs = make_executor, logs

    @classmethod
    def on(
        cls, executor: type[PipelineExecutor] = LocalPipelineExecutor, **options: Any
    ) -> Callable[[Path], "TaskPool"]:
        """The argument `pool` of `build`, from a class of executors and its options."""
        return lambda work: cls(partial(executor, **options), work / "tasks")

    def __call__(
        self, function: Callable[[Any], dict], jobs: Iterable[Any]
    ) -> Iterator[tuple[Any, dict]]:
        """Run a stage, and yield (job, result) of its jobs in order. Raises DataError if tasks have
        not finished, as those of an executor that only submits them.
        """
        jobs = list(jobs)
        executor = self.make_executor(
            [JobsBlock(function, jobs)], logging_dir=str(self.logs / function.__name__)
        )
        executor.run()
        if missing := executor.get_incomplete_ranks(skip_completed=True):
            raise DataError(
                f"tasks of {function.__name__} have not finished",
                value=f"{len(missing)} of {executor.world_size}",
                allowed="all tasks, before the next stage begins",
                next_step=f"wait for them, see {self.logs}, then build again: finished parts stay",
            )
        # A finished job returns the result that its task has written.
        yield from super().__call__(function, jobs)


class ReadBlock(PipelineStep):
    """Documents of a task's share of the files, read by `stackproof.data.corpus`. Unreadable items
    are counted by reason.

    Raises DataError with file and line of a damaged file or record; datatrove's own readers log it
    and continue without it.
    """

    name, type = "stackproof reader", "📖 - READER"

    def __init__(self, files: Files):
        super().__init__()
        self.files = files

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Documents of earlier blocks, then those of files rank, rank + world_size, …"""
        yield from data or ()
        for path in corpus.resolve_paths(self.files)[rank::world_size]:
            yield from self._readable(self.files.model_copy(update={"paths": (str(path),)}))

    def _readable(self, file: Files) -> Iterator[Document]:
        for item in (i for part in corpus.parts(file) for i in corpus.read_part(file, part)):
            self.stat_update("total")
            if isinstance(item, Unreadable):
                self.stat_update("dropped", f"dropped_{item.reason}")
            else:
                self.stat_update("forwarded")
                yield Document(text=item.text, id=item.id)


class FilterBlock(BaseFilter):
    """Drops documents that `stackproof.data.filters.rejection` rejects; `drop_counts` returns their
    number by reason.

    `languages` apply to all documents. Without them, each document has its language in
    `metadata["language"]`, as set by datatrove's language filter; raises DataError for an unknown
    language. Dropped documents go to `exclusion_writer`, if given, with their `filter_reason`.
    """

    name = "stackproof filter"

    @require(lambda languages: set(languages) <= set(LANGUAGES), "languages are known")
    def __init__(self, languages: tuple[str, ...] = (), exclusion_writer: DiskWriter | None = None):
        super().__init__(exclusion_writer)
        self.languages = tuple(languages)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True to keep, else False and the code of the reason."""
        reason = rejection(doc.text, self.languages or _language(doc))
        return True if reason is None else (False, reason)


def _language(doc: Document) -> str:
    language = doc.metadata.get("language")
    if language in LANGUAGES:
        return language
    raise DataError(
        f"document {doc.id} names no known language",
        value=language,
        allowed=" ".join(LANGUAGES),
        next_step=(
            "put a language filter before FilterBlock, or give it the languages of all documents"
        ),
    )


class TokenizeBlock(PipelineStep):
    """Encodes documents and writes them as shards, an end-of-text id after each;
    the last block of a pipeline.

    `tokenizer_path` is the tokenizer.json of a run or prepared corpus, `source` the name of the
    source in a mixture. A task writes `output/<split>-<rank>/`: shards of about `max_tokens`
    tokens, and their description `part.json`. Raises DataError if the tokenizer is unreadable or
    the shards cannot be written.
    """

    name, type = "stackproof shards", "🔢 - TOKENIZER"

    @require(
        lambda batch_size, max_tokens: batch_size >= 1 and max_tokens >= 1, "sizes are at least 1"
    )
    def __init__(
        self,
        tokenizer_path: str | Path,
        output: str | Path,
        *,
        split: str = "train",
        source: str = "files",
        batch_size: int = 1000,
        max_tokens: int = shards.MAX_SHARD_TOKENS,
    ):
        super().__init__()
        self.tokenizer_path, self.output = Path(tokenizer_path), Path(output)
        self.split, self.source = split, source
        self.batch_size, self.max_tokens = batch_size, max_tokens

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        """Write the part of this task. Replaces an existing part and removes the remains of a
        killed attempt on this host.
        """
        tokenizer = load_tokenizer(self.tokenizer_path)
        part = part_folder(self.output, self.split, rank)
        start = f".{part.name}-"
        temporary = part.with_name(f"{start}{process_name()}")
        remove_abandoned(self.output, start)
        try:
            temporary.mkdir(parents=True)
            description = self._write(temporary, data or (), tokenizer) | {
                "schema": FORMAT,
                "rank": rank,
                "n_tasks": world_size,
                "tokenizer_sha256": tokenizer.sha256,
            }
            (temporary / "part.json").write_bytes(canonical_json(description))
            shutil.rmtree(part, ignore_errors=True)
            os.replace(temporary, part)
        except (OSError, BadTensorFile) as e:
            raise DataError(
                f"the shards could not be written to {part}: {e}",
                next_step=f"{remedy(e)}, or choose another folder",
            ) from e
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, folder: Path, data: Iterable[Document], tokenizer: Tokenizer) -> dict:
        """Write shards to a folder. Returns their description in the format of a manifest."""

        def encode(texts: list[str]) -> list[Encoding]:
            with self.track_time("batch"):
                encodings = tokenizer.encode_batch(texts)
            for encoding in encodings:
                self.stat_update("total")
                self.stat_update("tokens", value=len(encoding.ids) + 1)
            return encodings

        return shards.write_documents(
            folder,
            self.split,
            ((d.text, shards.document_hash(d.text)) for d in data),
            tokenizer,
            source=self.source,
            encode=encode,
            at_once=self.batch_size,
            max_tokens=self.max_tokens,
        )


def part_folder(output: Path, split: str, rank: int) -> Path:
    """The folder of the task of a rank."""
    return output / f"{split}-{rank:05d}"


@require(lambda n_tasks: n_tasks >= 1, "a pipeline has at least one task")
def collect(output: str | Path, split: str, n_tasks: int) -> dict:
    """One split of all parts, in the order of ranks, as an argument of `TokenStream(output, …)` and
    an entry of a manifest.

    Raises DataError if a part is missing, damaged, of another number of tasks or of another
    tokenizer.
    """
    output = Path(output)
    parts = [_part(output, split, rank, n_tasks) for rank in range(n_tasks)]
    found, known = len(list(output.glob(f"{split}-*"))), {p["tokenizer_sha256"] for p in parts}
    if found != n_tasks or len(known) > 1:
        raise DataError(
            f"{output} holds {found} parts of {split}, encoded by {len(known)} tokenizer(s)",
            allowed=f"{n_tasks} parts of one tokenizer",
            next_step="delete the parts of other pipelines, or write to a folder of its own",
        )
    rows = [
        {**s, "path": f"{part_folder(output, split, p['rank']).name}/{s['path']}"}
        for p in parts
        for s in p["shards"]
    ]
    return {
        **{name: sum(p[name] for p in parts) for name in shards.COUNTS},
        "tokenizer_sha256": known.pop(),
        "shards": rows,
    }


def _part(output: Path, split: str, rank: int, n_tasks: int) -> dict:
    path = part_folder(output, split, rank) / "part.json"
    again = (
        f"delete {path.parent} and completions/{rank:05d} in the logging directory, and run again"
    )
    try:
        part = read_json(path)
        expected = {"schema": FORMAT, "rank": rank, "n_tasks": n_tasks}
        declared = {key: part[key] for key in expected}
    except (OSError, IntegrityError, KeyError, TypeError) as e:
        raise DataError(
            f"the part of task {rank} cannot be read: {type(e).__name__}: {e}", next_step=again
        ) from e
    if declared != expected:
        raise DataError(
            f"{path} is of another pipeline", value=declared, allowed=expected, next_step=again
        )
    return part


@require(lambda n_tasks: n_tasks >= 1, "a pipeline has at least one task")
def drop_counts(logging_dir: str | Path, n_tasks: int) -> dict:
    """{"documents", "kept", "dropped": {reason: count}} of a pipeline over all tasks; blocks that
    give no reason count under their name.

    Read from the file of each task: datatrove's merged stats.json covers only the tasks of the last
    start. Raises DataError if a task left none, or if the counts do not add up from block to block.
    """
    totals: Counter = Counter()
    for rank in range(n_tasks):
        totals.update(_task_counts(Path(logging_dir) / "stats" / f"{rank:05d}.json"))
    dropped = {
        key.removeprefix(DROPPED): n for key, n in sorted(totals.items()) if key.startswith(DROPPED)
    }
    return {"documents": totals["documents"], "kept": totals["kept"], "dropped": dropped}


def _task_counts(path: Path) -> Counter:
    """The counts of one task by block. The input of each block must equal the output of the block
    before it.
    """
    counts: Counter = Counter()
    try:
        blocks = [(b["name"], _numbers(b["stats"])) for b in json.loads(read_text(path))]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"{path} has no counts of dropped documents: {e}",
            next_step="wait for all tasks, or run the pipeline again",
        ) from e
    counted = [
        (name, stats) for name, stats in blocks if "total" in stats or name.endswith(OUR_BLOCKS)
    ]
    for place, (name, stats) in enumerate(counted):
        came = stats["total"] if place == 0 else counts["kept"]
        reasons = {key: n for key, n in stats.items() if key.startswith(DROPPED)}
        unexplained = stats["dropped"] - sum(reasons.values())
        goes_on = stats["forwarded"] if stats["forwarded"] or stats["dropped"] else came
        if stats["total"] != came or came != goes_on + stats["dropped"] or unexplained < 0:
            raise DataError(
                f"the counts of {name} in {path} do not add up",
                value=dict(stats),
                next_step="run the pipeline again",
            )
        counts.update(reasons | ({DROPPED + name: unexplained} if unexplained else {}))
        counts["documents"], counts["kept"] = counts["documents"] if place else came, goes_on
    return counts


def _numbers(stats: dict) -> Counter:
    """datatrove writes a count as a number, or as a table with its total."""
    return Counter(
        {
            key: int(value["total"] if isinstance(value, dict) else value)
            for key, value in stats.items()
        }
    )


OUR_BLOCKS = (ReadBlock.name, FilterBlock.name, TokenizeBlock.name)
