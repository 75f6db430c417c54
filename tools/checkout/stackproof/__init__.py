"""`stackproof` from a checkout that is not installed: put tools/checkout on PYTHONPATH.

Installed, spec/ and contracts/ are packages below stack/. Here the package looks for its modules in
stack/ first, and then in the checkout itself. Needs the dependencies of what is imported, no build
and no network.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_root = Path(__file__).resolve().parents[3]
_spec = spec_from_file_location(
    __name__,
    _root / "stack/__init__.py",
    submodule_search_locations=[str(_root / "stack"), str(_root)],
)
sys.modules[__name__] = module_from_spec(_spec)  # the real package takes the place of this module
_spec.loader.exec_module(sys.modules[__name__])
