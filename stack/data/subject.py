"""What the gates of corpus, data, tokenizer and curriculum judge of a data set and of a run."""

from dataclasses import dataclass
from typing import Any

from stackproof.contracts.subject import Corpus, Curriculum, DataLoader, Tokenizer
from stackproof.data.prepare import Dataset


class BuiltCorpus(Corpus):
    """TODO"""


class RunDataLoader(DataLoader):
    """TODO"""


class RunCurriculum(Curriculum):
    """TODO"""


@dataclass(frozen=True)
class RunTokenizer(Tokenizer):
    """TODO"""

    dataset: Dataset

    @property
    def tokenizer(self) -> Any:
        return self.dataset.tokenizer
