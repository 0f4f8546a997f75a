"""Every setting of every run: typed, strict, frozen. `recipe` reads them from YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from open_pisces.settings import Settings

# ---------------------------------------------------------------------------------------------------- the model


class PartConfig(Settings):
    """A part that transformers or diffusers builds, from a pretrained ``source`` or from a ``config``."""

    source: str | None = None
    config: dict[str, Any] = {}
    """The library's keyword arguments. Used without a source, and for shapes on the meta device (``pisces plan``)."""


class UnderstandingConfig(PartConfig):
    """The understanding encoder: a SigLIP; or gen-CLIP, which then serves both tasks (the paper's Table 4)."""

    tower: Literal["siglip", "generation"] = "siglip"
    """``generation``: every patch of the generation encoder, none averaged, is read by the LLM; ``source`` and
    ``config`` are not used, and the encoder has to stay frozen."""


class GenerationEncoderConfig(Settings):
    """The vision tower of gen-CLIP: a ViT of ours that can drop patches (``model/encoders.py``)."""

    source: str | None = None
    image_size: int = 64
    patch_size: int = 8
    width: int = 32
    layers: int = 2
    heads: int = 2
    mlp_width: int = 64
    norm: Literal["pre", "post"] = "pre"
    """``pre``: norms before each branch, as in CLIP. ``post``: on each branch's output, as in EVA-CLIP-E."""
    norm_eps: float | None = None
    """What norms add to the variance; None: CLIP's 1e-5 with ``pre``, EVA-CLIP-E's 1e-6 with ``post``; SigLIP: 1e-6."""
    entry_norm: bool = True
    """A norm right after the position embeddings, as in CLIP; EVA-CLIP and SigLIP have none."""
    class_token: bool = True
    """SigLIP has none; its pictures may have a rest beyond whole patches, which it does not see (384 = 27 x 14 + 6)."""
    features: Literal["raw", "normalized"] = "raw"
    """Targets are the last block's output (Emu2), or that after the tower's last norm (SigLIP's hidden states)."""
    patch_bias: bool = False
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    pool: int = 2
    """Kernel of the average pooling over the grid (paper, architecture: 4, from 32x32 to 8x8)."""

    @model_validator(mode="after")
    def _fits(self) -> GenerationEncoderConfig:
        rest = self.image_size % self.patch_size if self.class_token else 0
        if rest or self.grid % self.pool:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size x pool")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size

    @property
    def vectors(self) -> int:
        """M: generation vectors of one picture after pooling."""
        return (self.grid // self.pool) ** 2


class PatchTransformerConfig(Settings):
    """A transformer over patches of the latents (`model.patch_transformer`)."""

    patch: int = Field(default=4, ge=1)
    """Side of a patch in latents."""
    width: int = Field(default=320, ge=1)
    layers: int = Field(default=6, ge=1)
    heads: int = Field(default=5, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> PatchTransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class Preset(Settings):
    """A trade of time for detail in drawing; what is None is the model's own."""

    steps: int = Field(ge=1)
    guidance_scale: float | None = Field(default=None, ge=0)
    vector_guidance: float | None = Field(default=None, ge=0)


PresetName = Literal["quality", "balanced", "fast"]


class DecoderConfig(Settings):
    """The diffusion decoder: gen-CLIP vectors in, pixels out."""

    source: str | None = None
    """A diffusers pipeline with ``unet/`` and ``vae/``: Stable Diffusion 1.5, 2.1, XL, or Emu2's."""
    variant: str | None = None
    """Of the source's files, such as ``fp16``; None takes the plain ones."""
    unet: dict[str, Any] = {}
    transformer: PatchTransformerConfig | None = None
    """Takes the U-Net's place. Deviation from the paper, for ``tiny``."""
    vae: dict[str, Any] = {}
    """Arguments of ``AutoencoderKL``; or ``{unshuffle: 4}``: latents are pixels moved into channels (``tiny``)."""
    scheduler: dict[str, Any] = {}
    """``class`` names any diffusers scheduler; the rest are its arguments."""
    image_size: int = 64
    spatial_condition: bool = False
    """Concatenate the upsampled condition grid to the U-Net's input. Deviation from the paper, for ``tiny``."""
    predicts: Literal["scheduler", "clean"] = "scheduler"
    """The U-Net's output: what its scheduler asks for, or the clean latents. Deviation from the paper, for ``tiny``."""
    steps: int = Field(default=50, ge=1)
    """Default number of denoising steps (Emu2: 50)."""
    guidance_scale: float = Field(default=3.0, ge=0)
    """Default scale of null-caption guidance (Emu2: 3.0)."""
    null_condition: Literal["caption", "dropped"] = "caption"
    """What guidance turns away from: the LLM's vectors for the empty caption (Emu2), or what the decoder was trained
    with in place of a dropped condition. Deviation from the paper, for ``tiny``."""
    noise_level: float = Field(default=0.0, ge=0)
    """How wrong the LLM's vectors are, as the decoder is told, in deviations of the targets; true vectors have 0."""
    presets: dict[PresetName, Preset] = {}
    """Those that are missing take all, three fifths and a fifth of ``steps``; ``fast`` three quarters of the guidance,
    too, since few large steps overshoot with all of it."""

    def preset(self, name: PresetName) -> Preset:
        """A preset by its name."""
        if name in self.presets:
            return self.presets[name]
        shares = {"quality": 1.0, "balanced": 0.6, "fast": 0.2}
        weaker = name == "fast" and self.guidance_scale > 1
        guidance = 1 + 0.75 * (self.guidance_scale - 1) if weaker else None
        return Preset(steps=max(1, round(self.steps * shares[name])), guidance_scale=guidance)


class BridgeConfig(Settings):
    """The MLPs between the encoders and the LLM."""

    standardise: bool = False
    """Standardize generation targets per channel (our choice at ``tiny``; Emu2 and the paper use raw features)."""
    head: Literal["squared_error", "flow"] = "squared_error"
    """What writes vectors: the paper's MLP with squared error, or a flow that samples (ours; `FlowHead`)."""
    flow_width: int = Field(default=256, ge=1)
    flow_layers: int = Field(default=3, ge=1)
    flow_draws: int = Field(default=4, ge=1)
    """Noises and times that each hidden state is trained with (MAR, NextStep-1: 4)."""
    flow_time_mean: float = 0.4
    """Mean of the logit-normal times; above 0 means noisier."""
    flow_steps: int = Field(default=4, ge=1)
    """Euler steps from noise to a vector."""
    vector_guidance: float = Field(default=1.0, ge=0)
    """Default scale of guidance on the LLM's hidden states, away from the empty caption's; 1: none (the paper)."""

    def same_head(self, other: BridgeConfig) -> bool:
        """Whether the weights of one's head fit the other's."""
        if self.head != other.head:
            return False
        sizes = ("flow_width", "flow_layers") if self.head == "flow" else ()
        return all(getattr(self, name) == getattr(other, name) for name in sizes)


Template = Literal["tiny", "llama3", "chatml", "qwen2", "smollm2"]


class ModelConfig(Settings):
    """All parts of one Pisces."""

    start: str | None = None
    """A model folder to start from. Its parts replace those described here."""
    settings: Literal["recipe", "start"] = "recipe"
    """Where what the start folder says of its parts is taken from: the recipe repeats it, or it is read there (and the
    recipe's own keys win): for recipes that tune any model."""
    fresh: list[Literal["llm", "bridge"]] = []
    """What is built anew although the start folder holds it: ``llm``, with the MLPs around it; or ``bridge``, these
    MLPs alone, around an LLM that has never been in a Pisces. The targets' statistics stay."""
    llm: PartConfig = PartConfig()
    understanding: UnderstandingConfig = UnderstandingConfig()
    understanding_mean: list[float] = [0.5, 0.5, 0.5]
    understanding_std: list[float] = [0.5, 0.5, 0.5]
    generation: GenerationEncoderConfig = GenerationEncoderConfig()
    generation_mean: list[float] = [0.5, 0.5, 0.5]
    generation_std: list[float] = [0.5, 0.5, 0.5]
    bridge: BridgeConfig = BridgeConfig()
    decoder: DecoderConfig = DecoderConfig()
    template: Template = "tiny"
    """The chat template: a file in ``data/templates``."""
    tokenizer: str = "bytes"
    """``bytes`` (no training), ``bpe`` (byte-level BPE trained on the run's texts), or a folder or hub name."""
    vocab_size: int = 4096
    """Size of a ``bpe`` vocabulary, special tokens included."""


# ------------------------------------------------------------------------------------------------------ the data

Task = Literal[
    "generate_short",
    "generate_detailed",
    "reconstruct",
    "caption_short",
    "caption_detailed",
    "question",
    "conversation",
]


class SourceConfig(Settings):
    """One dataset in a mixture."""

    path: str
    """A folder of shards with their index, or its name under the data folder (``PISCES_DATA``)."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples that are drawn from here, relative to the other sources."""
    take: int = Field(default=0, ge=0)
    """Size of a random subset to use, drawn by the seed; 0: all (paper, stage 3: 4M + 4M captions)."""
    tasks: dict[Task, float] = {}
    """Weight of each task, one of which is drawn for a sample. Empty for trainings on pairs (gen-CLIP, decoder)."""


class DataConfig(Settings):
    """What a training reads."""

    sources: list[SourceConfig] = []
    questions_per_image: int = Field(default=1, ge=1)
    """Questions asked about one picture in one sample."""
    max_length: int = Field(default=512, ge=8)
    """Most tokens of a sequence. A dataset with a longer one is refused before the first step, naming the sample."""
    row_length: int = Field(default=0, ge=0)
    """Tokens of a packed row: several samples that do not attend to each other. 0: one sample a row, padded."""
    rows: int = Field(default=16, ge=1)
    """Packed rows of one micro-batch; ``train.accumulate`` cuts unpacked batches."""
    lanes: int = Field(default=64, ge=1)
    """Seeded walks that make up the order of samples, shared out among ranks; another number is another order."""
    window: int = Field(default=1024, ge=1)
    """Size of the shuffle window inside a lane, in samples."""
    workers: int = Field(default=0, ge=0)
    """Worker processes that read, decode and collate ahead; 0: one thread."""
    features: Literal["", "float32", "float16"] = ""
    """Dtype of the feature cache that replaces the frozen encoders (``pisces data encode``); "" encodes on the fly."""
    feature_kinds: list[Literal["generation", "understanding"]] = ["generation", "understanding"]
    """Encoders whose outputs are cached: M x E numbers a picture, or N x width, which is for small datasets."""
    max_bad: float = Field(default=0.01, ge=0, le=1)
    """Share of damaged samples above which the run stops. Damaged samples are skipped, counted and named."""
    drop_caption: float = Field(default=0.1, ge=0, le=1)
    """Share of generation samples trained with the empty caption, for null-caption guidance (Emu2: 0.1)."""
    system: Literal["keep", "drop"] = "keep"
    """A conversation's own system turn replaces the template's (``keep``) or is left out (``drop``)."""

    @model_validator(mode="after")
    def _fits(self) -> DataConfig:
        if self.row_length and self.row_length < self.max_length:
            shorter = f"row_length {self.row_length} is less than max_length {self.max_length}"
            raise ValueError(f"{shorter}: a sample may fit in no row")
        return self


# -------------------------------------------------------------------------------------------------- the training


class ContrastiveConfig(Settings):
    """Settings of the two contrastive trainings (``understanding_clip``, ``gen_clip``)."""

    tower: Literal["generation", "understanding"] = "generation"
    text: dict[str, Any] = {}
    """Arguments of ``CLIPTextConfig`` for the text tower, which is dropped after this training."""
    width: int = 32
    """Width of the shared embedding space."""
    mae_weight: float = Field(default=1.0, ge=0)
    """Weight of the MAE loss beside the contrastive one; 0 turns it off."""
    visible: float = Field(default=0.25, gt=0, le=1)
    """Share of patches that the MAE pass encodes (MAE: 0.25)."""
    mae_layers: int = 1
    mae_width: int = 32
    mae_heads: int = 2


class DiffusionConfig(Settings):
    """Settings of the decoder's training."""

    drop_condition: float = Field(default=0.1, ge=0, le=1)
    """Share of conditions replaced by the mean of the targets (Emu2: 0.1)."""
    noisy: float = Field(default=0.0, ge=0, le=1)
    """Share of pictures whose true vectors get noise; the decoder is told its level (RAE, arXiv 2510.11690)."""
    noise: float = Field(default=0.6, ge=0)
    """Highest level of that noise, in deviations of the targets; levels are uniform from 0."""
    predicted: float = Field(default=0.0, ge=0, le=1)
    """Share of pictures with the vectors that the start folder's LLM predicts for a caption (``data.features``)."""
    statistics_samples: int = Field(default=2048, ge=2)
    """Pictures from which the target statistics are computed if the start folder has none."""
    time_shift: float = 0.0
    """Mean of the logit-normal time distribution (flow schedulers only); above 0 means noisier."""


class LossConfig(Settings):
    """Weights of the two terms of the paper's objective; the paper gives none, so both are 1."""

    text: float = 1.0
    vectors: float = 1.0
    kernel: Literal["chunked", "liger", "cut_cross_entropy"] = "chunked"
    """Cross-entropy kernel: ours, in chunks, or a fused CUDA kernel (``pip install open-pisces[kernels]``)."""
    own_passes: int = Field(default=0, ge=0)
    """Passes that replace the vectors fed to the LLM by its own; 0: teacher forcing (paper). Above 0: for ``tiny``."""
    history_noise: float = Field(default=0.0, ge=0, le=1)
    """Highest share of noise in the vectors fed to the LLM; each picture draws its own. 0: none (paper)."""


class LoraConfig(Settings):
    """LoRA on the LLM (arXiv 2106.09685): its own weights stay, the MLPs and the head beside it learn in full."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    """The adapter counts ``alpha / rank`` times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    lr: float | None = Field(default=None, gt=0)
    """Peak rate of the adapter, on the schedule of ``train.lr``; None takes that. New MLPs want a higher one than a
    language model that is to keep its language."""
    bits: Literal[4, 16] = 16
    """Of the frozen weights: 16 keeps them in bfloat16, 4 quantizes them as QLoRA does (arXiv 2305.14314): NF4, doubly
    quantized, in the layers of the LLM alone. Needs ``pip install 'open-pisces[qlora]'``."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get one, such as ``[q_proj, v_proj]``; or all but the output layer (QLoRA's finding)."""


class TrainConfig(Settings):
    """Settings of the training loop."""

    steps: int = Field(default=10, ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Samples of one optimizer step, over all ranks and micro-batches."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches of a step on one rank. Contrastive losses still compare the whole batch, in two passes."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon for matrices and AdamW for the rest, at the same rate."""
    lr: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    betas: list[float] = [0.9, 0.95]
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the averaged weights, at most (1 + step) / (10 + step); 0: none are kept."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Compute dtype. With ``bf16`` weights, optimizer and reductions stay float32. ``fp64`` is for tests."""
    compile: bool = False
    """``torch.compile`` the blocks of the LLM."""
    reduce_each: bool = False
    """Reduce-scatter gradients after every micro-batch: slower, but no rank holds them whole (4 bytes a parameter)."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: ``full`` recomputes whole blocks, ``selective`` all but matrix products."""
    lora: LoraConfig | None = None
    """Train a LoRA adapter in the LLM's place; None: all of its weights. Needs ``pip install 'open-pisces[lora]'``."""
    freeze: list[str] = ["understanding_encoder", "generation_encoder", "decoder"]
    """Parts of the model that do not learn (paper, training stages: the LLM and the MLPs learn in all stages)."""
    reorder: bool = False
    """Resume although the order of samples changed, so that some are seen twice and some never."""
    save_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    probe_every: int = Field(default=500, ge=1)
    """Steps between sample pictures and answers in the run folder."""
    replicas: int = Field(default=1, ge=1)
    """Replicas of the sharded model (HSDP: one for each machine). 1: all ranks share one."""
    shard_frozen_above: int = Field(default=1_000_000_000, ge=0)
    """Frozen parts with more parameters are sharded; smaller ones are replicated on every rank."""
    save_async: bool = True
    """Write checkpoints in the background; the training waits only for the copy to host memory."""
    keep: int = Field(default=2, ge=2)
    """Checkpoints to keep. At least 2, so one damaged file is survivable."""
    grace: float = Field(default=300.0, gt=0)
    """Seconds between a stop signal and giving up on the last checkpoint, with exit code 1."""
    timeout: float = Field(default=600.0, gt=0)
    """Collective timeout in seconds; on expiry the missing rank is named and the run ends."""
    on_bad: Literal["skip", "rewind", "fatal"] = "fatal"
    """On a loss or gradient that is not finite: skip the batch; rewind to the last checkpoint, then skip it; or end."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Batches that may be left out; one more ends the run."""
    spike: float = Field(default=0.0, ge=0)
    """A loss above this multiple of the median of the last 100 steps counts as bad, too. 0: never."""
    track: list[Literal["wandb", "trackio"]] = []
    """Trackers to log to beside TensorBoard; each has to be installed (``pip install open-pisces[track]``)."""

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate {self.accumulate} is more than batch_size {self.batch_size}")
        return self


class RunConfig(Settings):
    """One training."""

    name: str
    objective: Literal["contrastive", "decoder", "pisces"]
    """A key of `OBJECTIVES` in ``train/objectives``."""
    out: str | None = None
    """The run folder; by default ``runs/NAME``."""
    seed: int = 0
    device: str = "auto"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or f"runs/{self.name}")
