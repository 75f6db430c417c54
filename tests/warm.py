"""What every command computes anew, read before the commands are forked: the gates and the hashes
of their code.
"""

from stackproof.spec.gates import load_spec

SPEC_SHA256 = load_spec().sha256
