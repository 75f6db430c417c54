"""Pages of the site, from the spec, the museum and the ledger. Needs the extra `docs`, not torch."""
