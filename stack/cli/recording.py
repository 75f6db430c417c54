"""Records of the verbs: opens a record, writes its files, closes it and prints the result."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackproof.cli.output import emit, print_line
from stackproof.spec.canonical import canonical_lines, to_jsonable
from stackproof.spec.errors import GateFailed, StackproofError


@dataclass(frozen=True)
class Claim:
    """What the records of a verb claim, and what the claim does not cover."""

    kind: str
    text: str
    not_covered: Sequence[str]


@dataclass
class OpenRecord:
    """The record of a running verb. `builder` takes metrics, inputs and outputs, `judge` lets the
    gates of its kind look; `close` writes it. `unasked` names gates that cannot look here.
    """

    builder: Any
    directory: Path
    json: bool
    keeper: Any
    series: list[str] = field(default_factory=list)
    unasked: tuple[str, ...] = ()

    def path(self, name: str) -> Path:
        """The path of a file beside the record; creates the folder."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return self.directory / name

    def write_series(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write JSON lines beside the record."""
        from stackproof.spec.files import write_atomically

        write_atomically(self.path(name), canonical_lines(rows))
        self.series.append(name)

    def output(self, path: Path, root: Path) -> None:
        """Add a written file to the outputs of the record."""
        from stackproof.spec.building import artefact

        self.builder.outputs.append(artefact(path, root=root))

    def input(self, path: Path, root: Path | None = None, name: str | None = None) -> None:
        """Add a file to the inputs of the record, with its path relative to `root` (default: the
        working directory).
        """
        from stackproof.spec.building import artefact

        self.builder.inputs.append(
            artefact(path.resolve(), root=(root or Path.cwd()).resolve(), name=name)
        )

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of the record by name."""
        return {name: metric.value for name, metric in self.builder.metrics.items()}

    def judge(self, subject: Any, *, step: int | None = None) -> None:
        """Let the gates of the verb look at a part of its subject. One that halts closes the
        record; raises GateFailed.
        """
        try:
            self.keeper.artifact(subject, step=step)
        except GateFailed as e:
            self.close(e.what, error=e)

    def close(
        self,
        reason: str,
        document: dict[str, Any] | None = None,
        show: Callable[[dict[str, Any]], None] = lambda document: None,
        *,
        error: StackproofError | None = None,
        finish: Callable[..., Any] | None = None,
        directory_key: str = "run_dir",
    ) -> None:
        """Write the record, print the document, and raise `error` if the verb failed;
        the record states its exit code.

        `finish` writes the record in place of `builder.finish`;
        `directory_key` is its folder in the document. Raises GateFailed if a gate of the verb has
        no verdict.
        """
        asked = self.builder.kind, self.builder.config, self.unasked
        if error is None and (error := self.keeper.unjudged(*asked)):
            reason = error.what
        status = "completed"
        if error:
            status = "halted" if isinstance(error, GateFailed) else "failed"
        ending = {"status": status, "exit_code": error.exit_code if error else 0}
        record = (finish or self._finish)(end_reason=reason, gates=self.keeper.results(), **ending)
        if document is not None:
            print_record(record, self.directory, document, self.json, show, directory_key)
        if error:
            raise error

    def _finish(self, **ending: Any) -> Any:
        return self.builder.finish(self.path(""), series=self.series, **ending)


def open_record(
    claim: Claim,
    config: Mapping[str, Any],
    *,
    run_dir: Path | None,
    json: bool,
    parents: Iterable[str] = (),
    **environment: Any,
) -> OpenRecord:
    """Open the record of a verb with a new id, the start time and the code state, and the gates of
    its kind and configuration.

    `close` writes it; an error before that leaves no record.
    """
    from stackproof.contracts.keeper import Gatekeeper
    from stackproof.spec.building import RecordBuilder
    from stackproof.spec.gates import load_spec
    from stackproof.spec.provenance import environment as measured

    builder = RecordBuilder(
        kind=claim.kind,
        spec=load_spec(),
        config=to_jsonable(config),
        claim=claim.text,
        not_covered=claim.not_covered,
        environment=measured(**environment),
        parents=tuple(parents),
    )
    keeper = Gatekeeper(builder.spec, kind=claim.kind, config=builder.config)
    return OpenRecord(builder, run_dir or Path("runs") / builder.id, json, keeper)


def print_record(
    record: Any,
    directory: Path,
    document: dict[str, Any],
    json: bool,
    show: Callable[[dict[str, Any]], None] = lambda document: None,
    directory_key: str = "run_dir",
) -> None:
    """Print the document of a verb with its record: as JSON, or by `show` and one closing line."""
    document |= {"record": record.id, directory_key: str(directory)}
    if not emit(document, json):
        show(document)
        print_line(f"record {directory / 'metadata.json'}  ({record.id})")
