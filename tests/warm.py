"""What every command computes anew, read before the commands are forked: the gates and the hashes
of their code. No collection of garbage in a command goes over what is imported here.
"""

import gc

from stackproof.spec.gates import load_spec

SPEC_SHA256 = load_spec().sha256
gc.collect()
gc.freeze()
