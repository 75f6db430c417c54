"""Mutants of the stack: small random changes of code that a run executes, judged by its gates."""
