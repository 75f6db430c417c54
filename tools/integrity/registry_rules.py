"""Rules about released models."""

from collections.abc import Iterator

from stackproof.spec import formulas
from stackproof.spec.registry import REQUIRED_RECORDS
from tools.integrity.core import Repo, rule
from tools.integrity.evidence_rules import number

Found = Iterator[tuple[str, int, str]]
PATH = "evidence/registry.toml"


@rule(
    "REG-REF",
    title="A release's commit and tag exist",
    why="A release nobody can check out is a rumour.",
    hint="commit or tag it; if the tag exists elsewhere, run git push --tags and git fetch --tags",
)
def reg_ref(repo: Repo) -> Found:
    for model in repo.registry:
        if model.commit not in repo.ancestors:
            yield PATH, 0, f"{model.id}: commit {model.commit[:12]} is not an ancestor of HEAD"
        if model.tag and not (repo.git("tag", "-l", model.tag) or "").strip():
            yield (
                PATH,
                0,
                f"{model.id}: tag {model.tag} not found locally; if unpushed run `git push --tags`",
            )


@rule(
    "REG-RECORDS",
    title="A release has its four records, of the right kind, and they succeeded",
    why=(
        "A model without its training, evaluation, resume and falsification records cannot be "
        "judged."
    ),
    hint="make the run, stack evidence add DIR, then name it in the registry",
)
def reg_records(repo: Repo) -> Found:
    for model in repo.registry:
        for kind in REQUIRED_RECORDS:
            record = repo.records.get(model.records.get(kind, ""))
            if record is None:
                yield (
                    PATH,
                    0,
                    (
                        f"{model.id}: no valid {kind} record {model.records.get(kind, '')!r} in "
                        "the ledger"
                    ),
                )
            elif record.kind != kind:
                yield PATH, 0, f"{model.id}: {record.id} is of kind {record.kind}, not {kind}"
            elif not record.succeeded:
                yield PATH, 0, f"{model.id}: {record.id} ended as {record.status}"


@rule(
    "REG-FILES",
    title="A release has its card, its recipe and its papers",
    why="A released model without a card was never described.",
    hint="write the missing file",
)
def reg_files(repo: Repo) -> Found:
    for path in ("README.md", "CHANGELOG.md", "spec/CHANGELOG.md", "LICENSE"):
        if repo.registry and not (repo.root / path).is_file():
            yield path, 0, "is missing, and a release stands on it"
    recipes = "".join(
        p.read_text("utf-8") for p in sorted((repo.root / "stack" / "recipes").glob("*.py"))
    )
    for model in repo.registry:
        if not (repo.root / model.card).is_file():
            yield PATH, 0, f"{model.id}: its card {model.card} does not exist"
        if f"def {model.recipe.replace('-', '_')}(" not in recipes:
            yield PATH, 0, f"{model.id}: there is no recipe {model.recipe}"


@rule(
    "REG-PARAMS",
    title="The parameter count follows from the configuration",
    why="A name that promises 120 million parameters over 99 million is a false claim.",
    hint="write the number the formula gives",
)
def reg_params(repo: Repo) -> Found:
    for model in repo.registry:
        record = repo.records.get(model.records.get("train", ""))
        if record is None:
            continue
        expected = formulas.parameter_count(
            record.config["model"], int(number(record, "vocab_size"))
        )
        if not model.n_params == expected == number(record, "n_params"):
            yield (
                PATH,
                0,
                (
                    f"{model.id}: n_params = {model.n_params}, record "
                    f"{number(record, 'n_params'):.0f}, formula {expected}"
                ),
            )


@rule(
    "REG-WEIGHTS",
    title="Training, evaluation and release are of the same weights",
    why="An evaluation of other weights says nothing about these.",
    hint="evaluate the released checkpoint and add that record",
)
def reg_weights(repo: Repo) -> Found:
    for model in repo.registry:
        for kind, side in (("train", "outputs"), ("evaluate", "inputs")):
            record = repo.records.get(model.records.get(kind, ""))
            files = {a.sha256 for a in getattr(record, side)} if record else set()
            for name, sha256 in (
                ("weights", model.weights_sha256),
                ("tokenizer", model.tokenizer_sha256),
            ):
                if record and sha256 not in files:
                    yield (
                        PATH,
                        0,
                        f"{model.id}: the {name} are not among the {side} of its {kind} record",
                    )
