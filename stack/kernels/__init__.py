"""Fast operations, each beside a slow reference with the same arguments; `dispatch` says which one runs and why."""
