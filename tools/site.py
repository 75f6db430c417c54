"""Hook of mkdocs: writes the pages of gates, museum, runs, models and reference from the spec and
the ledger, at build time.

`extra.evidence_dir` and `extra.repository_dir` in mkdocs.yml point elsewhere than `evidence/` and
the folder of mkdocs.yml. Nothing is written below `docs/`. To look at the pages as Markdown, call
`generated_pages(load_world(root, evidence))`.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path[:0] = [str(ROOT), str(ROOT / "tools/checkout")]

from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.exceptions import PluginError  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page as MkDocsPage  # noqa: E402

from stackproof.spec.errors import StackproofError  # noqa: E402
from tools.site_pages import home, reference  # noqa: E402
from tools.site_pages.benchmarks import benchmarks_page  # noqa: E402
from tools.site_pages.config_keys import config_page  # noqa: E402
from tools.site_pages.data import data_index  # noqa: E402
from tools.site_pages.findings import findings_page  # noqa: E402
from tools.site_pages.gates import coverage_page, gate_page, gates_index  # noqa: E402
from tools.site_pages.models import model_page, models_index  # noqa: E402
from tools.site_pages.museum import museum_page, room_pages  # noqa: E402
from tools.site_pages.proof import failures_page, margins_page, matrix_page, symptoms_page  # noqa: E402
from tools.site_pages.render import Page  # noqa: E402
from tools.site_pages.runs import archived_page, run_page, runs_index  # noqa: E402
from tools.site_pages.world import World, load_world  # noqa: E402

BLOCKS = home.BLOCKS | {"integrity-rules": reference.integrity_rules}
MARKER = re.compile(r"^<!-- site:([a-z-]+) -->$", re.MULTILINE)
_current: dict[str, World] = {}


def generated_pages(world: World) -> list[Page]:
    """Every generated page."""
    return [
        gates_index(world),
        *(gate_page(world, gate) for gate in world.spec.gates.values()),
        coverage_page(world),
        museum_page(world),
        *room_pages(world),
        symptoms_page(world),
        matrix_page(world),
        margins_page(world),
        failures_page(world),
        findings_page(world),
        runs_index(world),
        *(run_page(world, record) for record in world.records.values()),
        *(archived_page(archived) for archived in world.unread),
        data_index(world),
        benchmarks_page(world),
        models_index(world),
        *(model_page(world, model) for model in world.releases),
        reference.cli_page(),
        config_page(),
        reference.errors_page(),
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the machine-readable files."""
    base = Path(config.config_file_path).parent
    root = base / config.extra.get("repository_dir", ".")
    evidence = base / config.extra.get("evidence_dir", root / "evidence")
    try:
        world = _current["world"] = load_world(root.resolve(), evidence.resolve())
        pages = generated_pages(world)
        machine = {"evidence.json": home.evidence_json(world), "badge.json": home.badge_json(world)}
    except StackproofError as e:
        raise PluginError(f"the site cannot be written: {e}") from e
    for page in pages:
        files.append(File.generated(config, page.path, content=page.text()))
    for name, text in machine.items():
        files.append(File.generated(config, name, content=text + "\n"))
    return files


def on_page_markdown(markdown: str, page: MkDocsPage, config: MkDocsConfig, files: Files) -> str:
    """Put generated blocks where a hand-written page marks a place for them:
    `<!-- site:NAME -->` alone on a line.
    """

    def block(match: re.Match) -> str:
        if match[1] not in BLOCKS:
            raise PluginError(
                f"{page.file.src_uri}: no block is called {match[1]}; known: {', '.join(BLOCKS)}"
            )
        try:
            return BLOCKS[match[1]](_current["world"], page.file.src_uri)
        except StackproofError as e:
            raise PluginError(f"{page.file.src_uri}: {e}") from e

    return MARKER.sub(block, markdown)
