"""Rules that hold spec, code, evidence, registry, documents and git against each other."""
