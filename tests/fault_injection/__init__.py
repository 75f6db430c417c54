"""Faults injected on purpose: kills, full disks, flipped bits, hostile files, fuzzed input."""
