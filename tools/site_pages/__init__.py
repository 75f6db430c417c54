"""Pages of the site that are written from the spec, the museum and the ledger.
Imports spec, the standard library and mkdocs only.
"""
