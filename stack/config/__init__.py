"""Configuration: a frozen tree in which a variant is a type, and every value knows where it came from."""

from stack.config.base import Frozen
from stack.config.data import (
    AnySource,
    Arm,
    BanditCurriculum,
    BestFit,
    BpeTokenizer,
    Built,
    ByteTokenizer,
    CharTokenizer,
    Concatenated,
    Curriculum,
    DataConfig,
    ExactDedup,
    Files,
    FilesSource,
    FileTokenizer,
    HashSplit,
    Language,
    Mixture,
    NearDedup,
    Pangram,
    StaticCurriculum,
    StdlibCode,
    StdlibCodeSource,
    StdlibDocs,
    StdlibDocsSource,
    TailSplit,
    check_shares,
)
from stack.config.load import known_keys, load_config, load_mixture, read_run_file, unknown_key, validate, validate_data
from stack.config.optim import AdamW, Cosine, Muon, Optim, Schedule, Wsd
from stack.config.run import (
    CheckpointConfig,
    EvalConfig,
    GatesConfig,
    ModelConfig,
    NeverStop,
    Patience,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
