"""Records: acceptance into the ledger, archive, comparison, and repro bundles."""
