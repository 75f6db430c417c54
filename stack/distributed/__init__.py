"""Several processes of one run: their launch, process group, mesh, and how they end together."""
