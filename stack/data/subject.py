"""What the gates of corpus, data, tokenizer and curriculum judge of a data set and of a run."""

from stackproof.contracts.subject import Corpus, Curriculum, DataLoader, Tokenizer
from stackproof.data.shards import TokenStream


class BuiltCorpus(Corpus):
    """TODO"""


class RunDataLoader(DataLoader):
    """TODO"""

    def __init__(self, stream: TokenStream, seq_len: int):
        self.stream, self.seq_len = stream, seq_len

    @property
    def n_rows(self) -> int:
        return self.stream.n_windows(self.seq_len)


class RunCurriculum(Curriculum):
    """TODO"""


class RunTokenizer(Tokenizer):
    """TODO"""
