"""Until the tests of kernels are converted: the former place of the digest of a state."""

from stackproof.subject.training import digest as digest
