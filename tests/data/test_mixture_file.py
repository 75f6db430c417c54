"""The TOML file of a mixture: paths beside it, and every mistake named."""

import pytest

from stackproof import config
from stackproof.spec.errors import ConfigError

MIXTURE = """
decontaminate = ["exam.jsonl"]
[[source]]
name = "web"
paths = ["texts/*.jsonl"]
weight = 2.0
[[source]]
name = "docs"
kind = "stdlib-docs"
[tokenizer]
kind = "byte"
"""


def mixture_file(tmp_path, change=lambda text: text):
    path = tmp_path / "mixture.toml"
    path.write_text(change(MIXTURE))
    return path


def test_paths_of_a_mixture_file_are_relative_to_it(tmp_path):
    cfg = config.load_mixture(mixture_file(tmp_path))
    web, docs = cfg.corpus.sources
    assert web.paths == (str(tmp_path / "texts/*.jsonl"),) and cfg.decontaminate == (
        str(tmp_path / "exam.jsonl"),
    )
    assert (web.kind, web.weight, docs.kind, docs.weight, cfg.tokenizer.kind) == (
        "files",
        2.0,
        "stdlib-docs",
        1.0,
        "byte",
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("weight", "wieght", r"wieght[\s\S]*nearest: weight"),
        ('name = "docs"', 'name = "web"', "two sources are called web"),
        (
            "weight = 2.0",
            "floor = 0.7\n[[source]]\nname = 'b'\npaths = ['x']\nfloor = 0.4",
            r"floors of web, b sum to 1\.1",
        ),
        (
            "weight = 2.0",
            "floor = 0.7\ncap = 0.5",
            r"source web: floor \(0\.7\) is above its cap \(0\.5\)",
        ),
        ("weight = 2.0", "cap = 1.5", "cap"),
        ('name = "web"', 'name = "Web!"', "name"),
        ('paths = ["texts/*.jsonl"]', "", "paths"),
        (MIXTURE, "[tokenizer]\nkind = 'byte'", "has no source"),
        ("[tokenizer]", "[corpus]\nkind = 'files'\n[tokenizer]", r"\[\[source\]\] tables"),
    ],
)
def test_what_is_wrong_in_a_mixture_file_is_named(tmp_path, old, new, says):
    path = mixture_file(tmp_path, lambda text: text.replace(old, new))
    with pytest.raises(ConfigError, match=says) as error:
        config.load_mixture(path)
    assert "mixture.toml" in str(error.value)
