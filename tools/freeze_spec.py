"""Writes spec/releases/<version>.json: the fingerprints and limits of the current spec version,
for ever.

python tools/freeze_spec.py
Exit code 0: written. 6: that version is already committed with other content.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools/checkout")]

from stackproof.spec.gates import frozen_release, load_spec, release_path  # noqa: E402


def freeze(root: Path) -> int:
    """Freeze the spec of a checkout."""
    spec = load_spec(root)
    path = release_path(spec.version, root)
    text = json.dumps(frozen_release(spec), indent=1, sort_keys=True) + "\n"
    committed = subprocess.run(
        ["git", "-C", str(root), "show", f"HEAD:{path.relative_to(root).as_posix()}"],
        capture_output=True,
        text=True,
    )
    if committed.returncode == 0 and committed.stdout != text:
        print(
            f"error: version {spec.version} is already frozen and the spec has changed\n  next  "
            "raise version in spec/spec.toml",
            file=sys.stderr,
        )
        return 6
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    print(f"froze {len(spec.gates)} gates as {path.relative_to(root)}")
    return 0


if __name__ == "__main__":
    sys.exit(freeze(ROOT))
