"""Plain technical English: the prose of the project avoids the patterns of prose.toml."""

import pytest

from tests.prose import ROOT, RULES, Place, listed, pattern_in, places

FILE = '''"""Returns the sum.

What the gate says.
"""
# Nobody reads this.
NAME = "what the gate says, as data"


def f(x):
    """Raises ValueError for what is no `nobody says`."""
    if x:
        raise ValueError(f"the file {x} wants a repair", "it goes on")
    return option(help="asks for a name")
'''


def test_prose_has_none_of_the_patterns():
    assert not (found := places(ROOT)), listed(found)


@pytest.mark.parametrize("pattern", RULES["pattern"], ids=lambda p: p["name"])
def test_a_pattern_finds_its_example_and_not_the_better_wording(pattern):
    assert pattern_in(pattern["avoid"])
    assert not pattern_in(pattern["better"])
    assert pattern["why"]


def test_each_pattern_is_needed_for_its_example():
    """Without the pattern itself, or one before it, its example would pass."""
    first = [pattern_in(p["avoid"]) for p in RULES["pattern"]]
    assert first == [p["name"] for p in RULES["pattern"]]


def test_docstrings_comments_errors_help_and_pages_are_read_and_code_is_not(tmp_path):
    (tmp_path / "stack").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "stack/a.py").write_text(FILE)
    (tmp_path / "docs/a.md").write_text(
        "```sh\nwhoever says\n```\nThe page tells `what it says`.\n"
    )
    (tmp_path / "README.md").write_text("Plain.\n")
    (tmp_path / "CONTRIBUTING.md").write_text("The build goes on.\n")
    found = {(p.path, p.line, p.pattern) for p in places(tmp_path)}
    assert found == {
        ("stack/a.py", 3, "speech of a machine"),
        ("stack/a.py", 5, "anonymous person"),
        ("stack/a.py", 10, "negated noun"),
        ("stack/a.py", 12, "mind of a machine"),
        ("stack/a.py", 12, "idiom"),
        ("stack/a.py", 13, "speech of a machine"),
        ("docs/a.md", 4, "speech of a machine"),
        ("CONTRIBUTING.md", 1, "idiom"),
    }


def test_sentences_of_toml_files_and_templates_are_read_and_their_data_is_not(tmp_path):
    (tmp_path / "README.md").write_text("Plain.\n")
    (tmp_path / "CONTRIBUTING.md").write_text("Plain.\n")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/a.md.j2").write_text("{% if nobody %}\n{{ says }} it goes on\n{% endif %}\n")
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec/a.toml").write_text(
        'title = "The run goes on"\n'
        'old = "nobody says"\n'
        'limits.x = { unit = "what it says", why = "It says \\"so\\"." }\n'
        'story = """\nPlain. \\\nThe `run says` more,\nand nobody reads it."""\n'
    )
    found = {(p.path, p.line, p.pattern) for p in places(tmp_path)}
    assert found == {
        ("tools/a.md.j2", 2, "idiom"),
        ("spec/a.toml", 1, "idiom"),
        ("spec/a.toml", 3, "speech of a machine"),
        ("spec/a.toml", 7, "anonymous person"),
    }


def test_a_place_is_listed_with_file_line_and_pattern():
    found = [Place("a/b.py", 3, "idiom", "it goes on"), Place("c.md", 1, "idiom", "it went on")]
    assert listed(found) == "a/b.py:3: idiom: it goes on\nc.md:1: idiom: it went on"
