"""The command line is what the spec says, and each verb is exercised by some test."""

import json
import subprocess
import sys

import pytest

from stackproof.cli import main
from stackproof.cli.surface import surface
from stackproof.spec import SPEC_DIR
from tests.processes import ROOT


def test_cli_matches_the_spec():
    assert surface() == json.loads((SPEC_DIR / "cli.json").read_text()), (
        "python -m stackproof.cli.surface > spec/cli.json"
    )


def test_every_verb_answers_help_without_torch():
    code = (
        "import sys\nfrom stackproof.cli.surface import surface\nimport typer, stackproof.cli\n"
        "assert surface()['verbs']\nassert 'torch' not in sys.modules and 'numpy' not in "
        "sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("verb", sorted(surface()["verbs"]))
def test_help_of_each_verb(verb):
    from typer.testing import CliRunner

    from stackproof.cli import app

    result = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


@pytest.mark.parametrize(
    ("said", "next_step"),
    [
        ("trian", "stack --help"),
        ("gates sho", "stack gates --help"),
        ("gates show", "stack gates show --help"),
    ],
)
def test_a_mistyped_command_is_sent_to_help_that_there_is(said, next_step, capsys):
    with pytest.raises(SystemExit) as ended:
        main(said.split())
    assert ended.value.code == 2 and f"next     {next_step}\n" in capsys.readouterr().err


def test_help_loads_no_large_library():
    """What makes help quick; benchmarks/startup.py measures it."""
    code = (
        "import sys\nfrom stackproof.cli import main\ntry:\n    main(['--help'])\n"
        "except SystemExit:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stderr.split())
    assert "Usage" in done.stdout and "stackproof.cli" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "datasets", "tokenizers", "pandas"}


def test_each_verb_is_run_by_a_test():
    text = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    text = " ".join(text.split())
    for verb in surface()["verbs"]:
        quoted = ", ".join(f'"{word}"' for word in verb.split())
        assert quoted in text, f"no test runs `stack {verb}`"
