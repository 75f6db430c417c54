"""What must be true: gates, records, the ledger and the registry.
Imports nothing but pydantic and rfc8785.
"""

from pathlib import Path

SPEC_DIR = Path(__file__).resolve().parent
ROOT = SPEC_DIR.parent
