"""Captioning: who is asked what, what is kept, and that a run which is stopped, killed or damaged loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint import MODEL, Endpoint, describe, serving
from PIL import Image

from open_pisces.batch import Sample
from open_pisces.cli.commands import main
from open_pisces.data.prompts import wordings
from open_pisces.data.shards import ShardReader, open_dataset
from open_pisces.datasets.shard_writer import ShardWriter
from open_pisces.factory.caption import MANIFEST, Captioning, CaptionStage, caption
from open_pisces.factory.caption_checks import CAUSES, CaptioningError, Filters, Template, find_template
from open_pisces.factory.captioners import CaptionerSettings
from open_pisces.factory.cluster import Workers
from open_pisces.files import WEIGHTS


def picture(number: int) -> Image.Image:
    """A picture of one color of its own."""
    return Image.new("RGB", (24, 16 + number % 5), (number * 7 % 256, number * 13 % 256, number * 29 % 256))


def write(folder: Path, count: int, per_shard: int = 8) -> Path:
    with ShardWriter(folder, per_shard, [{"package": "p", "licence": "MIT"}]) as writer:
        for number in range(count):
            writer.write(Sample(f"k{number:04d}", (picture(number),), short=f"short {number}", detailed="old"))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in", 20)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as one:
        yield one


def captioning(endpoint: Endpoint, template: str = "detailed", **how: Any) -> Captioning:
    given = {"tries": 2, "timeout": 5.0, "concurrency": 4, **how}
    return Captioning(CaptionerSettings("endpoint", MODEL, url=endpoint.url, **given), find_template(template))


def texts(folder: Path) -> dict[str, str]:
    reader = ShardReader(folder)
    return {reader.key(i): reader[i].detailed for i in range(len(reader))}


def near(found: str, number: int) -> bool:
    """Whether a caption is about the picture; JPEG changes its mean by a level or two."""
    said = [int(word) for word in found.split() if word.isdigit()]
    true = [int(word) for word in describe(picture(number)).split() if word.isdigit()]
    return len(said) == len(true) and max(abs(a - b) for a, b in zip(said, true, strict=True)) <= 2


# ----------------------------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("workers", [Workers(), Workers(2)], ids=["here", "two processes"])
def test_every_picture_gets_its_own_caption(source: Path, tmp_path: Path, endpoint: Endpoint, workers: Workers) -> None:
    found = caption(str(source), tmp_path / "out", captioning(endpoint), workers)
    assert found == {
        "read": 20, "written": 20, "dropped": {}, "damaged": {}, "shards": 3, "damaged_shards": [],
    }  # fmt: skip
    before, after = ShardReader(source), ShardReader(tmp_path / "out")
    assert [after.key(i) for i in range(20)] == [before.key(i) for i in range(20)]
    for i in range(20):
        assert after.pictures(i) == before.pictures(i)
        assert after[i].short == f"short {i}" and near(after[i].detailed, i), (i, after[i].detailed)
    assert after.licences == before.licences
    after.verify()
    assert all(body["model"] == MODEL and body["max_tokens"] == 300 for body in endpoint.bodies)
    assert endpoint.counts == {"good": 20}


def test_a_finished_run_asks_nothing_again(source: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    first = caption(str(source), tmp_path / "out", captioning(endpoint))
    endpoint.down = True
    assert caption(str(source), tmp_path / "out", captioning(endpoint)) == first
    assert endpoint.counts.total() == 20


def test_a_run_whose_endpoint_goes_away_stops_and_goes_on_later(
    source: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    def after_ten(text: str, prompt: str) -> str:
        endpoint.down = endpoint.counts["good"] >= 10
        return text

    endpoint.script = after_ten
    with pytest.raises(CaptioningError, match="nothing answers at .*run the same command again"):
        caption(str(source), tmp_path / "out", captioning(endpoint, concurrency=1))
    assert not (tmp_path / "out" / "index.json").exists()
    assert [path.parent.name for path in sorted(tmp_path.glob(f"out/parts/*/{MANIFEST}"))] == ["00000"]
    endpoint.down, endpoint.script = False, lambda text, prompt: text
    endpoint.seen.clear()
    assert caption(str(source), tmp_path / "out", captioning(endpoint))["written"] == 20
    assert not [text for text in endpoint.seen if any(near(text, number) for number in range(8))]
    assert all(near(text, int(key[1:])) for key, text in texts(tmp_path / "out").items())


def test_a_short_caption_may_be_written_too_and_filters_be_looser(
    source: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    endpoint.script = lambda text, prompt: "red thing"
    how = replace(captioning(endpoint, "brief"), field="short", filters=Filters((1, 20)))
    assert caption(str(source), tmp_path / "out", how)["written"] == 20
    sample = ShardReader(tmp_path / "out")[3]
    assert (sample.short, sample.detailed) == ("red thing", "old")


def test_large_pictures_are_made_smaller_before_they_are_sent(tmp_path: Path, endpoint: Endpoint) -> None:
    with ShardWriter(tmp_path / "in") as writer:
        writer.write(Sample("large", (Image.new("RGB", (400, 100), "red"),)))
    for side, size in ((100, "100 by 25"), (0, "400 by 100")):
        caption(str(tmp_path / "in"), tmp_path / str(side), captioning(endpoint, max_side=side))
        assert size in texts(tmp_path / str(side))["large"]


# -------------------------------------------------------------------------------------------------------- filters


def test_what_is_no_caption_is_dropped_and_counted_by_cause(source: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    words = {
        0: "I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but I can't help with describing this picture of a person.",
        1: "Too short",
        2: "a red cat a red cat a red cat a red cat a red cat",
        3: ("A long text that never comes to its", "length"),
        4: "Sure. Describe this image in one paragraph, in full sentences. It is red.",
        5: "Мужчина стоит у окна и смотрит на улицу",
        6: "A sign beside the road says that one cannot park here, and I can't read the rest of it.",
    }

    def script(text: str, prompt: str) -> Any:
        return next((said for number, said in words.items() if near(text, number)), text)

    endpoint.script = script
    how = replace(captioning(endpoint), filters=Filters(language="latin"))
    found = caption(str(source), tmp_path / "out", how)
    causes = ["refusal", "length", "repetition", "cut off", "copied prompt", "language"]
    assert found["dropped"] == dict.fromkeys(causes, 1) and found["written"] == 14
    manifest = json.loads((tmp_path / "out/parts/00000" / MANIFEST).read_text())
    assert manifest["dropped"] == {cause: [f"k{number:04d}"] for number, cause in enumerate(causes)}
    assert set(texts(tmp_path / "out")) == {f"k{number:04d}" for number in range(6, 20)}


def test_causes_are_looked_for_in_a_fixed_order() -> None:
    prompt = "Describe the picture in many words please and nothing else"
    filters = Filters((3, 10))
    assert filters.cause(" ", False, prompt) == "empty"
    assert filters.cause("I cannot", False, prompt) == "cut off"
    assert filters.cause("I cannot see it", True, prompt) == "refusal"
    assert filters.cause("describe the picture in many words, please, and", True, prompt) == "copied prompt"
    assert filters.cause("cat " * 11, True, prompt) == "length"
    assert filters.cause("cat " * 5, True, prompt) == "repetition"
    assert filters.cause("a cat on a mat", True, prompt) == ""
    assert filters.cause("tell me", True, "Tell me!") == "copied prompt"
    assert set(CAUSES) == {"empty", "cut off", "refusal", "copied prompt", "length", "repetition", "language"}


def test_if_nothing_is_kept_that_is_an_error(source: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script = lambda text, prompt: "no"
    with pytest.raises(CaptioningError, match=r"none of 20 captions was kept .*length.*look at the template"):
        caption(str(source), tmp_path / "out", captioning(endpoint))


# ------------------------------------------------------------------------------------------------------ templates


def test_a_template_asks_with_the_short_caption_where_there_is_one(tmp_path: Path, endpoint: Endpoint) -> None:
    with ShardWriter(tmp_path / "in") as writer:
        writer.write(Sample("a", (picture(1),), short="the {caption} tower"))
        writer.write(Sample("b", (picture(2),)))
    caption(str(tmp_path / "in"), tmp_path / "out", captioning(endpoint, "detailed_from_caption", concurrency=1))
    with_caption, without = (body["messages"][0]["content"][1]["text"] for body in endpoint.bodies)
    assert 'found with this image: "the {caption} tower"' in with_caption
    assert without == find_template("detailed").prompt


def test_a_template_may_be_a_file_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("prompt: What is it?\n")
    assert find_template(str(file)) == Template("own", "What is it?")
    assert find_template("trained").prompt == wordings()["caption_detailed"][0]
    with pytest.raises(CaptioningError, match=r"no template 'detialed': choose brief, detailed, .*trained"):
        find_template("detialed")
    for content, match in (
        ("- a list", "no text under 'prompt'"),
        ("prompt: ''", "no text under 'prompt'"),
        ("prompt: a\nsystem: b", "'system' is none of"),
        ("prompt: about {caption}", "belongs into prompt_with_caption"),
        ("prompt: a\nprompt_with_caption: b", "belongs into prompt_with_caption"),
        ("prompt: [", "cannot be read"),
    ):
        file.write_text(content)
        with pytest.raises(CaptioningError, match=match):
            find_template(str(file))


# ---------------------------------------------------------------------------------------------------- bad input


def test_damaged_samples_and_shards_are_counted_and_named(source: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    reader = ShardReader(source)
    offset, size, *_ = reader._members_of(9).tolist()[0]
    with (source / "00001.tar").open("r+b") as file:
        file.seek(offset + 30)
        file.write(b"\0" * (size - 40))
    with (source / "00002.tar").open("ab") as file:
        file.write(b"more")
    found = caption(str(source), tmp_path / "out", captioning(endpoint))
    assert (found["read"], found["written"], found["damaged"]) == (20, 15, {"checksum": 1, "shard": 4})
    (named,) = found["damaged_shards"]
    assert "00002.tar is of" in named and "get a whole copy" in named
    manifest = json.loads((tmp_path / "out/parts/00001" / MANIFEST).read_text())
    assert manifest["damaged"] == {"checksum": ["k0009"]} and manifest["written"] == 7
    whole = write(tmp_path / "again", 20)
    shutil.copy(whole / "00002.tar", source / "00002.tar")
    found = caption(str(source), tmp_path / "out", captioning(endpoint))
    assert (found["written"], found["damaged"], found["damaged_shards"]) == (19, {"checksum": 1}, [])


def test_samples_without_a_picture_are_dropped_and_animations_are_sent_as_their_first_frame(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with ShardWriter(tmp_path / "in") as writer:
        writer.write(Sample("none", ()))
        writer.write(Sample("two", (picture(1), picture(2))))
        writer.write(Sample("gif", ()), encoded=((tmp_path / "a.gif").read_bytes(),))
    found = caption(str(tmp_path / "in"), tmp_path / "out", captioning(endpoint))
    assert found["dropped"] == {"no picture": 1}
    said = texts(tmp_path / "out")
    assert near(said["two"], 1) and "254 0 0" in said["gif"]
    assert len(ShardReader(tmp_path / "out")[0].images) == 2


def test_an_endpoint_that_is_down_or_has_another_model_is_told_at_once(
    source: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    nowhere = replace(captioning(endpoint).captioner, url="http://127.0.0.1:9/v1")
    with pytest.raises(CaptioningError, match=r"nothing answers at http://127.0.0.1:9/v1 .*start the server"):
        caption(str(source), tmp_path / "out", replace(captioning(endpoint), captioner=nowhere))
    other = replace(captioning(endpoint).captioner, model="eye-2")
    with pytest.raises(CaptioningError, match="has no model 'eye-2'; it names eye-1"):
        caption(str(source), tmp_path / "out", replace(captioning(endpoint), captioner=other))
    assert not (tmp_path / "out").exists() and not endpoint.bodies


@pytest.mark.parametrize(
    ("status", "match"), [(401, "HTTP 401.*OPENAI_API_KEY"), (400, "8 pictures in a row .*refused by the endpoint")]
)
def test_an_endpoint_that_refuses_everything_ends_the_run(
    source: Path, tmp_path: Path, endpoint: Endpoint, status: int, match: str
) -> None:
    endpoint.refuse = status
    with pytest.raises(CaptioningError, match=match):
        caption(str(source), tmp_path / "out", captioning(endpoint))


def test_a_folder_of_other_settings_or_of_something_else_is_refused(
    source: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    caption(str(source), tmp_path / "out", captioning(endpoint))
    with pytest.raises(CaptioningError, match=r"was begun with prompt = Describe .* not Write a caption"):
        caption(str(source), tmp_path / "out", captioning(endpoint, "brief"))
    with pytest.raises(CaptioningError, match=r"was begun with temperature = 0.0, not 0.7"):
        caption(str(source), tmp_path / "out", captioning(endpoint, temperature=0.7))
    with pytest.raises(CaptioningError, match="is there and is no captioning"):
        caption(str(tmp_path / "out"), source, captioning(endpoint))
    with pytest.raises(CaptioningError, match="is, or holds, the dataset that is read"):
        caption(str(source), tmp_path, captioning(endpoint))


def test_the_key_is_sent_and_written_nowhere(
    source: Path, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EYE_KEY", "sesame-1234")
    caption(str(source), tmp_path / "out", captioning(endpoint, key_variable="EYE_KEY"))
    assert set(endpoint.keys) == {"Bearer sesame-1234"}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"sesame" in path.read_bytes()]


def test_a_part_that_a_killed_worker_left_behind_is_taken_away(
    source: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    parts = tmp_path / "out" / "parts"
    (parts / ".00001.99999.part").mkdir(parents=True)
    stage = CaptionStage(str(source), tmp_path / "out", captioning(endpoint))
    assert stage(1) == {"shard": "00001.tar", "samples": 8}
    assert not list(parts.glob(".*.part"))


# -------------------------------------------------------------------------------------------- other captioners, CLI


def test_our_own_model_writes_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = open_dataset("fixture/train")
    with ShardWriter(tmp_path / "in", 4) as writer:
        for number in range(6):
            writer.write(scenes[number])
    settings = CaptionerSettings("pisces", str(WEIGHTS), batch_size=4, max_tokens=60, device="cpu")
    how = Captioning(settings, find_template("trained", "short"), "short", Filters((1, 60), 1.0))
    found = caption(str(tmp_path / "in"), tmp_path / "out", how)
    assert found["written"] + sum(found["dropped"].values()) == 6 and found["written"] >= 4
    reader = ShardReader(tmp_path / "out")
    from open_pisces.generate.generator import Generator

    generator = Generator.from_pretrained(WEIGHTS, "cpu")
    for i in range(len(reader)):
        alone = generator.text([[reader[i].images[0]]], [how.template.prompt], 60)[0]
        assert reader[i].short == alone


def test_the_command_line_captions_and_tells_what_it_dropped(
    source: Path, tmp_path: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "caption", str(source), str(tmp_path / "out"), "--captioner", "endpoint"]
    assert main([*words, "--url", endpoint.url]) == 2
    assert "--captioner endpoint needs --model: its name at the endpoint" in capsys.readouterr().err
    assert main([*words, "--model", MODEL, "--url", endpoint.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["written"] == 20
    assert main([*words, "--model", MODEL, "--url", endpoint.url, "--template", "nothing"]) == 2
    assert "no template 'nothing'" in capsys.readouterr().err
    assert main([*words, "--model", MODEL, "--url", endpoint.url, "--language", "xx"]) == 2
    assert "no language 'xx'" in capsys.readouterr().err


def test_what_was_captioned_can_be_trained_on(source: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Parts in folders of their own are one dataset to every reader."""
    caption(str(source), tmp_path / "out", captioning(endpoint), Workers(2))
    reader = open_dataset(tmp_path / "out")
    assert [len(reader.samples_of(shard)) for shard in range(3)] == [8, 8, 4]
    assert np.array_equal(reader.picture_counts(), np.ones(20))
    assert ShardReader(source).image_digest == reader.image_digest
