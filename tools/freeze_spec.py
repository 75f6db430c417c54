"""Appends the current spec version to spec/releases.jsonl: its fingerprints and limits, for ever.

python tools/freeze_spec.py
Exit code 0: written. 6: that version is already committed with other content.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools/checkout")]

from stackproof.spec.archive import History  # noqa: E402
from stackproof.spec.gates import load_spec  # noqa: E402
from stackproof.spec.releases import FILE, frozen_release, parse_releases, release_line  # noqa: E402
from stackproof.spec.visible import print_visible  # noqa: E402


def freeze(root: Path) -> int:
    """Freeze the spec of a checkout. Lines that were never committed are replaced."""
    spec, path = load_spec(root), root / FILE
    release = frozen_release(spec)
    committed = History(root).git("cat-file", "blob", f"HEAD:{FILE}")
    if committed is None:
        committed = path.read_bytes() if path.is_file() else b""
    releases = parse_releases(committed, origin=FILE)
    if releases.get(spec.version, release) != release:
        print_visible(
            f"error: version {spec.version} is already frozen and the spec has changed\n"
            "  next  raise version in spec/spec.toml",
            file=sys.stderr,
        )
        return 6
    if spec.version not in releases:
        previous = list(releases.values())[-1] if releases else {}
        path.write_bytes(committed + release_line(previous, release))
    print_visible(f"froze {len(spec.gates)} gates as {spec.version} in {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(freeze(ROOT))
