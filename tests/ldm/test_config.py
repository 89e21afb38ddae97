from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.config import build, claim_run_folder, difference, dump, load, load_section, to_values
from ldm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 4
    rate: float = 0.5
    kind: Literal["red", "green"] = "red"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width: found {self.width}; allowed is 1 or more")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    sizes: tuple[int, ...] = (1, 2)
    limit: float | None = None
    flag: bool = False


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_overrides_and_defaults(tmp_path):
    path = write(tmp_path, "name: a\ninner: {width: 8}\nsizes: [3]\n")
    config = load(Outer, path, ["inner.rate=1e-4", "other.kind=green", "flag=true", "limit=3"])
    expected = Outer(
        name="a", inner=Inner(width=8, rate=1e-4), other=Inner(kind="green"), sizes=(3,), flag=True, limit=3.0
    )
    assert config == expected
    assert isinstance(config.limit, float)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("name: a\ninnner: {}", [], "innner: unknown key; did you mean inner?"),
        ("name: a\ninner: {widht: 3}", [], "inner.widht: unknown key; did you mean inner.width?"),
        ("name: a", ["inner.width=many"], "inner.width: found 'many' (text); allowed is a whole number"),
        ("name: a", ["inner.width=1.5"], "inner.width: found 1.5 (number); allowed is a whole number"),
        ("name: a", ["inner.width=true"], "inner.width: found True (true/false); allowed is a whole number"),
        ("name: a", ["flag=1"], "flag: found 1 (whole number); allowed is true or false"),
        ("name: a", ["inner.kind=gren"], "allowed is one of red, green; did you mean green?"),
        ("name: a", ["inner.width=0"], "inner.width: found 0; allowed is 1 or more"),
        ("name: a", ["sizes=[1, x]"], "sizes[1]: found 'x' (text); allowed is a whole number"),
        ("name: a", ["limit=high"], "limit: found 'high' (text); allowed is a number or null"),
        ("name: a", ["inner"], "override 'inner': allowed is key.sub=value"),
        ("name: a", ["name.x=1"], "'name' holds 'a' (text), so nothing can be set inside it"),
        ("inner: {}", [], "name: missing; it is required (text)"),
        ("name: a\nname: b", [], "the key 'name' is written twice"),
        ("name: [", [], "not valid YAML"),
        ("- 1", [], "a config is a mapping"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_finding_and_cure(tmp_path, text, overrides, expected):
    with pytest.raises(UserError) as caught:
        load(Outer, write(tmp_path, text), overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load(Outer, tmp_path / "none.yaml")


def test_an_override_changes_only_the_section_it_names(tmp_path):
    path = write(tmp_path, "name: a\ninner: &shared {width: 8}\nother: *shared\n")
    config = load(Outer, path, ["inner.width=9"])
    assert (config.inner.width, config.other.width) == (9, 8)


def test_merge_keys_work_and_may_be_overwritten(tmp_path):
    path = write(tmp_path, "name: a\ninner: &shared {width: 8, rate: 2}\nother: {<<: *shared, width: 3}\n")
    config = load(Outer, path)
    assert config.other == Inner(width=3, rate=2.0)


@given(
    st.builds(
        Outer,
        name=st.text(),
        inner=st.builds(
            Inner, width=st.integers(1), rate=st.floats(allow_nan=False), kind=st.sampled_from(["red", "green"])
        ),
        other=st.none() | st.builds(Inner, width=st.integers(1)),
        sizes=st.lists(st.integers()).map(tuple),
        limit=st.none() | st.floats(allow_nan=False),
        flag=st.booleans(),
    )
)
def test_dump_and_build_are_inverse(config):
    import yaml

    assert build(Outer, yaml.safe_load(dump(config))) == config


def test_difference_names_dotted_keys():
    old, new = to_values(Outer(name="a")), to_values(Outer(name="a", inner=Inner(width=9)))
    assert list(difference(old, new)) == [("inner.width", 4, 9)]


def test_run_folder_takes_the_same_config_and_refuses_another(tmp_path):
    claim_run_folder(Outer(name="a"), tmp_path / "run", free=("sizes",))
    claim_run_folder(Outer(name="a", sizes=(5,)), tmp_path / "run", free=("sizes",))
    with pytest.raises(UserError, match=r"inner\.width: found 9 .* began with 4"):
        claim_run_folder(Outer(name="a", inner=Inner(width=9)), tmp_path / "run", free=("sizes",))
    assert load(Outer, tmp_path / "run" / "config.yaml").sizes == (5,)


def test_a_run_goes_on_that_began_before_a_key_existed(tmp_path):
    write(tmp_path, "name: a\ninner: {width: 4, rate: 0.5}\n")
    claim_run_folder(Outer(name="a"), tmp_path, free=())
    write(tmp_path, "name: a\ninner: {width: 4, rate: 0.5}\n")
    with pytest.raises(UserError, match=r"inner\.kind: found 'green' .* began with 'red'"):
        claim_run_folder(Outer(name="a", inner=Inner(kind="green")), tmp_path, free=())


def test_load_section(tmp_path):
    path = write(tmp_path, "inner: {width: 7}\nunknown: 3\n")
    assert load_section(Inner, path, "inner").width == 7
    with pytest.raises(UserError, match="found no section 'nothing'"):
        load_section(Inner, path, "nothing")
