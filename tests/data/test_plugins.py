"""Plug-ins are imported by permission: names that lie in a folder are data."""

import json
import sys

import pytest

from stackproof.config import load_config, recorded_config
from stackproof.data import build, plugins
from stackproof.data.prepare import prepare
from stackproof.recipes import recipe
from stackproof.spec.errors import ConfigError

NAME = "marking.inner:keep"


@pytest.fixture
def marking(tmp_path, monkeypatch):
    """The names that a package with a plug-in appends to when it is imported, or called."""
    package = tmp_path / "importable" / "marking"
    package.mkdir(parents=True)
    marker = tmp_path / "marker"
    mark = f"open({str(marker)!r}, 'a').write(__name__ + ' ')\n"
    (package / "__init__.py").write_text(mark)
    (package / "inner.py").write_text(mark + "def keep(text, languages):\n    return False\n")
    monkeypatch.syspath_prepend(package.parent)
    yield lambda: marker.read_text().split() if marker.exists() else []
    for name in ("marking", "marking.inner"):
        sys.modules.pop(name, None)


@pytest.fixture
def cfg(text_file):
    source = json.dumps([str(text_file)])
    sets = ("data.corpus.kind=files", f"data.corpus.paths={source}", "data.tokenizer.kind=byte")
    return load_config(recipe("pocket"), sets=(*sets, f'data.filters=["{NAME}"]'))


def test_a_plugin_is_imported_only_with_permission(marking):
    with pytest.raises(ConfigError, match=f"names the plug-in {NAME}"):
        plugins.load([NAME])
    other = plugins.permitted(["another:one"], origin="runs/theirs")
    with other, pytest.raises(ConfigError, match="runs/theirs names") as error:
        plugins.load(["another:one", NAME])
    assert f"--plugin {NAME}" in error.value.next_step and error.value.exit_code == 2
    assert marking() == []
    with plugins.permitted([NAME]):
        assert [p.name for p in plugins.load([NAME])] == [NAME]
    assert marking() == ["marking", "marking.inner"]
    with pytest.raises(ConfigError):
        plugins.load([NAME])


def test_the_source_of_a_plugin_is_read_without_importing_its_packages(marking):
    assert "def keep" in plugins.source(NAME)
    assert marking() == []
    for absent in ("marking.none:f", "marking.inner.os:f", ":f", "..os:f", "no_such:f"):
        with pytest.raises(ConfigError, match="cannot be found"):
            plugins.source(absent)


def test_only_the_command_line_and_a_run_file_choose(cfg, tmp_path):
    run, overrides = cfg
    assert plugins.chosen(run.data, overrides) == (NAME,)
    file = tmp_path / "run.toml"
    file.write_text(f'[data]\nfilters = ["{NAME}"]\n')
    assert plugins.chosen(*_data(load_config(recipe("pocket"), run_file=file))) == (NAME,)
    read = recorded_config(run.to_dict())
    assert read.data.filters == (NAME,)
    assert plugins.chosen(*_data(load_config(read, sets=("optim.lr=1e-3",)))) == ()


def _data(loaded):
    cfg, overrides = loaded
    return cfg.data, overrides


def test_a_built_data_set_names_plugins_that_stay_data(cfg, tmp_path, marking):
    data = cfg[0].data
    with plugins.permitted([NAME]):
        build.build(data, tmp_path / "built")
    seen = len(marking())
    sets = ("data.corpus.kind=built", f"data.corpus.path={json.dumps(str(tmp_path / 'built'))}")
    adopted, overrides = load_config(recipe("pocket"), sets=sets)
    assert adopted.data.filters == (NAME,)
    assert plugins.chosen(adopted.data, overrides) == ()
    for module in ("marking", "marking.inner"):
        sys.modules.pop(module, None)
    assert prepare(adopted.data).train.n_tokens
    assert len(marking()) == seen


def test_prepared_data_are_used_without_permission_and_made_only_with_it(cfg, tmp_path, marking):
    data, cache = cfg[0].data, tmp_path / "cache"
    with pytest.raises(ConfigError, match="names the plug-in"):
        prepare(data, cache_dir=cache)
    assert marking() == []
    with plugins.permitted([NAME]):
        first = prepare(data, cache_dir=cache)
    seen = len(marking())
    for module in ("marking", "marking.inner"):
        sys.modules.pop(module, None)
    assert prepare(data, cache_dir=cache).manifest == first.manifest
    assert len(marking()) == seen
