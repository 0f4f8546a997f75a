"""The commands: fast help, useful results, and for every bad input one line, code 2 and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from open_pisces.cli import bench, generate
from open_pisces.cli.commands import main
from open_pisces.model.bridge import VisualTokenPooler

QUICK = ["--steps", "2"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photo(work: Path) -> str:
    """A good picture."""
    Image.new("RGB", (80, 64), "red").save(work / "photo.png")
    return "photo.png"


def json_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object on the last line of standard output."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused in one line, with code 2 and nothing written; returns the line."""
    before = files_of(Path.cwd())
    try:
        code = main(arguments)
    except SystemExit as leaving:  # argparse leaves on its own
        code = leaving.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert code == 2, err
    assert err.startswith("pisces: ") and err.count("\n") == 1 and out == "", (out, err)
    assert files_of(Path.cwd()) == before
    return err


# ------------------------------------------------------------------------------------------------------- help


def test_help_answers_without_heavy_imports() -> None:
    code = "import sys; from open_pisces.cli.commands import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'PIL', 'rich', 'pydantic'} & set(sys.modules)\n"
    code += "light = tuple('open_pisces.' + name for name in ('cli', 'errors', 'files', 'datasets.formats'))\n"
    code += "own = {name for name in sys.modules if name.startswith('open_pisces.') and not name.startswith(light)}\n"
    code += "assert not heavy and own == {'open_pisces.datasets'}, (heavy, own)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_every_bench_that_can_run_is_a_choice_and_what_they_share_is_none() -> None:
    from importlib import import_module
    from pkgutil import iter_modules

    from open_pisces import bench as room

    modules = [module.name for module in iter_modules(room.__path__)]
    run = [name for name in modules if hasattr(import_module(f"open_pisces.bench.{name}"), "run")]
    assert bench.bench_names() == run and "pairs" not in run


def test_the_console_script_is_this_main() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="pisces")
    assert script.load() is main


def test_a_command_is_needed(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in refusal([], capsys)


# ---------------------------------------------------------------------------------------------------- results


def test_generate_writes_a_named_file_for_each_picture(
    nano_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "a red heart", "Zwölf Äpfel!", "--n", "2", "--model", str(nano_folder), *QUICK]
    assert main([*arguments, "--json"]) == 0
    rows = json_of(capsys)["pictures"]
    assert [row["prompt"] for row in rows] == ["a red heart"] * 2 + ["Zwölf Äpfel!"] * 2
    names = ["00-a-red-heart-0.png", "00-a-red-heart-1.png", "01-zw-lf-pfel-0.png", "01-zw-lf-pfel-1.png"]
    assert [row["file"] for row in rows] == names
    assert sorted(path.name for path in work.iterdir()) == names
    assert all(Image.open(name).size == Image.open(names[0]).size for name in names)


def test_the_same_seed_writes_the_same_bytes(nano_folder: Path, work: Path) -> None:
    for name, seed in (("a.png", "3"), ("b.png", "3"), ("c.png", "4")):
        assert main(["generate", "a cat", "--out", name, "--seed", seed, "--model", str(nano_folder), *QUICK]) == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


def test_several_pictures_for_one_file_become_a_sheet(nano_folder: Path, work: Path) -> None:
    arguments = ["generate", "a cat", "--model", str(nano_folder), *QUICK]
    assert main([*arguments, "--out", "one.png"]) == main([*arguments, "--n", "3", "--out", "sheet.png"]) == 0
    assert Image.open("sheet.png").width > 3 * Image.open("one.png").width


def test_ask_answers_about_one_or_more_pictures(
    nano_folder: Path, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(nano_folder), "--max-new-tokens", "4", "--json"]
    assert main(["ask", photo, photo, "Which is red?", *model]) == 0
    found = json_of(capsys)
    assert found["images"] == [photo, photo] and found["question"] == "Which is red?"
    assert isinstance(found["answer"], str)


def test_reconstruct_writes_beside_or_into_a_folder(
    nano_folder: Path, photo: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(nano_folder), *QUICK, "--json"]
    assert main(["reconstruct", photo, *model]) == 0
    assert json_of(capsys)["file"] == "photo-reconstructed.png"
    assert main(["reconstruct", photo, "--out", "again.png", *model]) == 0
    assert Path("photo-reconstructed.png").read_bytes() == Path("again.png").read_bytes()


def test_info_counts_the_same_parameters_in_a_folder_and_in_its_recipe(
    nano_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(nano_folder), "--json"]) == 0
    folder = json_of(capsys)
    assert main(["info", "nano/stage1", "--json"]) == 0
    recipe = json_of(capsys)
    assert set(folder["parts"]) == set(recipe["parts"]) and folder["total"] > 0
    for name in ("understanding_encoder", "generation_encoder", "bridge", "decoder"):
        assert folder["parts"][name]["parameters"] == recipe["parts"][name]["parameters"], name
    assert {"record", "licences"} <= set(folder)


def test_info_prints_a_table_for_people(nano_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(nano_folder)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("generation_encoder", "parameters", "kB"))


def test_demo_writes_the_sheet_and_prints_the_dialogue(
    nano_folder: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_pisces.cli import demo
    from open_pisces.generate.generator import Generator

    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[-5:])
    generator = Generator.from_pretrained(nano_folder)
    image, text = generator.image, generator.text
    monkeypatch.setattr(generator, "image", lambda prompts, seed: image(prompts, steps=1, seed=seed))
    monkeypatch.setattr(generator, "text", lambda images, prompts: text(images, prompts, max_new_tokens=3))
    demo.run_demo(generator, work / "demo.png")
    assert Image.open("demo.png").width == demo.COLUMNS * (demo.PICTURE + demo.MARGIN) + demo.MARGIN
    out = capsys.readouterr().out
    scene = demo.held_out_scenes()[1]
    assert "scene 1" in out and "scene 2" in out and scene.questions[0].question in " ".join(out.split())
    assert [path.name for path in work.iterdir()] == ["demo.png"]


def test_the_demo_calls_an_answer_right_only_if_it_is() -> None:
    from open_pisces.batch import Question
    from open_pisces.cli.demo import RIGHT, WRONG, Turn

    asked = Question("Which thing is on the left?", "cat", "what")
    assert (Turn(asked, "A cat.").ink, Turn(asked, "A cat.").line) == (RIGHT, "A cat.")
    assert (Turn(asked, "dog").ink, Turn(asked, "dog").line) == (WRONG, "dog (truth: cat)")
    assert "truth" not in Turn(Question("Describe it.", ""), "A cat.").line


def test_training_a_scale_runs_what_is_not_done_in_order_and_stops_when_stopped(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_pisces.train import loop

    done, ran = {"nano/understanding_clip"}, []

    def train(config: Any) -> Path:
        ran.append(config.name)
        if config.name != "nano/decoder":  # as if a signal had arrived there
            done.add(config.name)
        folder: Path = config.folder
        return folder

    monkeypatch.setattr(loop, "is_done", lambda config: config.name in done)
    monkeypatch.setattr(loop, "train", train)
    assert main(["train", "nano", "seed=5"]) == 0
    assert ran == ["nano/gen_clip", "nano/decoder"]
    out = capsys.readouterr().out
    assert "nano/understanding_clip: done" in out and "nano/decoder: stopped early" in out


# ------------------------------------------------------------------------------------------------- bad inputs


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes of pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("command", [["ask", "{}", "What is it?"], ["reconstruct", "{}"]])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.png", None, "no such file"),
        ("text.png", b"I am no picture.\n", "not an image"),
        ("bomb.png", png_header(20_000, 20_000), "64,000,000 pixels"),
        ("short.png", None, "damaged or cut short"),
    ],
)
def test_a_bad_picture_is_refused_by_name_before_the_model_loads(
    photo: str, capsys: pytest.CaptureFixture[str], command: list[str], name: str, content: bytes | None, says: str
) -> None:
    if name == "short.png":
        Image.effect_noise((64, 64), 50).save("whole.png")
        content = Path("whole.png").read_bytes()[:600]
    if content is not None:
        Path(name).write_bytes(content)
    line = refusal([part.format(name) for part in command] + ["--model", "no-such-model"], capsys)
    assert name in line and says in line


@pytest.mark.parametrize("prompt", ["", "  \n", "word " * 5000])
def test_an_empty_or_over_long_prompt_is_refused(
    nano_folder: Path, photo: str, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    for command in (["generate", "a cat", prompt, *QUICK], ["ask", photo, prompt]):
        line = refusal([*command, "--model", str(nano_folder)], capsys)
        assert "prompt" in line and ("empty" in line or "tokens" in line)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("nowhere", "mkdir -p nowhere"),
        ("nowhere/heart.png", "mkdir -p nowhere"),
        ("heart.tiff", ".png"),
        ("photo.png/heart.png", "photo.png"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    photo: str, capsys: pytest.CaptureFixture[str], out: str, says: str
) -> None:
    commands = [["generate", "a cat"], ["reconstruct", photo], ["demo"], ["data", "look", "fixture/train"]]
    for command in commands:
        model = [] if command[0] == "data" else ["--model", "no-such-model"]
        assert says in refusal([*command, "--out", out, *model], capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nano/stage1", "train.stepz=3"], "did you mean train.steps?"),
        (["train", "nano/stage1", "train.steps=many"], "train.steps"),
        (["train", "nano/stage9"], "did you mean nano/stage"),
        (["train", "nano", "out=here"], "a folder each"),
        (["info", "nano/stage_1"], "nano/stage1"),
        (["data", "look", "no/such"], "pisces data build"),
        (["generate", "a cat", "--n", "0"], "--n"),
        (["generate", "a cat", "--seed", "-1"], "--seed"),
        (["generate", "a cat", "--device", "gpu"], "--device"),
        (["eval", "scenes", "--limit", "5"], "--limit"),
        (["ask", "photo.png"], "QUESTION"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(
    photo: str, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert says in refusal(arguments, capsys)


@pytest.mark.parametrize("part", ["llm", "understanding_encoder", "generation_encoder", "bridge", "decoder"])
def test_a_model_folder_with_a_missing_part_is_refused_by_name(
    nano_folder: Path, work: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    shutil.copytree(nano_folder, "model")
    shutil.rmtree(Path("model") / part)
    assert part in refusal(["generate", "a cat", "--model", "model"], capsys)


def test_a_model_folder_with_a_changed_or_cut_part_is_refused_by_name(
    nano_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(nano_folder, "model")
    weights = Path("model/bridge/model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "bridge" in refusal(["info", "model", "--verify"], capsys)
    weights.write_bytes(content[: len(content) // 2])
    assert "bridge" in refusal(["generate", "a cat", "--model", "model"], capsys)


def test_info_compares_checksums_when_asked(nano_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(nano_folder), "--verify", "--json"]) == 0
    assert "files equal the checksums" in json_of(capsys)["verified"]
    assert "--verify compares the files of a model folder" in refusal(["info", "8b/stage1", "--verify"], capsys)


def test_a_part_of_another_model_is_refused(nano_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # As someone does who swaps in another LLM and drops its checksums: widths that do not meet must be named.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(nano_folder, "model")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained("model/llm")
    card = json.loads(Path("model/config.json").read_text())
    del card["parts"]["llm"]
    Path("model/config.json").write_text(json.dumps(card))
    capsys.readouterr()
    line = refusal(["generate", "a cat", "--model", "model"], capsys)
    assert "llm" in line and "bridge" in line and "24" in line


@pytest.mark.parametrize("model", ["no-such-model", "."])
def test_a_folder_without_a_model_is_refused(photo: str, capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert "no model folder" in refusal(["ask", photo, "What is it?", "--model", model], capsys)


def test_pictures_appear_together_or_not_at_all(work: Path) -> None:
    class Broken:
        def save(self, file: Path) -> None:
            file.write_bytes(b"half a pic")
            raise OSError("disk full")

    good = Image.new("RGB", (4, 4))
    with pytest.raises(OSError, match="disk full"):
        generate.save_together({work / "a.png": good, work / "b.png": Broken()})  # type: ignore[dict-item]
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("bug"), OSError("no file behind it")])
def test_programming_errors_keep_their_traceback(photo: str, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(args: Any) -> Any:
        raise error

    monkeypatch.setattr(generate, "load_generator", fail)
    with pytest.raises(type(error), match=str(error).strip("'")):
        main(["ask", photo, "What is it?"])


def test_an_error_of_a_part_of_the_model_is_one_line(photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: Any) -> Any:
        VisualTokenPooler(2)(torch.zeros(1, 10, 4))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "load_generator", fail)
        assert main(["ask", photo, "What is it?"]) == 2
    assert capsys.readouterr().err == "pisces: 10 features are no square grid that 2 divides\n"


# ------------------------------------------------------------------------------------------------ data commands


def test_a_folder_of_pictures_becomes_a_dataset_that_is_counted_and_filtered(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PISCES_DATA", str(work / "data"))
    (work / "photos").mkdir()
    for number in range(6):
        Image.effect_noise((40 + number, 40), 90 + number).convert("RGB").save(work / "photos" / f"{number}.png")
    (work / "photos" / "captions.csv").write_text(
        "file,caption\n" + "".join(f"{number}.png,caption {'word ' * number}\n" for number in range(6))
    )
    assert main(["data", "import", "folder", "photos", "mine", "--licence", "MIT", "--json"]) == 0
    assert json_of(capsys)["written"] == 6 and (work / "mine" / "index.json").is_file()
    assert main(["data", "stats", "mine", "--png", "stats.png", "--json"]) == 0
    assert json_of(capsys)["samples"] == 6 and Image.open("stats.png").width > 400
    assert main(["data", "stats", "mine"]) == 0 and "6" in capsys.readouterr().out
    assert main(["data", "filter", "mine", "fewer", "--rule", "caption_length=3:99", "--json"]) == 0
    assert json_of(capsys)["kept"] == 4
    shutil.rmtree(work / "fewer" / "index")
    assert main(["data", "index", "fewer"]) == 0 and "samples: 4" in capsys.readouterr().out
    assert main(["data", "look", "fewer"]) == 0 and Path("look.png").is_file()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("data import foldr photos out", "folder"),
        ("data import folder nowhere out", "nowhere"),
        ("data index nowhere", "holds no .tar files"),
        ("data stats nowhere", "no dataset at"),
        ("data stats fixture/train --png no/such/stats.png", "does not exist"),
        ("data filter fixture/train out --rule siz=3", "size"),
        ("data filter fixture/train out", "--rule"),
        ("data encode tiny/stage1", "data.features is not set"),
        ("bench nothing", "loader"),
    ],
)
def test_data_commands_refuse_what_they_cannot_use(
    work: Path, monkeypatch: pytest.MonkeyPatch, line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PISCES_DATA", str(work))
    assert says in refusal(line.split(), capsys)


@pytest.mark.parametrize(
    ("given", "lies"), [([], "data/scenes/pairs"), (["--out", "data/x"], "data/x"), (["--out", "x"], "x")]
)
def test_a_built_dataset_lies_where_its_out_says(
    work: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], lies: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from open_pisces.datasets.scenes import composer as scenes

    monkeypatch.delenv("PISCES_DATA", raising=False)
    monkeypatch.setattr(scenes, "build", lambda out, *rest, **more: Path(out).absolute())
    assert main(["data", "build", "scenes", "--split", "pairs", *given]) == 0
    assert capsys.readouterr().out == f"{work / lies}\n"


def test_a_benchmark_tells_how_long_it_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_pisces.bench import pairs

    monkeypatch.setattr(pairs, "TELL_EVERY", 0.0)
    pairs.compare("nothing", lambda: None, lambda: None, 3)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "pisces bench: nothing: 3 pairs, about 0 min 00 s left; --pairs N takes fewer"
    assert told[-1] == "pisces bench: nothing: 2 of 3 pairs, about 0 min 00 s left" and len(told) == 4


def test_a_benchmark_prints_its_ratio(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from open_pisces.bench import loader

    monkeypatch.setattr(loader, "SAMPLES", 20)
    assert main(["bench", "loader", "--pairs", "2", "--json"]) == 0
    found = json_of(capsys)
    assert {"name", "ratio", "low", "high", "n", "figures"} <= set(found) and found["name"] == "loader"
    assert 0 < found["low"] <= found["ratio"] <= found["high"] and found["n"] == 2
