"""All rules, registered by their import, and what they find."""

from pathlib import Path

from tools.integrity import (  # noqa: F401
    archive_rules,
    arithmetic_rules,
    binding_rules,
    blocks,
    claim_rules,
    docs_rules,
    evidence_rules,
    finding_rules,
    kinship_rules,
    pin_rules,
    registry_rules,
    repo_rules,
    spec_rules,
)
from tools.integrity.core import Finding, Repo, findings_in


def check(root: Path) -> list[Finding]:
    """All findings of all rules in a checkout, ordered by rule and place, each once."""
    return findings_in(Repo(root))
