"""Whether ids are those of the tokenizer that a trainer was given: they are decoded and encoded
again.

B batch, T tokens
"""

from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from torch import Tensor

from stackproof.contracts.events import IdsRead, Phase

TOKENS = 512  # read in each phase
ROW = 256  # tokens of one row


class TextReader:
    """Reads the first TOKENS of each phase, row by row. A tokenizer that cannot decode and encode
    is left out, as is one that raises an error on the ids.
    """

    def __init__(self, tokenizer: Any):
        able = all(hasattr(tokenizer, name) for name in ("encode", "decode", "all_special_ids"))
        self.tokenizer = tokenizer if able else None
        self._read: dict[Phase, tuple[int, int]] = {}

    def read(self, step: int, phase: Phase, ids_BT: Tensor, text_BT: Tensor) -> IdsRead | None:
        """The event of a phase, until enough of it is read."""
        n, same = self._read.get(phase, (0, 0))
        if self.tokenizer is None or n >= TOKENS:
            return None
        for ids, text in zip(ids_BT[:, :ROW].tolist(), text_BT[:, :ROW].tolist()):
            for part in self._parts(i for i, is_text in zip(ids, text) if is_text):
                try:
                    again = self._again(part)
                except Exception:  # of a tokenizer that is not ours
                    self.tokenizer = None
                    return None
                n, same = n + len(part), same + _n_same(part, again)
        self._read[phase] = n, same
        return IdsRead(step, phase, n, same)

    def _parts(self, ids: Iterator[int]) -> Iterator[list[int]]:
        """The stretches between special ids, which a tokenizer may surround with spaces."""
        special = set(self.tokenizer.all_special_ids)
        for is_special, part in groupby(ids, special.__contains__):
            if not is_special:
                yield list(part)

    def _again(self, ids: list[int]) -> list[int]:
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return self.tokenizer.encode(text, add_special_tokens=False)


def _n_same(ids: list[int], again: list[int]) -> int:
    """The number of ids that come again in their order. The first and the last count as they are
    the rest of a cut word.
    """
    blocks = SequenceMatcher(None, ids, again, autojunk=False).get_matching_blocks()
    edges = (ids[:1] != again[:1]) + (len(ids) > 1 and ids[-1:] != again[-1:])
    return min(len(ids), sum(block.size for block in blocks) + edges)
