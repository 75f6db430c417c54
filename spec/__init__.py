"""Gates, records, the ledger and the registry.
Imports nothing but pydantic and rfc8785.
"""

from pathlib import Path

SPEC_DIR = Path(__file__).resolve().parent
# The checkout; for an installed package, the folder with spec/, contracts/ and the files of stack/.
ROOT = SPEC_DIR.parent
IN_CHECKOUT = (ROOT / "stack").is_dir()
