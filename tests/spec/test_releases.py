"""Releases of the spec are kept as changes and come back byte for byte."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackproof.spec import ROOT
from stackproof.spec.canonical import sha256_bytes
from stackproof.spec.errors import IntegrityError
from stackproof.spec.releases import (
    FILE,
    changes,
    frozen_release,
    merge,
    parse_releases,
    read_releases,
    release_line,
    release_text,
)

# sha256 of the files spec/releases/<version>.json, taken before they became lines.
FILES = {
    "1.0.0": "3f879513678605cce1831ff52c0be8a171bc4164ee1fa13e6a280c56fb03aab5",
    "1.1.0": "b98bbcbff76613cb7e45c5461c9a23614d36f73efef705fc239f130cd3641ef9",
    "1.2.0": "8611ca536f7857062a4b0c2b9981fe6be2150d941d680e3a02c935aea954b760",
    "1.3.0": "8b63363b25b8acab808db10ccba0211597851b773ecf9735a306dad240d2ecb8",
    "1.4.0": "9e99eace069ca7e779a6f7b80875dbb47db2b82bc08c810e6cbe08188030376f",
    "1.5.0": "6cc5626512f5898d2c5dbe25abde197a35db902bdbb2b1b798b0d2614ee3f824",
    "1.5.1": "eecc201dbbe104d7ee9d26d7c239fe7e115d8e5fad7427090e1219e8efa0475a",
    "1.6.0": "32de5bedd9f9e8de8218dbde60e35014ee18f9f28ae437fbfb4ce1370f6d5566",
    "1.6.1": "b0ae55e67ab34730a96d8e76c9aaf992858b9bb6f6c969c12c80399b0637c7f9",
    "1.6.2": "b481a7cc1aad37d569a99668eca60468489e36ac98254f26f6a1c022efeb7809",
    "1.7.0": "e95b8bed436a070607e7b71e6304b70b9a4d5384ce8c4ebc3e2a4637d2756605",
    "1.8.0": "7960a43d3e57bc4cec2bfacd24d723a9b1c0b31f582bdc083aad33047c0acec0",
    "1.9.0": "6a75470523637d0a21b3222e0ad4bc577e7e5bb176fda7f17e863a236f684cc8",
    "1.9.1": "529b3d60098678c7f4ff8de9b2b22f3b360c3d33c267a74081db71cd5dd5f9e1",
}
LEAF = st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=3)
DOCUMENT = st.recursive(
    st.dictionaries(st.text(max_size=2), LEAF, max_size=3),
    lambda inner: st.dictionaries(st.text(max_size=2), LEAF | inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("version", FILES)
def test_a_release_is_reconstructed_byte_for_byte(version):
    assert sha256_bytes(release_text(read_releases()[version])) == FILES[version]


def test_the_current_spec_is_released_or_newer_than_every_release(spec):
    releases = read_releases()
    if spec.version in releases:
        assert releases[spec.version] == frozen_release(spec)
    assert list(releases)[: len(FILES)] == list(FILES)


def test_every_edit_of_a_line_is_refused():
    data = (ROOT / FILE).read_bytes()
    lines = data.splitlines(keepends=True)
    first = json.loads(lines[0])
    for gate in first["patch"]["gates"].values():
        gate["fingerprint"] = "0" * 64
    for edited in (
        [json.dumps(first).encode() + b"\n", *lines[1:]],
        lines[1:],
        [*lines[:3], *lines[4:]],
        [lines[1], lines[0], *lines[2:]],
        [data[:100] + b"\n"],
    ):
        with pytest.raises(IntegrityError, match=FILE):
            parse_releases(b"".join(edited), origin=FILE)
    with pytest.raises(IntegrityError, match="released twice"):
        twice = release_line(read_releases()["1.9.1"], read_releases()["1.0.0"])
        parse_releases(b"".join(lines[:14]) + twice, origin=FILE)


@given(DOCUMENT, DOCUMENT)
def test_a_patch_turns_one_document_into_the_other(old, new):
    """Also in text, where 1, 1.0 and true differ."""
    assert json.dumps(merge(old, changes(old, new)), sort_keys=True) == json.dumps(
        new, sort_keys=True
    )
    assert changes(new, new) == {}


def test_a_line_holds_only_what_changed():
    old = {"version": "1.0.0", "sha256": "a", "gates": {"x": {"f": "1"}, "y": {"f": "2"}}}
    new = {"version": "1.0.1", "sha256": "b", "gates": {"x": {"f": "1"}, "z": {"f": "3"}}}
    patch = json.loads(release_line(old, new))["patch"]
    assert patch == {"sha256": "b", "gates": {"y": None, "z": {"f": "3"}}}
