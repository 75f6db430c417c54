"""The configuration page shows what the JSON schema of the configuration says."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from stackproof.config import RunConfig, known_keys
from tools.site_pages.config_keys import Key, config_page, sections


class Plain(BaseModel):
    """One way."""

    kind: Literal["plain"] = "plain"


class Windowed(BaseModel):
    """Another way."""

    kind: Literal["windowed"] = "windowed"
    width: int | None = Field(None, ge=1, description="tokens")


class Part(BaseModel):
    name: str


class Whole(BaseModel):
    """All of it."""

    seed: int = Field(ge=0, lt=2**31)
    mode: Literal["a", "b"] = "a"
    shares: dict[str, float] = {}
    names: tuple[str, ...] = Field(("x",), min_length=1)
    parts: tuple[Part, ...] = Field((), description="in order")
    way: Annotated[Plain | Windowed, Field(discriminator="kind")] = Plain()


def test_types_bounds_defaults_and_variants_are_those_of_the_schema():
    whole, part, plain, windowed = sections(Whole.model_json_schema())
    assert whole.meaning == "All of it." and whole.keys == [
        Key("seed", "int", "≥ 0, < 2^31", None, ""),
        Key("mode", "a | b", "", '"a"', ""),
        Key("shares", "dict[str, float]", "", "{}", ""),
        Key("names", "list[str]", "length ≥ 1", '["x"]', ""),
        Key("parts", "list[table]", "", "[]", "in order"),
    ]
    assert (part.prefix, part.kind, part.keys) == (
        "parts",
        "",
        [Key("parts.name", "str", "", None, "")],
    )
    assert (plain.prefix, plain.kind, plain.keys) == ("way", "plain", [])
    assert windowed.kind == "windowed" and windowed.keys == [
        Key("way.width", "int | None", "≥ 1", "none", "tokens")
    ]


def test_every_key_that_a_run_may_set_is_on_the_page():
    shown = {
        key.name for section in sections(RunConfig.model_json_schema()) for key in section.keys
    }
    variants = {key for key in known_keys() if key.endswith(".kind")}
    assert set(known_keys()) - variants - shown == set()
    assert "global L2 norm to which gradients are clipped" in config_page().text()
