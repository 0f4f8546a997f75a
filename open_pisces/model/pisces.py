"""Pisces: one autoregressive LLM that reads understanding vectors and writes generation vectors (arXiv 2506.10395)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_pisces.batch import Losses, SequenceBatch
from open_pisces.config import LossConfig, ModelConfig
from open_pisces.device import FloatBuffers, upcast
from open_pisces.errors import PiscesError
from open_pisces.model.adapters import adopt_adapter
from open_pisces.model.bridge import Bridge
from open_pisces.model.cross_entropy import head_cross_entropy
from open_pisces.model.decoder import ImageDecoder
from open_pisces.model.encoders import GenerationEncoder, SharedEncoder, UnderstandingEncoder
from open_pisces.model.folder import load_parts, write_folder
from open_pisces.model.parts import PARTS


class HistoryNoise(NamedTuple):
    """Noise for the vectors that the LLM is fed, so that it learns to read the caption and not only its own history.

    After Kyutai's CALM (arXiv 2509.06926); for ``tiny``. A tuple, because sharding looks into those.
    """

    shares_B: Tensor
    """Of each picture: the share of noise in the variance of its vectors, float32."""
    noise_BME: Tensor
    """Standard normal numbers."""

    def mixed_with(self, vectors_BME: Tensor) -> Tensor:
        """Vectors and noise; the variance of standardised vectors stays 1."""
        drawn = len(self.shares_B)  # a blank picture, which no place takes, has no noise
        share = self.shares_B.view(-1, 1, 1)
        mixed = share.sqrt() * self.noise_BME + (1 - share).sqrt() * vectors_BME[:drawn]
        return torch.cat([mixed, vectors_BME[drawn:]])


class Pisces(FloatBuffers):
    """The multimodal LLM with its two encoders and its decoder.

    The hidden state (after the LLM's final norm) at ``[IMG]`` predicts vector 1, at vector k vector k + 1, at vector
    M ``[/IMG]``. Training feeds all M vectors. Both losses are sums divided by counts of the *global* batch, so
    that accumulation and sharding change nothing. In a model that is cast, rotary frequencies and statistics stay
    float32 (`FloatBuffers`).
    """

    base_model_prefix = ""
    """None: PEFT asks for it when an adapter is attached to the whole model."""

    def __init__(
        self,
        config: ModelConfig,
        llm: Any,
        understanding_encoder: UnderstandingEncoder | SharedEncoder,
        generation_encoder: GenerationEncoder,
        bridge: Bridge,
        decoder: ImageDecoder | None = None,
        weights: LossConfig | None = None,
    ) -> None:
        super().__init__()
        self.settings = config
        self.weights = weights or LossConfig()
        self.llm = llm
        self.understanding_encoder = understanding_encoder
        self.generation_encoder = generation_encoder
        self.bridge = bridge
        self.decoder = decoder
        self.folder: Path | None = None
        """Where it was loaded from, if from a folder: its tokenizer and training record belong to it."""

    @property
    def config(self) -> Any:
        """The LLM's transformers configuration: what `Trainer` and PEFT look at and set. Ours is `settings`.

        Adapters: `model/adapters.py`.
        """
        return self.llm.config

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> Pisces:
        """Read a model folder of parts, in evaluation mode.

        Host memory holds the weights once, in ``dtype`` (float32 by default): 23 GB at ``8b`` in bfloat16.

        Raises:
            ModelFolderError: naming what is missing, damaged or does not fit.
        """
        config, parts = load_parts(folder, dtype or torch.float32)
        pisces = cls(config, **parts).eval()
        pisces.folder = Path(folder)
        return pisces

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write the model folder of parts, each of which its own library can load.

        Tokenizer, training record and licences of the folder it was loaded from go with it.

        Raises:
            AdapterError: for an adapter that could not be loaded again; nothing is written then.
        """
        adopt_adapter(self)
        parts = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        write_folder(folder, self.settings, parts, tokenizer, start=self.folder)

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.llm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its LLM's weights."""
        return next(self.llm.parameters()).dtype

    # ------------------------------------------------------------------------------------------ pictures in

    def understand(self, pixels_BCHW: Tensor) -> Tensor:
        """Pictures in [0, 1] to what the LLM reads of them, ``(B, N, D)``: no pooling, a long sequence."""
        # A frozen tower needs no graph, and its activations would be the largest of the step.
        frozen = not any(p.requires_grad for p in self.understanding_encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            vectors_BNE = self.understanding_encoder(pixels_BCHW)
        # Sharded in bfloat16, the projector is cast and a frozen encoder is not. Under autocast it is the other way,
        # and a float32 copy of all vectors would be kept for nothing.
        dtype = self.bridge.understanding_projector.first.weight.dtype
        if dtype.itemsize < vectors_BNE.dtype.itemsize:
            vectors_BNE = vectors_BNE.to(dtype)
        return self.bridge.understanding_projector(vectors_BNE)

    @torch.no_grad()
    def generation_vectors(self, pixels_BCHW: Tensor) -> Tensor:
        """Pictures in [0, 1] to the vectors the LLM learns to write, ``(B, M, E)``, in the LLM's space."""
        return self.bridge.targets(self.generation_encoder.features(pixels_BCHW))

    def embed(self, batch: SequenceBatch, noise: HistoryNoise | None = None) -> tuple[Tensor, Tensor]:
        """The LLM's input and the vectors it must predict; an encoder runs only if the batch has pictures for it.

        A picture that no place takes (see `with_blank_pictures`) ties its modules to the graph with weight 0.

        Args:
            batch: sequences with their pictures.
            noise: what the fed vectors are mixed with; the targets are not.

        Returns:
            ``(B, S, D)`` embeddings, image places filled; ``(pictures, M, E)`` targets in float32.
        """
        # Places of pictures hold a placeholder's embedding, which is written over below.
        words_BSD = self.llm.get_input_embeddings()(batch.ids_BS)
        flat = words_BSD.flatten(0, 1)
        if batch.understanding_features_BNE is not None:
            seen_BNE = batch.understanding_features_BNE.to(words_BSD.dtype)
            flat = _place(flat, batch.understanding_at_K, self.bridge.understanding_projector(seen_BNE))
        elif len(batch.understanding_pixels_BCHW):
            flat = _place(flat, batch.understanding_at_K, self.understand(batch.understanding_pixels_BCHW))
        targets_BME = batch.generation_vectors_BME
        if targets_BME is None and batch.generation_features_BME is not None:
            targets_BME = self.bridge.statistics.standardize(upcast(batch.generation_features_BME))
        elif targets_BME is None and len(batch.generation_pixels_BCHW):
            targets_BME = self.generation_vectors(batch.generation_pixels_BCHW)
        if targets_BME is None:
            targets_BME = self.bridge.statistics.null_ME.expand(0, -1, -1)
        else:
            fed_BME = targets_BME if noise is None else noise.mixed_with(targets_BME)
            fed_BMD = self.bridge.generation_projector(fed_BME.to(words_BSD.dtype))
            flat = _place(flat, batch.generation_at_K, fed_BMD)
        return flat.view_as(words_BSD), targets_BME[: len(batch.generation_at_K) // targets_BME.shape[1]]

    # ------------------------------------------------------------------------------------------ the objective

    def forward(
        self, batch: SequenceBatch, draws_KR: Tensor | None = None, noise: HistoryNoise | None = None
    ) -> Losses:
        """Cross-entropy on text plus the head's error on vectors, the paper's squared error (paper: objective).

        Logits exist only where a token is supervised: at 128k words a full set would cost more than the LLM.

        Args:
            batch: sequences with their pictures.
            draws_KR: ``(vectors, head.loss_draws)`` standard normal numbers, for a head whose loss is random.
            noise: what the vectors fed to the LLM are mixed with; None, the paper's, feeds true ones.
        """
        inputs_BSD, targets_BME = self.embed(batch, noise)
        # 0 in the paper's stages: teacher forcing.
        for _ in range(self.weights.own_passes):
            inputs_BSD = self.feed_own(inputs_BSD, batch)
        hidden_KD = self.hidden(inputs_BSD, **self.packing(batch)).flatten(0, 1)
        head = self.llm.get_output_embeddings()
        kernel = self.weights.kernel
        summed = head_cross_entropy(head, hidden_KD[batch.text_at_K], batch.labels_K, kernel)
        text = summed / max(batch.total_text, 1)
        # One left of each vector's place sits what predicts it: [IMG], or the vector before.
        targets_KE = targets_BME.flatten(0, 1)
        drawn = max(batch.total_vectors, 1)
        error_K, predicted_KE = self.bridge.head.loss(hidden_KD[batch.generation_at_K - 1], targets_KE, draws_KR)
        # Divided by the vectors of the global batch, not of this one: accumulation changes nothing.
        vectors = error_K.sum() / drawn
        loss = self.weights.text * text + self.weights.vectors * vectors
        # Squared error shrinks what it cannot know: the two norms drift apart before pictures turn grey.
        norms = {"norm_predicted": predicted_KE, "norm_target": targets_KE}
        parts = {name: upcast(value.detach()).norm(dim=-1).sum() / drawn for name, value in norms.items()}
        return Losses(loss, {"text": text.detach(), "vectors": vectors.detach(), **parts})

    def feed_own(self, inputs_BSD: Tensor, batch: SequenceBatch) -> Tensor:
        """The same input with the vectors the LLM would write there, given what it was fed, in place of the true ones.

        Squared error under teacher forcing learns to copy style and identity from the vectors before, which at
        inference are its own guesses. One pass replaces each vector by a guess from true ones; after M passes the
        input is what generation feeds. A measured deviation from the paper, for ``tiny``.
        """
        with torch.no_grad():
            hidden_KD = self.hidden(inputs_BSD, **self.packing(batch)).flatten(0, 1)
            own_KE = self.bridge.head.sample(hidden_KD[batch.generation_at_K - 1])
        fed_KD = self.bridge.generation_projector(own_KE)
        return _place(inputs_BSD.flatten(0, 1), batch.generation_at_K, fed_KD[None]).view_as(inputs_BSD)

    def hidden(self, inputs_BSD: Tensor, **cache: Any) -> Tensor:
        """The LLM's last hidden states, ``(B, S, D)``, after its final norm."""
        # `get_decoder` finds the transformer inside PEFT's wrappers too; `base_model` is theirs there.
        return self.llm.get_decoder()(inputs_embeds=inputs_BSD, **{"use_cache": False, **cache}).last_hidden_state

    def packing(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """What keeps the samples of packed rows apart; nothing for rows of one sample.

        The mask is our own: transformers infers packing from positions alone, and silently stops doing so when a
        padding mask or a cache is set. Flash attention takes no such mask and has only that route.
        """
        if batch.samples_BS is None or batch.positions_BS is None:
            return {}
        kind = self.llm.config._attn_implementation
        if "flash" in kind and len(batch.positions_BS) == 1:
            return {"position_ids": batch.positions_BS}
        if kind != "sdpa":
            found = f"attention {kind!r} with {len(batch.positions_BS)} rows"
            raise PiscesError(f"{found} would let packed samples see each other: use sdpa, or flash with data.rows=1")
        return {"position_ids": batch.positions_BS, "attention_mask": block_mask(batch.samples_BS)}

    # ------------------------------------------------------------------------------------------ vectors out

    def next_vector(self, hidden_BD: Tensor, draws_BR: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From the hidden state at ``[IMG]`` or at vector k: vector k + 1 ``(B, E)`` and its embedding ``(B, D)``.

        ``draws_BR`` are the standard normal numbers that a head takes to sample (`VectorHead.sample_draws`).
        """
        vector_BE = self.bridge.head.sample(hidden_BD, draws_BR)
        return vector_BE, self.bridge.generation_projector(vector_BE)


def block_mask(samples_BS: Tensor) -> Tensor:
    """Which place sees which, ``(B, 1, S, S)`` bool: earlier ones of its own sample. Padding sees padding."""
    same = samples_BS[:, None, :, None] == samples_BS[:, None, None, :]
    return same.tril_()


def with_blank_pictures(batch: SequenceBatch) -> SequenceBatch:
    """A batch with a blank picture for each encoder that has none.

    For trainings on several ranks: each rank must run every sharded module in every step, or its all-gathers would wait
    for the others' forever. Inference has no such need.
    """
    names = ("understanding_pixels_BCHW", "generation_pixels_BCHW", "understanding_features_BNE")
    blanks = {}
    for name in (*names, "generation_features_BME"):
        pictures = getattr(batch, name)
        if pictures is not None and len(pictures) == 0:
            blanks[name] = pictures.new_zeros(1, *pictures.shape[1:])
    return replace(batch, **blanks)


def _place(flat_KD: Tensor, at_K: Tensor, vectors_BND: Tensor) -> Tensor:
    """Write vectors into their places; pictures without places add 0, which only ties their module to the graph."""
    vectors = vectors_BND.flatten(0, 1).to(flat_KD.dtype)
    if len(at_K) == 0:
        return flat_KD + 0 * vectors.sum()
    return flat_KD.index_copy(0, at_K, vectors)
