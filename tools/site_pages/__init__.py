"""Pages of the site, from spec, museum and ledger. Needs the extra `docs`, not torch."""
