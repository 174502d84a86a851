"""Recipes: those that are shipped, overrides, and messages that say where the mistake is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from dfq.cli.main import cli
from dfq.errors import UserError
from dfq.recipe import Recipe, find_recipe, load_recipe, shipped_recipes

SHIPPED = sorted(shipped_recipes())


def knobs(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        # `overrides` maps layer names: it is one knob, whatever it holds.
        if isinstance(value, dict) and key != "overrides":
            yield from knobs(value, f"{above}{key}.")
        else:
            yield above + key


def commands(path: Path) -> list[list[str]]:
    lines = path.read_text().splitlines()
    return [shlex.split(line.lstrip("# ")) for line in lines if re.match(r"#\s+dfq ", line)]


def test_the_usual_recipes_are_shipped() -> None:
    assert {"w8a8", "w6a6", "w4a8"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
class TestShipped:
    def test_it_is_valid_and_complete(self, name: str) -> None:
        path = shipped_recipes()[name]
        recipe = load_recipe(name)
        written = yaml.safe_load(path.read_text())
        assert set(knobs(written)) == set(knobs(Recipe().model_dump()))
        assert recipe.model_dump(mode="json") == Recipe.model_validate(written).model_dump(
            mode="json"
        )

    def test_bits_are_those_of_its_name(self, name: str) -> None:
        match = re.fullmatch(r"w(\d)a(\d)", name)
        if match:
            section = load_recipe(name).quantization
            assert (section.weight_bits, section.activation_bits) == tuple(map(int, match.groups()))

    def test_it_opens_with_commands_that_work(self, name: str) -> None:
        path = shipped_recipes()[name]
        opening = path.read_text().split("\n\n")[0].splitlines()
        assert all(line.startswith("#") for line in opening)
        found = commands(path)
        assert len(found) >= 2
        plain, override = found[0], found[1]
        assert "--set" not in plain
        assert "--set" in override
        for words in found:
            assert all("dfq" not in word for word in words[1:])
            # Parsed as the command line parses it: an option that is gone fails here.
            command = cli.commands[words[1]]
            with command.make_context(words[1], words[2:]) as context:
                parameters = context.params
            assert parameters["recipe"] == name
            load_recipe(parameters["recipe"], parameters["overrides"])

    def test_every_knob_has_a_comment(self, name: str) -> None:
        lines = shipped_recipes()[name].read_text().splitlines()
        bare = [
            line
            for above, line in zip(["", *lines], lines, strict=False)
            if re.match(r"\s*[A-Za-z_]+:\s*[^\s#]", line)
            and " #" not in line
            and not above.lstrip().startswith("#")
        ]
        assert bare == []


def test_without_a_recipe_the_defaults_count() -> None:
    assert load_recipe(None) == Recipe()


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(
        None, ["quantization.overrides={'model.0.*': float, 'model.1.conv': 6}", "seed=4"]
    )
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert set(knobs(yaml.safe_load(recipe.to_yaml()))) == set(knobs(Recipe().model_dump()))


def test_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = shipped_recipes()["w4a8"]
    assert find_recipe("w4a8") == shipped
    assert find_recipe("w4a8.yaml") == shipped
    # A file of that name goes before the shipped one.
    (tmp_path / "w4a8.yaml").write_text("seed: 9")
    assert find_recipe("w4a8") == shipped
    assert load_recipe("w4a8.yaml").seed == 9
    with pytest.raises(UserError, match=r"recipe 'nowhere/w4a8': no such file"):
        find_recipe("nowhere/w4a8")
    with pytest.raises(UserError, match=r"recipe 'w9a9': no such file.*shipped: .*w4a8"):
        find_recipe("w9a9")


def test_overrides_in_order_of_strength(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("seed: 1\nsynthesis: {images: 10, iterations: 20, flip: 0.1}\n")
    recipe = load_recipe(
        path,
        ["synthesis.iterations=30", "synthesis.images=11", "synthesis.images=12"],
        synthesis__images=13,
        synthesis__batch_size=None,
    )
    assert recipe.seed == 1
    assert recipe.synthesis.flip == 0.1
    assert recipe.synthesis.iterations == 30
    assert recipe.synthesis.images == 13
    assert recipe.synthesis.batch_size == Recipe().synthesis.batch_size
    assert load_recipe(path, ["synthesis.images=11", "synthesis.images=12"]).synthesis.images == 12


@pytest.mark.parametrize(
    ("text", "where", "expected"),
    [
        ("model=yolo11s", "model", "yolo11s"),
        ("synthesis.image_size=null", "synthesis.image_size", None),
        ("synthesis.weights.bn=1e-1", "synthesis.weights.bn", 0.1),
        ("distillation.lr=1e-5", "distillation.lr", 1e-5),
        ("quantization.first_last_bits=8", "quantization.first_last_bits", 8),
        ("quantization.overrides={a.*: 8}", "quantization.overrides", {"a.*": 8}),
        ("evaluation.data=a=b.json", "evaluation.data", "a=b.json"),
        ("distillation.lr=0.5", "distillation.lr", 0.5),
    ],
)
def test_values_of_overrides(text: str, where: str, expected: Any) -> None:
    value: Any = load_recipe(None, [text])
    for part in where.split("."):
        value = getattr(value, part)
    assert value == expected


def test_a_section_that_is_empty_can_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("synthesis:\n")
    assert load_recipe(tmp_path / "r.yaml", ["synthesis.images=3"]).synthesis.images == 3


def test_model_may_be_a_section(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: {source: yolo11s}\n")
    assert load_recipe(tmp_path / "r.yaml").model == "yolo11s"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("synthesis.imagse=3", r"synthesis\.imagse: unknown key"),
        ("sinthesis.images=3", r"sinthesis: unknown key"),
        ("synthesis.weights.kl=1", r"synthesis\.weights\.kl: unknown key"),
        ("synthesis.images=0", r"synthesis\.images: .*greater than or equal to 1, got 0"),
        ("synthesis.images=many", r"synthesis\.images: .*integer.*got 'many'"),
        ("synthesis.images=2.5", r"synthesis\.images: .*got 2\.5"),
        ("synthesis.images.x=2", r"synthesis\.images\.?x?: "),
        ("synthesis.learning_rate=.nan", r"synthesis\.learning_rate: .*got nan"),
        ("synthesis.learning_rate=.inf", r"synthesis\.learning_rate: .*got inf"),
        ("synthesis.labels=some", r"synthesis\.labels: .*'adaptive'.*got 'some'"),
        ("quantization.weight_bits=1", r"quantization\.weight_bits: .*got 1"),
        ("quantization.weight_bits=9", r"quantization\.weight_bits: .*got 9"),
        ("quantization.activation_bits=0", r"quantization\.activation_bits: .*got 0"),
        ("quantization.first_last_bits=4", r"quantization\.first_last_bits"),
        ("quantization.overrides={a: 12}", r"quantization\.overrides: .*'a' asks for 12 bits"),
        ("quantization.overrides={a: half}", r"quantization\.overrides: .*'a' asks for 'half'"),
        ("method=quick", r"method: .*got 'quick'"),
        ("seed=-1", r"seed: .*got -1"),
        ("distillation.ema=1", r"distillation\.ema: .*got 1"),
        ("synthesis=5", r"synthesis: "),
        ("no equals sign", r"--set no equals sign: write section\.key=value"),
        ("=3", r"--set =3: write section\.key=value"),
        ("synthesis.images={", r"--set synthesis\.images=\{: '\{' is not a YAML value"),
    ],
)
def test_mistakes_name_the_key(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_recipe(None, [text])
    first = str(refused.value).splitlines()[0]
    assert re.search(message, first)
    assert "pydantic" not in str(refused.value)


def test_each_mistake_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("seed: -4\nsynthesis: {images: 0, nonsense: 1}\n")
    with pytest.raises(UserError) as refused:
        load_recipe(path)
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("bad.yaml: ") for line in lines)
    for key in ("seed", "synthesis.images", "synthesis.nonsense"):
        assert sum(f": {key}: " in line for line in lines) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["synthesis.labels=none", "distillation.weights.task=1"],
            r"distillation\.weights\.task needs labels, and synthesis\.labels is 'none'",
        ),
        (
            [f"distillation.weights.{name}=0" for name in ("kl", "feature", "task")],
            r"distillation\.weights: all three are 0",
        ),
    ],
)
def test_settings_that_contradict(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_recipe(None, overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: [1", "not valid YAML"),
        (b"- seed\n", "a recipe is a mapping of sections, not a list"),
        (b"just words", "a recipe is a mapping of sections, not a str"),
        (b"\xff\xfe\x00s", "not valid YAML"),
        (b"seed: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"seed: 1\nsynthesis: {1: 2}", r"synthesis\.1: keys should be strings"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(refused.value)
    assert "r.yaml" in str(refused.value)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    assert load_recipe(tmp_path / "r.yaml") == Recipe()


def test_every_command_has_help() -> None:
    for name, command in cli.commands.items():
        assert command.get_short_help_str(), name
        with command.make_context(name, [], resilient_parsing=True) as context:
            for option in context.command.params:
                if isinstance(option, click.Argument):
                    # What it is, the command's own text says.
                    assert option.make_metavar(context) in (command.help or "")
                    continue
                assert isinstance(option, click.Option)
                assert option.help or option.name == "out", f"{name} --{option.name}"


@pytest.mark.parametrize("name", ["w8a8", "w6a6", "w5a5", "w4a8", "w4a4", "w3a8"])
def test_shipped_recipes_hold_the_defaults(name: str) -> None:
    # `dfq synthesize` without a recipe must make the set that `dfq qat --recipe` looks for.
    shipped = load_recipe(name).model_dump(exclude={"quantization"})
    assert shipped == load_recipe(None).model_dump(exclude={"quantization"})


@pytest.mark.parametrize("technique", ["swing=true", "per_image=0.5"])
def test_what_needs_a_whole_batch_refuses_its_parts(technique: str) -> None:
    name = technique.partition("=")[0]
    with pytest.raises(UserError, match=rf"techniques\.{name} and micro_batch cannot go together"):
        load_recipe(None, [f"synthesis.techniques.{technique}", "synthesis.micro_batch=4"])
