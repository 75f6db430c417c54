"""What the gates of corpus, data, tokenizer and curriculum judge of a data set and of a run."""

from stackproof.contracts.subject import Corpus, Curriculum, DataLoader, Tokenizer
from stackproof.data import tokenizer as tokenizers


class BuiltCorpus(Corpus):
    """TODO"""


class RunDataLoader(DataLoader):
    """TODO"""


class RunCurriculum(Curriculum):
    """TODO"""


class RunTokenizer(Tokenizer):
    """A tokenizer of the stack."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer = tokenizer
