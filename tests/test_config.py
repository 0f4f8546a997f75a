"""Settings: precedence, strictness, and what the shipped recipes say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from open_pisces.config import RunConfig
from open_pisces.model.folder import WEIGHTS
from open_pisces.recipe import RECIPES, TRAININGS, load_config, trainings
from open_pisces.settings import ConfigError, validate

RECIPE_NAMES = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.glob("*/*.yaml"))
RUNS = [name for name in RECIPE_NAMES if name.rpartition("/")[2] in TRAININGS]
STAGES = ("stage1", "stage2", "stage3")


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    """A recipe file for one test."""
    (folder / name).write_text(text)
    return str(folder / name)


# ------------------------------------------------------------------------------------------------- precedence


def test_defaults_yield_to_yaml_and_yaml_to_key_value(tmp_path: Path) -> None:
    recipe = write(tmp_path, "objective: pisces\ntrain: {steps: 7, batch_size: 3}\n")
    config = load_config(recipe, ["train.batch_size=5"])
    assert (config.train.steps, config.train.batch_size) == (7, 5)
    assert config.train.accumulate == RunConfig(name="x", objective="pisces").train.accumulate


def test_a_recipe_that_extends_another_wins_over_it_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, "objective: pisces\ntrain: {steps: 7, batch_size: 3}\n", "base.yaml")
    config = load_config(write(tmp_path, "extends: base\ntrain: {steps: 9}\n"))
    assert (config.train.steps, config.train.batch_size) == (9, 3)


def test_lists_are_replaced_not_joined(tmp_path: Path) -> None:
    write(tmp_path, "objective: pisces\ntrain: {freeze: [llm, decoder]}\n", "base.yaml")
    assert load_config(write(tmp_path, "extends: base\ntrain: {freeze: [llm]}\n")).train.freeze == ["llm"]


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    recipe = write(tmp_path, "objective: pisces\ndata: {sources: [{path: a}, {path: b}]}\n")
    config = load_config(recipe, ["data.sources.1.weight=2.5"])
    assert [source.weight for source in config.data.sources] == [1.0, 2.5]


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-5", "0.00002"])
def test_small_numbers_are_numbers_however_they_are_written(tmp_path: Path, text: str) -> None:
    # YAML 1.1 reads 2e-5 as a word: with a plain loader the paper's learning rate would be refused or, worse, a string.
    recipe = write(tmp_path, f"objective: pisces\ntrain: {{lr: {text}}}\n")
    assert load_config(recipe).train.lr == 2e-5
    assert load_config(recipe, [f"train.lr={text}"]).train.lr == 2e-5


def test_settings_cannot_be_changed_after_loading(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "objective: pisces\n"))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


# ------------------------------------------------------------------------------------------------- strictness


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("train: {batchsize: 3}", [], ["run.yaml", "train.batchsize", "3", "did you mean train.batch_size?"]),
        ("trian: {steps: 3}", [], ["run.yaml", "trian", "did you mean train?"]),
        ("train: {steps: many}", [], ["run.yaml", "train.steps", "'many'", "integer"]),
        ("train: {steps: '7'}", [], ["run.yaml", "train.steps", "'7'", "integer"]),
        ("train: {steps: 0}", [], ["run.yaml", "train.steps", "0", "greater than or equal to 1"]),
        ("train: {lr: -1.0}", [], ["run.yaml", "train.lr", "-1.0", "greater than 0"]),
        ("train: {schedule: linear}", [], ["run.yaml", "train.schedule", "'linear'", "'constant' or 'cosine'"]),
        ("train: {compile: 1}", [], ["run.yaml", "train.compile", "1", "boolean"]),
        ("data: {sources: [{path: a, weight: 0}]}", [], ["run.yaml", "data.sources.0.weight", "0"]),
        ("data: {sources: [{path: a, tasks: {draw: 1.0}}]}", [], ["run.yaml", "data.sources.0.tasks", "draw"]),
        ("seed: 1", ["train.learning_rate=1.0"], ["command line", "train.learning_rate", "1.0"]),
        ("seed: 1", ["train.warmup_ration=0.1"], ["command line", "0.1", "did you mean train.warmup_ratio?"]),
        ("seed: 1", ["train.steps=3.5"], ["command line", "train.steps", "3.5", "integer"]),
        ("seed: 1", ["train.steps"], ["'train.steps'", "key=value"]),
        ("seed: 1", ["=3"], ["'=3'", "key=value"]),
        ("seed: 1", ["seed.deep=3"], ["'seed.deep=3'", "single value"]),
        ("seed: 1", ["train.lr=[1"], ["'train.lr=[1'", "not YAML"]),
        ("model: {generation: {image_size: 65}}", [], ["run.yaml", "model.generation", "65", "multiple"]),
    ],
)
def test_a_wrong_setting_names_file_key_value_and_remedy(
    tmp_path: Path, text: str, overrides: list[str], says: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, f"objective: pisces\n{text}\n"), overrides)
    for word in says:
        assert word in str(error.value)


def test_every_wrong_key_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, "objective: pisces\nsede: 1\ntrain: {stpes: 2}\n"))
    assert "did you mean seed?" in str(error.value) and "did you mean train.steps?" in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "", "a: [1\n"])
def test_a_file_that_holds_no_settings_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("override", ["data.sources.5.weight=2.0", "data.sources.x=1", "data.sources.5={path: b}"])
def test_an_override_beyond_a_list_is_refused(tmp_path: Path, override: str) -> None:
    recipe = write(tmp_path, "objective: pisces\ndata: {sources: [{path: a}]}\n")
    with pytest.raises(ConfigError, match="sources"):
        load_config(recipe, [override])


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: run\n", "other.yaml")
    with pytest.raises(ConfigError, match="extends"):
        load_config(write(tmp_path, "extends: other\nobjective: pisces\n"))


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean tiny/stage1\?"):
        load_config("tiny/stage_1")


# ------------------------------------------------------------------------------------------ the shipped recipes


def test_every_scale_has_its_trainings_in_order() -> None:
    assert [name.rpartition("/")[2] for name in trainings("tiny")] == list(TRAININGS)
    assert [name.rpartition("/")[2] for name in trainings("nano")] == list(TRAININGS)
    assert set(STAGES) <= {name.rpartition("/")[2] for name in trainings("8b")}
    assert trainings("tiny/stage1") == []


@pytest.mark.parametrize("name", RUNS)
def test_every_recipe_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    # Recipes around any LLM take its shapes from the folder that they start from.
    own = [f"model.start={WEIGHTS}"] if name.startswith("smol/") else []
    config = load_config(name, own)
    assert config.name == name
    saved = write(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(saved) == config
    assert validate(RunConfig, config.model_dump(mode="json"), {}) == config


def test_the_8b_stages_hold_the_papers_values() -> None:
    # The paper on its three stages: rate, schedule, warm-up and batch; what learns and what does not.
    stages = [load_config(f"8b/{stage}") for stage in STAGES]
    assert [stage.train.batch_size for stage in stages] == [2048, 2048, 1024]
    for stage in stages:
        assert stage.objective == "pisces"
        assert (stage.train.lr, stage.train.schedule, stage.train.warmup_ratio) == (2e-5, "constant", 0.03)
        assert set(stage.train.freeze) == {"understanding_encoder", "generation_encoder", "decoder"}


def test_the_8b_parts_give_the_papers_vectors() -> None:
    model = load_config("8b/stage1").model
    tower = model.understanding.config
    assert (tower["image_size"] // tower["patch_size"]) ** 2 == 729  # siglip-so400m-patch14-384
    assert (model.generation.grid, model.generation.pool, model.generation.vectors) == (32, 4, 64)
    assert model.llm.config["hidden_size"] == 4096
    assert (model.bridge.standardise, model.decoder.spatial_condition) == (False, False)
    assert model.template == "llama3"
