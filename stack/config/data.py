"""The `data` section: corpus, split, tokenizer, deduplication, packing, and the mixture of
sources.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stackproof.config.base import Frozen

MAX_SHINGLE_WORDS = 16

Language = Literal[
    "en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "vi", "el", "ru", "uk", "zh", "ja", "ko",
    "ar", "fa", "he", "hi", "code",
]  # fmt: skip


class StdlibDocs(Frozen):
    """Docstrings and `pydoc_data.topics` of the running interpreter."""

    languages: ClassVar = ("en",)
    license: ClassVar = "PSF-2.0"
    kind: Literal["stdlib-docs"] = "stdlib-docs"


class StdlibCode(Frozen):
    """Source files of the running interpreter's standard library."""

    languages: ClassVar = ("code",)
    license: ClassVar = "PSF-2.0"
    kind: Literal["stdlib-code"] = "stdlib-code"


class Pangram(Frozen):
    """One sentence with every letter, repeated: a trivial corpus for tests of the pipeline. Its
    text is part of the code.
    """

    # of text that the code itself makes; filters keep it, and a source of files cannot declare it
    languages: ClassVar = ("synthetic",)
    license: ClassVar = "CC0-1.0"
    kind: Literal["pangram"] = "pangram"
    repeats: int = Field(200, ge=1, description="number of repetitions of the sentence")


class Files(Frozen):
    """Text, JSON-lines or parquet files, or folders of them; also compressed by gzip or
    zstandard.
    """

    kind: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1, description="files, folders or globs")
    documents: Literal["file", "paragraph", "line"] = Field(
        "file", description="unit of one document of a text file"
    )
    text_field: str = Field(
        "text", description="key of the text in a .jsonl line or .parquet column; dots reach inside"
    )
    languages: tuple[Language, ...] = Field(
        ("en",),
        min_length=1,
        description="languages of the text; they define the allowed scripts",
    )
    license: str = Field("unknown", description="licence of the text, for the record")


class MixtureSource(Frozen):
    """Name and shares of a source of a mixture."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="lower-case name, unique in the mixture"
    )
    weight: float = Field(
        1.0,
        ge=0,
        description="share of the rows relative to the other weights; with 0 only the floor "
        "applies",
    )
    cap: float = Field(
        1.0,
        ge=0,
        le=1,
        description="largest share of the rows of a window (0-1); 0 removes the source",
    )
    floor: float = Field(
        0.0, ge=0, le=1, description="smallest share of the rows of a window (0-1)"
    )

    @model_validator(mode="after")
    def _ordered(self):
        if self.floor > self.cap:
            raise ValueError(
                f"source {self.name}: floor ({self.floor:g}) is above its cap ({self.cap:g})"
            )
        return self


class StdlibDocsSource(MixtureSource, StdlibDocs):
    """The standard library's documentation as a source."""


class StdlibCodeSource(MixtureSource, StdlibCode):
    """The standard library's source files as a source."""


class FilesSource(MixtureSource, Files):
    """Files as a source."""


AnySource = Annotated[
    StdlibDocsSource | StdlibCodeSource | FilesSource, Field(discriminator="kind")
]


class Mixture(Frozen):
    """Several named sources, each with its share."""

    kind: Literal["mixture"] = "mixture"
    sources: tuple[AnySource, ...] = Field(
        min_length=1, description="in order; a document of several sources belongs to the first"
    )

    @model_validator(mode="after")
    def _consistent(self):
        check_shares(
            [s.name for s in self.sources], [(s.weight, s.cap, s.floor) for s in self.sources]
        )
        return self


class Built(Frozen):
    """A folder written by `stack data build`, with the split, tokenizer and sources of the
    build.
    """

    kind: Literal["built"] = "built"
    path: str = Field(description="the folder")


def check_shares(names: list[str], shares: list[tuple[float, float, float]]) -> None:
    """Refuse (weight, cap, floor) shares that no mixture can satisfy.
    Raises ValueError naming the source or the sum.
    """
    if twice := [n for i, n in enumerate(names) if n in names[:i]]:
        raise ValueError(f"two sources are called {twice[0]}")
    for name, (_, cap, floor) in zip(names, shares):
        if floor > cap:
            raise ValueError(f"source {name}: floor ({floor:g}) is above its cap ({cap:g})")
    floors = sum(floor for _, _, floor in shares)
    if floors > 1 + 1e-9:
        raise ValueError(
            f"the floors of {', '.join(n for n, s in zip(names, shares) if s[2])} sum to "
            f"{floors:g}; they must sum to at most 1"
        )
    alive = [s for s in shares if s[1] > 0]
    if not alive or sum(cap for _, cap, _ in alive) < 1 - 1e-9:
        raise ValueError(
            f"the caps sum to {sum(cap for _, cap, _ in alive):g}; they must sum to at least 1"
        )
    if not any(weight for weight, _, _ in alive):
        raise ValueError("every source with a cap above 0 has weight 0; give one a weight above 0")


class HashSplit(Frozen):
    """Split by the hash of the normalised document, so equal documents are on the same side."""

    kind: Literal["document-hash"] = "document-hash"
    validation_frac: float = Field(
        0.05, gt=0, lt=1, description="share of documents held out (0-1)"
    )


class TailSplit(Frozen):
    """Hold out the last part of every document; for corpora of one or few documents."""

    kind: Literal["tail"] = "tail"
    validation_frac: float = Field(
        0.1, gt=0, lt=1, description="share of each document's characters held out (0-1)"
    )


class BpeTokenizer(Frozen):
    """Byte-level BPE, trained on the training split only."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(
        1024,
        ge=258,
        description="entries including 256 bytes, the end-of-text token and the special tokens",
    )
    special_tokens: tuple[str, ...] = Field(
        (), description="control tokens besides the end-of-text token; text is never encoded as one"
    )


class ByteTokenizer(Frozen):
    """One entry per byte (256), and an end-of-text token."""

    kind: Literal["byte"] = "byte"


class CharTokenizer(Frozen):
    """One entry per character of the training split and an end-of-text token;
    other characters are dropped and counted.
    """

    kind: Literal["char"] = "char"


class FileTokenizer(Frozen):
    """An existing tokenizer.json: one of ours, or any in the Hugging Face format."""

    kind: Literal["file"] = "file"
    path: str = Field(description="the tokenizer.json")
    eos_token: str = Field(
        "", description="token that ends a document; empty: the first known one in the file"
    )


class ExactDedup(Frozen):
    """Drop documents that equal an earlier one up to case and white space."""

    kind: Literal["exact"] = "exact"


class NearDedup(Frozen):
    """Drop exact duplicates, and documents that share most word n-grams with an earlier one
    (MinHash, locality-sensitive hashing).
    """

    kind: Literal["near"] = "near"
    similarity_min: float = Field(
        0.8,
        ge=0.5,
        le=0.95,
        description="estimated Jaccard similarity from which a document is a duplicate (0-1)",
    )
    shingle_words: int = Field(
        5, ge=1, le=MAX_SHINGLE_WORDS, description="words of one compared n-gram"
    )


class Concatenated(Frozen):
    """Rows are windows of the concatenation of all documents. A row may begin with the end of the
    previous document.
    """

    kind: Literal["concatenated"] = "concatenated"


class BestFit(Frozen):
    """Documents are packed whole into rows by best fit. Attention is masked between documents, and
    positions start at 0 in each.
    """

    kind: Literal["best-fit"] = "best-fit"


class DataConfig(Frozen):
    corpus: Annotated[
        StdlibDocs | StdlibCode | Pangram | Files | Mixture | Built, Field(discriminator="kind")
    ] = StdlibDocs()
    split: Annotated[HashSplit | TailSplit, Field(discriminator="kind")] = HashSplit()
    tokenizer: Annotated[
        BpeTokenizer | ByteTokenizer | CharTokenizer | FileTokenizer, Field(discriminator="kind")
    ] = BpeTokenizer()
    filters: tuple[str, ...] = Field(
        (), description="additional filters as module:function, after the built-in ones"
    )
    dedup: Annotated[ExactDedup | NearDedup, Field(discriminator="kind")] = ExactDedup()
    decontaminate: tuple[str, ...] = Field(
        (),
        description="evaluation sets; documents that share 13 consecutive words with one are "
        "dropped",
    )
    decontaminate_fields: tuple[str, ...] = Field(
        (), description="keys of the text in .jsonl evaluation sets; empty: all keys with text"
    )
    packing: Annotated[Concatenated | BestFit, Field(discriminator="kind")] = Concatenated()
    on_exhausted: Literal["wrap", "error"] = Field(
        "wrap",
        description="at the end of the data: begin another epoch, or end the run with exit code 3",
    )
    verify: Literal["full", "size", "drawn"] = Field(
        "full",
        description=(
            "compare the hash of every shard at start, or only its size, or only the length of "
            "each shard when a row of it is first drawn"
        ),
    )


class Curriculum(Frozen):
    """Fields of every curriculum. Its values by source name override those of the mixture."""

    weights: dict[str, float] = Field({}, description="weight by source")
    caps: dict[str, float] = Field({}, description="largest share by source (0-1); 0 removes it")
    floors: dict[str, float] = Field({}, description="smallest share by source (0-1)")
    warmup_steps: int = Field(
        0, ge=0, description="first steps, in which only the warm-up sources are read"
    )
    warmup_sources: tuple[str, ...] = Field(
        (), description="sources of the warm-up; required with warmup_steps"
    )

    @model_validator(mode="after")
    def _consistent(self):
        if bool(self.warmup_steps) != bool(self.warmup_sources):
            raise ValueError(
                "curriculum.warmup_steps and curriculum.warmup_sources must be set together"
            )
        return self


class StaticCurriculum(Curriculum):
    """Fixed shares by weight. The source of every row is a pure function of seed and index."""

    kind: Literal["static"] = "static"


class BanditCurriculum(Curriculum):
    """A discounted UCB bandit. It shifts rows to the source with the largest drop of the held-out
    loss of all sources during its turns.
    """

    kind: Literal["bandit"] = "bandit"
    probe_every: int = Field(
        20, ge=1, description="steps of one turn; the held-out loss is measured at its end"
    )
    probe_windows: int = Field(
        8, ge=1, description="held-out windows of each source, the same in every turn"
    )
    focus_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of the rows for the source in focus, above its floor (0-1)",
    )
    discount: float = Field(
        0.97, gt=0, lt=1, description="weight of a turn relative to the next one (0-1)"
    )
    exploration: float = Field(
        0.5, ge=0, description="factor of the uncertainty added to a source's mean reward"
    )
