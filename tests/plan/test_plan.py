"""The plan against real steps, and the plans of `8b` and `lab`, which nobody could run here."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import costs_counted_once
from transformers import SiglipVisionConfig, SiglipVisionModel

from open_pisces.batch import PairBatch, SequenceBatch
from open_pisces.cli.commands import build_parser, main
from open_pisces.config import RunConfig
from open_pisces.model.folder import without_sources
from open_pisces.model.importers.files import ImportSourceError
from open_pisces.model.importers.towers import translate
from open_pisces.model.parts import build_part
from open_pisces.plan import layout as planning_layout
from open_pisces.plan import plan as planning
from open_pisces.plan.layout import GIB, RESERVE, Layout, PlanError, group_sizes, mean_sample
from open_pisces.plan.live_bytes import LiveBytes
from open_pisces.plan.memory import Activations, measure_activations
from open_pisces.plan.plan import gpu_facts, plan, remedy
from open_pisces.recipe import RECIPES, load_config
from open_pisces.train.objectives import OBJECTIVES, build_training, skeleton
from open_pisces.train.optim import AveragedWeights, build_optimizer
from open_pisces.train.shapes import Shape
from open_pisces.train.sharding import checkpoint_activations

OWN = ["model.start=null", "train.accumulate=1", "train.batch_size=6", "diffusion.statistics_samples=8"]
FEW = "train.batch_size=2"  # bfloat16 is slow on processors that lack it
TINY = [
    *OWN,
    FEW,
    "model.tokenizer=bytes",
    "data.sources.0.path=fixture/train",
    "data.max_length=512",
    "data.row_length=512",
]
PAIRS = [*OWN, FEW, "model.tokenizer=bytes", "data.sources=[{path: fixture/train}]"]
DOCS = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
SHAPE = Shape(4, 128, True, 40, 2, 2)
LAB = sorted(f"lab/{path.stem}" for path in (RECIPES / "lab").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """Plans of the same settings share what a micro-batch takes, those of the same model what it costs."""
    honest, known = planning_layout.measure_activations, dict[Any, Activations]()

    def measure_activations(module: Any, run_of: Any, config: RunConfig, shape: Shape, *how: bool) -> Activations:
        key = config.model_dump_json(), shape, how
        if key not in known:
            known[key] = honest(module, run_of, config, shape, *how)
        return known[key]

    with pytest.MonkeyPatch.context() as patch, costs_counted_once(planning):
        patch.setattr(planning_layout, "measure_activations", measure_activations)
        yield


def rehearsed(module: Any, config: RunConfig, shape: Shape, **more: bool) -> Activations:
    return measure_activations(module, OBJECTIVES[config.objective].rehearsal, config, shape, **more)  # type: ignore[arg-type]


def shape_of(batch: SequenceBatch | PairBatch, understanding: int = 1, generation: int = 1) -> Shape:
    """The shape of a real micro-batch; ``understanding`` and ``generation`` are the vectors of a picture."""
    if isinstance(batch, PairBatch):
        pictures, caption = batch.ids_BS.shape
        return Shape(pictures=pictures, caption=caption, own=batch.total, everywhere=batch.total)
    rows, length = batch.ids_BS.shape
    return Shape(
        rows,
        length,
        batch.samples_BS is not None,
        len(batch.labels_K),
        len(batch.understanding_at_K) // understanding,
        len(batch.generation_at_K) // generation,
    )


def layout(recipe: str, gpus: int = 1, *more: str) -> Layout:
    config = load_config(recipe, more)
    return Layout(config, gpus, skeleton(config))


# ------------------------------------------------------------------------------------------------- against reality


class Kept:
    """Distinct storages that a forward pass saves for the backward pass, but for some."""

    def __init__(self, but: list[torch.Tensor]) -> None:
        self.left_out = {tensor.untyped_storage().data_ptr() for tensor in but}
        self.saved: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saved.append(tensor)  # held, so that no address is given away
        return tensor

    @property
    def bytes(self) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.saved}
        return sum(size for at, size in storages.items() if at not in self.left_out)


def real(config: RunConfig) -> tuple[dict[str, int], Shape]:
    """Bytes of a real step on this machine, and the shape of its micro-batch."""
    training = build_training(config)
    module: Any = training.module.train()
    optimizer, average = build_optimizer(module, config.train), AveragedWeights(module, config.train.ema)
    (batch,) = training.prepare(training.load(0).with_totals())
    held = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    kept = Kept([*module.parameters(), *module.buffers(), *held])
    half = config.train.precision == "bf16"
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = training.losses(batch).loss
    activations = kept.bytes
    loss.backward()
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values()]
    found = {
        "weights": sum(p.nbytes for p in module.parameters()),
        "gradients": sum(p.grad.nbytes for p in module.parameters() if p.grad is not None),
        "optimizer": sum(v.nbytes for v in moments),
        "averages": sum(v.nbytes for v in average.values.values()),
        "activations": activations,
    }
    vectors = 1, 1
    if config.objective == "pisces":
        vectors = module.understanding_encoder.vectors, config.model.generation.vectors
    return found, shape_of(batch, *vectors)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("nano/stage1", OWN),
        ("nano/stage1", [*OWN, "data.row_length=512", "data.rows=9"]),
        ("nano/stage3", [*OWN, "train.precision=bf16"]),
        ("nano/decoder", OWN),
        ("nano/gen_clip", OWN),
        ("tiny/stage1", TINY),
        ("tiny/decoder", PAIRS),
        ("tiny/gen_clip", PAIRS),
    ],
)
def test_the_plan_says_what_a_real_step_takes(recipe: str, more: list[str]) -> None:
    config = load_config(recipe, more)
    found, shape = real(config)
    planned = layout(recipe, 1, *more)
    expected = vars(planned.memory) | {
        "activations": rehearsed(planned.module, config, shape, sharded=False, accelerator=False).kept
    }
    assert min(found[name] for name in ("weights", "gradients", "optimizer", "activations")) > 0
    for name, size in found.items():
        assert expected[name] == pytest.approx(size, rel=0.1), name


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_activation_checkpointing_is_counted_as_it_is(kind: str) -> None:
    # On real tensors `LiveBytes` follows real storages.
    config = load_config("nano/stage1", [*OWN, "model.llm.config.num_hidden_layers=6", f"train.checkpointing={kind}"])
    training = build_training(config)
    checkpoint_activations(training.module, kind)
    for p in training.module.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    (batch,) = training.load(0).with_totals()
    with LiveBytes() as live:
        loss = training.losses(batch).loss
        kept = live.now
        loss.backward()
    vectors = training.module.understanding_encoder.vectors, config.model.generation.vectors  # type: ignore[union-attr]
    needs = rehearsed(skeleton(config), config, shape_of(batch, *vectors), sharded=False, accelerator=False)
    assert needs.kept == pytest.approx(kept, rel=0.02)
    assert needs.kept + needs.transient == pytest.approx(live.peak(), rel=0.05)
    found = rehearsed(skeleton(config), load_config("nano/stage1", [*OWN]), SHAPE, sharded=False)
    assert found.kept >= rehearsed(skeleton(config), config, SHAPE, sharded=False).kept


def test_memory_grows_with_the_rows_and_norms_are_wide_on_accelerators() -> None:
    config = load_config("nano/gen_clip", [*OWN, "train.precision=bf16"])
    module, shapes = skeleton(config), [Shape(pictures=n, caption=20, own=n, everywhere=n) for n in (4, 8)]
    one, two = (rehearsed(module, config, shape, sharded=True).kept for shape in shapes)
    assert one < two <= 2 * one
    assert one > rehearsed(module, config, shapes[0], sharded=True, accelerator=False).kept


# -------------------------------------------------------------------------------------------------- what is assumed


def test_the_mean_sample_follows_the_weights() -> None:
    stage3 = mean_sample(load_config("8b/stage3"), 729, 64)
    conversation, drawn = 35 + 250 + 2 + 729, (35 + 10 + 2 + 64) + (20 + 120) / 2
    assert stage3.tokens == pytest.approx((conversation + drawn) / 2)
    assert (stage3.seen, stage3.drawn) == (0.5, 0.5)
    assert stage3.longest == conversation
    assert stage3.supervised == pytest.approx((150 + 1 + 3) / 2)
    with pytest.raises(PlanError, match="nano/decoder: data.sources has no tasks"):
        mean_sample(load_config("nano/decoder"), 16, 4)


def test_every_gpu_has_its_facts() -> None:
    for name in ("h100", "h200", "a100-40", "a100-80", "b200", "l40s", "rtx4090"):
        facts = gpu_facts(name)
        assert 100 < facts["tflops"] < 3000 and 20 < facts["gib"] < 200
    with pytest.raises(PlanError, match="no GPU 'H10': did you mean h100. known are h100, h200"):
        gpu_facts("H10")


# ------------------------------------------------------------------------------------------------------- the layout


def test_shards_are_shares_and_small_frozen_parts_stay_whole() -> None:
    one, eight = layout("nano/stage1", 1, *OWN, "train.batch_size=16"), layout("nano/stage1", 8, "train.batch_size=16")
    assert eight.memory.optimizer == one.memory.optimizer / 8
    two = eight.changed(replicas=2).memory  # groups of four
    assert two.optimizer == one.memory.optimizer / 4
    spread = eight.changed(shard_frozen_above=0)
    assert spread.memory.weights < eight.memory.weights
    everything = sum(p.numel() for p in eight.module.parameters())
    table = sum(p.numel() for p in eight.module.decoder.condition.parameters())  # looked at without a call: whole
    assert spread.memory.weights == pytest.approx(4 * (everything - table) / 8 + 4 * table)
    assert one.memory.gathered == 0 < eight.memory.gathered


def test_gradients_are_whole_where_they_wait_for_the_last_micro_batch() -> None:
    waiting = layout("nano/stage1", 4, "train.batch_size=16", "train.accumulate=2")
    learning = sum(p.numel() for p in waiting.module.parameters() if p.requires_grad)
    assert waiting.memory.gradients == 4 * learning
    assert waiting.changed(reduce_each=True).memory.gradients == learning
    assert waiting.changed(accumulate=1).memory.gradients == learning


def test_what_is_gathered_together_is_everything_once() -> None:
    module: Any = layout("nano/stage1", 1, *OWN).module
    sizes = group_sizes(module, 1_000_000_000)
    learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sum(sizes) == learning
    assert sizes.count(sum(p.numel() for p in module.llm.model.layers[0].parameters())) == 2


def test_numbers_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(PlanError, match="train.replicas = 3 does not divide 8 GPUs: set 1, or the number of machines"):
        layout("8b/stage1", 8, "train.replicas=3")
    with pytest.raises(PlanError, match="train.batch_size = 4 is less than 8 GPUs: take at most 4, or raise it"):
        layout("nano/stage1", 8)


# ----------------------------------------------------------------------------------------------------- what to change


def test_a_remedy_is_enough_and_is_needed() -> None:
    wide = layout("nano/stage1", 2, *OWN, "train.batch_size=64", "data.row_length=512", "data.rows=8")
    full, total = wide.changed(checkpointing="full").memory.total / GIB, wide.memory.total / GIB
    rows = wide.changed(rows=1).memory.total / GIB
    assert RESERVE < min(full, rows) < total
    found = remedy(wide, max(full, rows))
    assert "train.checkpointing=" in found and "data.rows=1" in found and " or " in found
    least = wide.changed(rows=1, checkpointing="full", gpus=64).memory.total / GIB
    found = remedy(wide, (least + min(full, rows)) / 2)
    assert " and " in found or "--gpus" in found
    lonely = wide.changed(gpus=1)
    assert remedy(lonely, wide.memory.total / GIB).endswith(f"--gpus 2 ({wide.memory.total / GIB:.1f} GiB)")
    assert remedy(wide, RESERVE / 2).startswith("no setting helps, 4.0 GiB do not shrink")


def test_unpacked_trainings_are_cut_into_as_many_micro_batches_as_fit() -> None:
    whole = layout("nano/decoder", 1, *OWN, "train.batch_size=64")
    cut = whole.changed(accumulate=8).memory.total / GIB
    found = remedy(whole, cut)
    assert "train.accumulate=8" in found


def test_a_training_that_does_not_fit_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "nano/decoder", *OWN, "train.batch_size=64", "--gpus", "1"]
    assert main([*command, "--json"]) == 0
    total = json.loads(capsys.readouterr().out.splitlines()[-1])["memory_gib"]["total"]
    facts = {"tflops": 1.0, "gib": total - 0.005}
    monkeypatch.setattr(planning, "gpu_facts", lambda name: facts)
    assert main(command) == 2
    told = capsys.readouterr()
    assert "unet" not in told.err and "activations" in told.out
    assert told.err.startswith("pisces: nano/decoder does not fit on 1 x h100: ")
    assert " too many: set train." in told.err and len(told.err.splitlines()) == 1
    assert main([*command, "--json"]) == 2
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not printed["fits"] and printed["too_much_gib"] == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--gpus", "0"], "not a whole number of at least 1"),
        (["--gpus", "1", "--utilisation", "40"], "'40' is no share"),
        (["--gpus", "1", "--gpu", "h1000"], "did you mean h100?"),
        ([], "--gpus"),
    ],
)
def test_wrong_arguments_are_one_line(more: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["plan", "nano/stage1", *more]) == 2
    except SystemExit as left:
        assert left.code == 2
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- the 8b recipes

LEARNING = {"8b/gen_clip": 1.0819e9, "8b/decoder": 2.4398e9}
ROWS = re.findall(r"^\| `(8b/\w+)` \| (\d+) \| `(.+?)` \| (.+) \|$", DOCS, re.MULTILINE)
OTHERS = [pytest.param(*row, marks=pytest.mark.slow) for row in ROWS if row[1] != "64"]


@pytest.mark.parametrize(("recipe", "gpus", "settings", "told"), [row for row in ROWS if row[1] == "64"] + OTHERS)
def test_the_plans_of_the_papers_scale(recipe: str, gpus: str, settings: str, told: str) -> None:
    found = plan(load_config(recipe, settings.split()), int(gpus))
    learning = LEARNING.get(recipe, 8.0958e9)
    run, step, memory = found["run"], found["step"], found["memory_gib"]
    figures = f"{memory['total']:.1f}", f"{step['seconds']:.3g}", f"{run['days']:.3g}", f"{run['gpu_hours']:,.0f}"
    assert " | ".join(figures) == told  # in docs/recipes.md
    assert found["fits"] and memory["total"] < found["gpu_gib"]
    assert sum(part["learning"] for part in found["parts"].values()) == pytest.approx(learning, rel=1e-3)
    shards = int(gpus) // found["replicas"]
    assert memory["optimizer"] * GIB == pytest.approx(8 * learning / shards, rel=1e-3)
    seconds = step["flops"] / (int(gpus) * 989.4e12 * 0.4)
    assert step["seconds"] == pytest.approx(seconds)
    assert run["gpu_hours"] == pytest.approx(seconds * run["steps"] * int(gpus) / 3600)
    assert found["disk_gb"]["checkpoint"] >= 12 * learning / 1e9 * 0.999
    if recipe == "8b/stage1":
        assert found["parts"]["llm"]["learning"] == pytest.approx(8.03e9, rel=1e-3)
        assert step["tokens_per_sample"] == pytest.approx((131 + 896) / 2)
        assert step["flops_by_part"]["llm"] / step["tokens"] == pytest.approx(6 * 8.03e9, rel=0.05)


def test_every_training_is_planned_at_three_sizes() -> None:
    trainings = ("gen_clip", "decoder", "stage1", "stage2", "stage3")
    assert [(recipe, gpus) for recipe, gpus, *_ in ROWS] == [
        (f"8b/{name}", gpus) for name in trainings for gpus in ("8", "64", "256")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "told"), re.findall(r"```sh\n(pisces plan [^\n]*)\n```\n\n```text\n(.*?)\n```", DOCS, re.DOTALL)
)
def test_pasted_plans_are_what_the_command_prints(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(line)[1:])
    printed = "".join(capsys.readouterr())
    assert [row.rstrip() for row in printed.splitlines()] == told.splitlines()


def test_lines_for_torchrun_are_trainings() -> None:
    lines = re.findall(r"^torchrun .* -m open_pisces (.*)$", DOCS, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        args = build_parser().parse_args(shlex.split(line))
        load_config(args.recipe, args.overrides)


# ------------------------------------------------------------------------------------------------------ the ablations


@pytest.mark.parametrize("recipe", LAB)
def test_the_ablations_can_be_planned(recipe: str) -> None:
    config = load_config(recipe)
    (shape,) = [Layout(config, 64, skeleton(config)).largest_micro_batch]
    assert shape.rows or shape.pictures


def test_the_ablations_are_the_papers() -> None:
    pretrain, tune = load_config("lab/synergy_pretrain"), load_config("lab/synergy_tune")
    for config in (pretrain, tune):
        assert (config.train.batch_size, config.train.schedule, config.train.warmup_ratio) == (1024, "cosine", 0.03)
    assert pretrain.data.sources[0].take == 15_000_000
    assert pretrain.train.steps == -(-2 * 15_000_000 // 1024)
    assert tune.model.start == "runs/lab/synergy_pretrain/model"
    siglip = load_config("lab/siglip_decoder")
    assert siglip.data.sources[0].take == 30_000_000 and siglip.model.generation.vectors == 81
    # The tower that it names is SigLIP's, and nothing is trained on random features.
    with torch.device("meta"):
        ours = build_part("generation_encoder", without_sources(siglip.model))
        theirs = SiglipVisionModel(SiglipVisionConfig(**load_config("8b/stage1").model.understanding.config))
    translated = translate(dict(theirs.state_dict()))
    assert {k: v.shape for k, v in translated.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    with pytest.raises(ImportSourceError, match="siglip-so400m-patch14-384: no such folder here"):
        build_part("generation_encoder", siglip.model)
