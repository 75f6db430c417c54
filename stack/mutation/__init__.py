"""Mutants of the stack: small random changes of the code that a run executes, judged by its gates."""
