"""What exports and imports are tested with."""

import pytest

from stackproof.contracts.keeper import Gatekeeper
from stackproof.data.tokenizer import Bytes
from stackproof.export import huggingface


@pytest.fixture(scope="session")
def transformers():
    """The other library, quiet. It is in the extras hf and dev;
    without it nothing can be compared.
    """
    library = pytest.importorskip(
        "transformers",
        reason="parity is measured against transformers: pip install 'stackproof[hf]'",
    )
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


@pytest.fixture
def exported(spec, tmp_path):
    """Exports a model with a byte tokenizer to a fresh folder, under all gates."""

    def export(model, out=None, **options):
        keeper = Gatekeeper(spec, kind="export")
        out = out or tmp_path / "out"
        huggingface.export(
            model, Bytes(), out, keeper, **({"card": lambda folder, made: None} | options)
        )
        return out, {g.id: g for g in keeper.results()}

    return export
