"""Named random streams: each use of chance has its own seed,
derived from the run's seed by name.
"""

import hashlib

import torch


def stream_seed(seed: int, name: str, index: int = 0) -> int:
    """A 63-bit seed for the named stream; a pure function of its arguments."""
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, name: str, index: int = 0, device: str = "cpu") -> torch.Generator:
    """A fresh generator of the named stream."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, name, index))


def seed_default_generators(seed: int) -> None:
    """Seed torch's default generators. No step of a run draws from them: initialisation and
    sampling own their generators, and dropout is computed from places.
    """
    torch.manual_seed(stream_seed(seed, "dropout"))


def default_rng_state() -> dict[str, torch.Tensor]:
    """State of torch's default generators as uint8 tensors, for the checkpoint."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def set_default_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Put back what `default_rng_state` returned."""
    torch.set_rng_state(states["rng.cpu"].cpu())
    if "rng.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["rng.cuda"].cpu())
