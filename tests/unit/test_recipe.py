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
from click.testing import CliRunner

from dfq.cli.main import cli
from dfq.errors import UserError
from dfq.recipe import Recipe, find_recipe, load_recipe, recorded_recipe, shipped_recipes
from dfq.recipe.removed import REMOVED
from dfq.recipe.text import default_text

SHIPPED = sorted(shipped_recipes())


def knobs(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        # `overrides` maps layer names: it is one knob, whatever it holds.
        if isinstance(value, dict) and key != "overrides":
            yield from knobs(value, f"{above}{key}.")
        else:
            yield above + key


def value_at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def commands(path: Path) -> list[list[str]]:
    lines = path.read_text().splitlines()
    return [shlex.split(line.lstrip("# ")) for line in lines if re.match(r"#\s+dfq ", line)]


def test_the_usual_recipes_are_shipped() -> None:
    assert {"w8a8", "w6a6", "w4a8"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
class TestShipped:
    def test_it_is_a_diff_on_the_defaults(self, name: str) -> None:
        written = yaml.safe_load(shipped_recipes()[name].read_text())
        if name != "default":
            assert written.pop("extends") == "default"
        assert set(knobs(load_recipe(name).model_dump())) == set(knobs(Recipe().model_dump()))
        # Every value that it has is one that it changes, but for the widths that name it.
        plain = Recipe().model_dump(mode="json")
        named = {"quantization.weight_bits", "quantization.activation_bits"}
        for key in [] if name == "default" else sorted(set(knobs(written)) - named):
            assert value_at(written, key) != value_at(plain, key), key

    def test_bits_are_those_of_its_name(self, name: str) -> None:
        match = re.fullmatch(r"(?:ptq-)?w(\d)a(\d)", name)
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


def test_the_shipped_recipes_are_short() -> None:
    texts = {name: path.read_text() for name, path in shipped_recipes().items()}
    lines = {name: text.count("\n") for name, text in texts.items() if name != "default"}
    assert sum(count for name, count in lines.items() if not name.startswith("ptq-")) < 300
    assert all(count < 12 for name, count in lines.items() if name.startswith("ptq-"))


def test_default_yaml_is_what_is_generated() -> None:
    assert shipped_recipes()["default"].read_text() == default_text(), "run `make recipes`"
    assert load_recipe("default") == Recipe()


def test_what_each_recipe_is_for() -> None:
    # The paper's and the LSQ baseline have tests of their own.
    changed = {
        "demo": {
            "model": "demo", "synthesis.images": 96, "synthesis.image_size": 160,
            "synthesis.iterations": 240, "synthesis.multires": 0.4,
            "quantization.rounding_images": 64, "distillation.epochs": 8,
        },
        "mixed-w4a8": {"quantization.mixed.budget": "w4a8", "quantization.mixed.cost": "bytes"},
        "mixed-w4a4": {
            "quantization.activation_bits": 4, "quantization.mixed.budget": "w4a4",
            "quantization.mixed.candidates": (
                ["w3a3", "w3a4", "w4a3", "w4a4", "w4a5", "w5a4", "w5a5", "w4a6", "w6a6", "w8a8"]
            ),
        },
    }  # fmt: skip
    for name, values in changed.items():
        assert load_recipe(name) == load_recipe(None, values), name


@pytest.mark.parametrize("name", ["default", "lsq-real", "paper-mask-rcnn-swin"])
def test_shown_every_knob_has_a_comment_and_says_where_it_differs(
    name: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(cli, ["recipe", "show", name])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    keys = [
        (above, line)
        for above, line in zip(["", *lines], lines, strict=False)
        if re.match(r"\s*\w+: ", line)
    ]
    assert len(keys) == len(list(knobs(Recipe().model_dump())))
    assert [line for above, line in keys if not above.lstrip().startswith("# ")] == []
    differing = {line.split(":")[0].strip() for _, line in keys if "# default: " in line}
    written = yaml.safe_load(shipped_recipes()[name].read_text())
    written.pop("extends", None)
    changed = set() if name == "default" else set(knobs(written))
    assert differing == {key.rpartition(".")[2] for key in changed}
    # What is shown is a recipe again.
    (tmp_path / "shown.yaml").write_text(result.stdout)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe(name)


def test_listed_are_names_widths_and_purposes() -> None:
    result = CliRunner().invoke(cli, ["recipe", "list"])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert sorted(rows) == SHIPPED
    assert re.fullmatch(r"w6a6 +W6A6 +6-bit weights and activations, .*[a-z]", rows["w6a6"])
    assert re.match(r"mixed-w4a8 +mixed, as W4A8 +As many bytes", rows["mixed-w4a8"])


# ---- recipes that extend others


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_extending_takes_what_is_not_said(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="extends: w4a4\nseed: 7\nsynthesis: {images: 9, weights: {bn: 2, tv: 1}}\n"
        "quantization: {overrides: {a: 8, b: 6}}\n",
        mine="extends: base.yaml\nseed: 8\nsynthesis: {weights: {bn: 3}}\ndistillation:\n"
        "quantization: {overrides: {c: 4}}\n",
        named="extends: base\n",
    )
    found = load_recipe(tmp_path / "mine.yaml", ["synthesis.images=10"])
    assert (found.seed, found.synthesis.images, found.quantization.activation_bits) == (8, 10, 4)
    assert (found.synthesis.weights.bn, found.synthesis.weights.tv) == (3, 1)
    # A mapping of layers is one value.
    assert found.quantization.overrides == {"c": 4}
    assert load_recipe(tmp_path / "named.yaml").seed == 7
    assert list(load_recipe(tmp_path / "named.yaml").quantization.overrides) == ["a", "b"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"a": "extends: a.yaml\n"},
            r"a\.yaml: extends goes in a circle: a\.yaml extends a",
        ),
        (
            {"a": "extends: b.yaml\n", "b": "extends: a.yaml\n"},
            r"b\.yaml: extends goes in a circle: a\.yaml extends b\.yaml extends a\.yaml$",
        ),
        ({"a": "extends: w4a9\n"}, r"a\.yaml: extends: 'w4a9': no such file.*did you mean w4a8"),
        ({"a": "extends: x/w4a8\n"}, r"a\.yaml: extends: 'x/w4a8': no such file beside it"),
        (
            {"a": "extends: [w4a8]\n"},
            r"a\.yaml: extends: should be the name of a recipe, got a list",
        ),
        ({"a": "extends: ''\n"}, r"a\.yaml: extends: should be the name of a recipe"),
        ({"a": 'extends: "w\\0"\n'}, r"a\.yaml: extends: 'w\\x00': no such file"),
        ({"a": "extends: b.yaml\n", "b": "- 1\n"}, r"b\.yaml: a recipe is a mapping"),
        # Where a value is wrong, the file that has it is named.
        ({"a": "extends: b.yaml\nseed: 1\n", "b": "synthesis: {images: 0}\n"}, r"b\.yaml: syn"),
        (
            {"a": "extends: b.yaml\nsynthesis: {images: 3}\n", "b": "synthesis: 5\n"},
            r"b\.yaml: synthesis: ",
        ),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    write(tmp_path, **texts)
    with pytest.raises(UserError, match=message) as refused:
        load_recipe(tmp_path / "a.yaml")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "values", "begins"),
    [
        (["distillation.epochs=1e3"], {}, "--set distillation.epochs: input should be a valid int"),
        (
            ["quantization={weight_bits: 9}"],
            {},
            "--set quantization.weight_bits: input should be l",
        ),
        (["quantisation.weight_bits=4"], {}, "--set quantisation: unknown key; did you mean quant"),
        (["synthesis.labels=real:"], {}, "--set synthesis.labels: input should be a valid string,"),
        (["synthesis=4"], {}, "--set synthesis: should be a section of keys, got 4"),
        ([], {"synthesis__images": 0}, "--images: synthesis.images: input should be greater than"),
        (["seed=1"], {}, "w4a8.yaml: quantization.weight_bits: input should be less than"),
    ],
)
def test_what_an_option_says_wrong_is_no_fault_of_the_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    values: dict[str, Any],
    begins: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = 9 if overrides == ["seed=1"] else 4
    write(tmp_path, w4a8=f"quantization: {{weight_bits: {wrong}}}\n")
    with pytest.raises(UserError) as refused:
        load_recipe("w4a8.yaml", overrides, **values)
    assert str(refused.value).startswith(begins)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [".seed=1", "seed.=1", "synthesis..images=1", ".=1", " =1", "=1"])
def test_keys_that_have_an_empty_part(text: str) -> None:
    with pytest.raises(UserError, match=r"^--set .+: write section\.key=value$"):
        load_recipe(None, [text])


def test_blanks_around_a_key_are_not_of_it() -> None:
    assert load_recipe(None, [" synthesis.images = 7"]).synthesis.images == 7


def test_a_method_in_a_file_is_checked_though_another_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, odd="method: nonsense\n", base="extends: odd.yaml\n")
    for name in ("odd", "base"):
        with pytest.raises(UserError, match=r"odd\.yaml: method: input should be 'qat', 'ptq'"):
            load_recipe(tmp_path / f"{name}.yaml", ["method=ptq"])


def test_extends_is_for_files() -> None:
    with pytest.raises(UserError, match=r"^--set extends: stands in a recipe's file"):
        load_recipe("w4a8", ["extends=w4a4"])


# ---- keys of earlier versions


OLD = {
    "distillation.drift": 0.5, "distillation.dampen": 0.0, "distillation.freeze": 0.0,
    "distillation.masks": "ellipse", "evaluation.batch_size": 16,
}  # fmt: skip


def test_removed_keys_are_told_of_in_one_line_and_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, old="seed: 3\ndistillation: {drift: 0.25, epochs: 2}\n")
    found = load_recipe(tmp_path / "old.yaml", ["evaluation.batch_size=4"])
    assert (found.seed, found.distillation.epochs) == (3, 2)
    assert found == load_recipe(None, ["seed=3", "distillation.epochs=2"])
    (line,) = capsys.readouterr().err.splitlines()[:1]
    assert re.match(r"warning: .+old\.yaml: .*distillation\.drift \(.+evaluation\.batch_size", line)
    assert set(REMOVED) >= set(OLD)
    load_recipe("w4a8")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"distillation\.drifts: unknown key"):
        load_recipe(None, ["distillation.drifts=1"])


def test_rates_in_quantization_steps_are_refused() -> None:
    with pytest.raises(UserError, match=r"distillation\.weight_lr: .*0 .* or null .*got 0\.02"):
        load_recipe(None, ["distillation.weight_lr=0.02"])


def test_what_a_run_of_an_earlier_version_says_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = Recipe(seed=5).model_dump(mode="json")
    values["distillation"] |= {"drift": 0.5, "masks": "own", "weight_lr": 0.01}
    values["evaluation"]["batch_size"] = 4
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    found = recorded_recipe(tmp_path / "recipe.yaml")
    assert (found.seed, found.distillation.weight_lr) == (5, None)
    assert capsys.readouterr().err == ""


def test_training_nothing_needs_no_weights_and_no_labels() -> None:
    nothing = [f"distillation.weights.{name}=0" for name in ("kl", "feature", "task")]
    assert load_recipe(None, [*nothing, "method=ptq"]).method == "ptq"
    unlabelled = ["synthesis.labels=none", "distillation.weights.task=1", "method=ptq"]
    assert load_recipe(None, unlabelled).synthesis.labels == "none"


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
    assert all(line.startswith(f"{path}: ") for line in lines)
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
            r"distillation\.weights: all are 0; set one above 0, or method: ptq",
        ),
        (
            ["quantization.ranges=pd", "quantization.refine_images=0"],
            r"quantization: ranges: pd compares predictions: refine_images above 0",
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


def test_what_needs_a_whole_batch_refuses_its_parts() -> None:
    with pytest.raises(UserError, match=r"techniques\.swing and micro_batch cannot go together"):
        load_recipe(None, ["synthesis.techniques.swing=true", "synthesis.micro_batch=4"])


def test_keys_that_were_removed_are_told_of_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(
        "synthesis:\n  label_stage: {reuse: true, updates: 3}\n"
        "  techniques: {zoom: 0.3, swing: true}\n"
    )
    recipe = load_recipe(file)
    assert recipe.synthesis.label_stage.updates == 3
    assert recipe.synthesis.techniques.swing
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {file}: ")
    assert "ignored, as removed: synthesis.label_stage.reuse (" in line
    assert "synthesis.techniques.zoom (" in line
    load_recipe("w4a8")
    assert capsys.readouterr().err == ""
