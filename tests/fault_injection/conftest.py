"""Fixtures of the command line's tests."""

from tests.cli.conftest import cli_cache, in_process  # noqa: F401
