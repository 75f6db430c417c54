"""Rules about released models."""

from stackproof.spec.registry import REQUIRED_RECORDS, Release
from tools.integrity.core import At, Messages, Repo, each_release, number, rule
from tools.integrity.glance import trained_by

# Sections that a shorter run of one model has in common with it.
OF_THE_MODEL = ("recipe", "model", "data", "optim", "curriculum", "seed")


@rule(
    "REG-REF",
    title="A release's commit and tag exist",
    why="A release that cannot be checked out cannot be verified.",
    hint="commit or tag it; if the tag exists elsewhere, run git push --tags and git fetch --tags",
    over=each_release,
)
def reg_ref(repo: Repo, model: Release) -> Messages:
    if model.commit not in repo.ancestors:
        yield f"{model.id}: commit {model.commit[:12]} is not an ancestor of HEAD"
    if model.tag and not (repo.git("tag", "-l", model.tag) or "").strip():
        yield f"{model.id}: tag {model.tag} not found locally; if unpushed run `git push --tags`"
    elif model.tag:
        tagged = (repo.git("rev-parse", f"refs/tags/{model.tag}^{{commit}}") or "").strip()
        if tagged != model.commit:
            yield f"{model.id}: tag {model.tag} is at {tagged[:12]}, not at {model.commit[:12]}"


@rule(
    "REG-COMMIT",
    title="A release names the commit that trained it",
    why="The code of another commit does not make the released weights.",
    hint="write the commit of the training record",
    over=each_release,
)
def reg_commit(repo: Repo, model: Release) -> Messages:
    record = repo.records.get(model.records.get("train", ""))
    if record is not None and record.code.commit != model.commit:
        yield (
            f"{model.id}: commit {model.commit[:12]}, its training record is of "
            f"{record.code.commit[:12]}"
        )


@rule(
    "REG-RECORDS",
    title="A release has its four records, of the right kind, and they succeeded",
    why="A model is judged by its training, evaluation, resume and falsification records.",
    hint="make the run, stack evidence add DIR, then name it in the registry",
    over=each_release,
)
def reg_records(repo: Repo, model: Release) -> Messages:
    for kind in REQUIRED_RECORDS:
        named = model.records.get(kind, "")
        record = repo.records.get(named)
        if record is None:
            yield f"{model.id}: no valid {kind} record {named!r} in the ledger"
        elif record.kind != kind:
            yield f"{model.id}: {record.id} is of kind {record.kind}, not {kind}"
        elif not record.succeeded:
            yield f"{model.id}: {record.id} ended as {record.status}"


@rule(
    "REG-KIN",
    title="Evaluation and resume of a release are those of its model",
    why="A record of another model proves nothing about the released one.",
    hint="evaluate the released checkpoint, certify the resume of its recipe, and add the records",
    over=each_release,
)
def reg_kin(repo: Repo, model: Release) -> Messages:
    train, evaluate, resume = (
        repo.records.get(model.records.get(kind, "")) for kind in ("train", "evaluate", "resume")
    )
    if train and evaluate and train.id not in evaluate.parents:
        yield f"{model.id}: {evaluate.id} is not of a checkpoint of {train.id}"
    if train and resume:
        ours, others = trained_by(train), trained_by(resume)
        for section in (s for s in OF_THE_MODEL if ours.get(s) != others.get(s)):
            yield f"{model.id}: {resume.id} resumed a run with another {section}"


@rule(
    "REG-FILES",
    title="A release has its card, its recipe and its papers",
    why="A released model needs a description and the recipe that made it.",
    hint="write the missing file",
    over=each_release,
)
def reg_files(repo: Repo, model: Release) -> Messages:
    for path in ("README.md", "CHANGELOG.md", "spec/CHANGELOG.md", "LICENSE"):
        if not (repo.root / path).is_file():
            yield At("is missing, and a release needs it", path=path)
    if not (repo.root / model.card).is_file():
        yield f"{model.id}: its card {model.card} does not exist"
    files = (repo.root / "stack" / "recipes").glob("*.py")
    if not any(model.recipe.replace("-", "_") in repo.python_functions(f) for f in files):
        yield f"{model.id}: there is no recipe {model.recipe}"


@rule(
    "REG-PARAMS",
    title="The parameter count follows from the configuration",
    why="A name that promises 120 million parameters over 99 million is a false claim.",
    hint="write the number the formula gives",
    over=each_release,
)
def reg_params(repo: Repo, model: Release) -> Messages:
    if record := repo.records.get(model.records.get("train", "")):
        stated = number(record, "n_params")  # DERIVED compares it with the formula
        if model.n_params != stated:
            yield f"{model.id}: n_params = {model.n_params}, its training record has {stated}"


@rule(
    "REG-WEIGHTS",
    title="Training, evaluation and release are of the same weights",
    why="An evaluation of other weights proves nothing about the released ones.",
    hint="evaluate the released checkpoint and add that record",
    over=each_release,
)
def reg_weights(repo: Repo, model: Release) -> Messages:
    hashes = {"weights": model.weights_sha256, "tokenizer": model.tokenizer_sha256}
    for kind, side in (("train", "outputs"), ("evaluate", "inputs")):
        if record := repo.records.get(model.records.get(kind, "")):
            files = {a.sha256 for a in getattr(record, side)}
            for name in (name for name, sha256 in hashes.items() if sha256 not in files):
                yield f"{model.id}: the {name} are not among the {side} of its {kind} record"
