"""What must be true: gates, records, the ledger and the registry.
Imports nothing but pydantic and rfc8785.
"""

from pathlib import Path

SPEC_DIR = Path(__file__).resolve().parent
# The checkout, or the folder of the installed package, which holds spec/ and contracts/ as
# well and what is in stack/.
ROOT = SPEC_DIR.parent
IN_CHECKOUT = (ROOT / "stack").is_dir()
