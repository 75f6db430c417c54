"""Fixtures of the command line's tests."""

from tests.cli.conftest import cli_cache  # noqa: F401
