"""Our model inside transformers: configuration, processor and model by their Auto classes.

::

    import open_pisces.integrations.transformers
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    model = AutoModelForMultimodalLM.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(messages)
    model.generate(**inputs)                           # token ids, the prompt before them
    inputs = processor(text=["a red heart"], generation_mode="image")
    model.generate(**inputs, generation_mode="image")  # pixels; processor.post_process_multimodal_output: pictures

The folder is the one model folder of parts, and the work is `Generator`'s: both modes give what it gives, to the bit.
Importing this file registers the classes. No code is fetched from a hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from open_pisces.batch import SequenceBatch, Turn
from open_pisces.config import ModelConfig
from open_pisces.data.prompts import Renderer, collate, generation_turns
from open_pisces.data.tokenizer import load_tokenizer
from open_pisces.errors import PiscesError
from open_pisces.generate.generator import Generator
from open_pisces.generate.messages import as_image, read_messages
from open_pisces.generate.painter import pictures
from open_pisces.model.folder import read_config
from open_pisces.model.parts import PARTS, build_part, understanding_shape
from open_pisces.model.pisces import Pisces
from open_pisces.settings import validate

MODES = ("text", "image")


class ModeError(PiscesError):
    """A call of the transformers classes that they do not serve; the message says what they do."""


class PiscesConfig(PreTrainedConfig):
    """Our ``config.json``: ``model`` holds the settings of all parts (`ModelConfig`)."""

    model_type = "pisces"

    def __init__(self, model: dict[str, Any] | None = None, **more: Any) -> None:
        self.model = model or {}
        super().__init__(**more)

    @property
    def settings(self) -> ModelConfig:
        """The settings, typed."""
        settings: ModelConfig = validate(ModelConfig, self.model, {"": "config.json"})
        return settings


def local_folder(name: str | Path, where: Mapping[str, Any]) -> Path:
    """The folder of a model: the path itself, or what is downloaded of a hub name.

    Args:
        name: a path or a hub name.
        where: arguments of ``from_pretrained``, of which revision, token and the like are used.
    """
    if Path(name).is_dir():
        return Path(name)
    known = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    return Path(snapshot_download(str(name), **{key: where[key] for key in known if where.get(key) is not None}))


class PiscesProcessor(ProcessorMixin):
    """Chats with pictures to tokens and pixels, and back.

    Args:
        tokenizer: the model folder's.
        settings: of the model: chat template, sizes of pictures, numbers of vectors.
    """

    def __init__(self, tokenizer: Any, settings: ModelConfig) -> None:
        # Not ProcessorMixin's: it asks for an image processor, and our pictures are cut by `data.images`.
        side, vectors, _ = understanding_shape(settings)
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        self.renderer = Renderer(tokenizer, settings.template, vectors, settings.generation.vectors)
        self.sizes = side, settings.generation.image_size

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **more: Any) -> PiscesProcessor:
        """Read a model folder's tokenizer and settings."""
        folder = local_folder(pretrained_model_name_or_path, more)
        settings = read_config(folder)
        return cls(load_tokenizer(folder / "tokenizer", settings.template), settings)

    def save_pretrained(self, save_directory: str | Path, **more: Any) -> list[str]:
        """Write the tokenizer, unless the model has been saved there, which writes it too.

        The settings are in the folder's ``config.json``, which the model writes.
        """
        place = Path(save_directory) / "tokenizer"
        if not place.is_dir():
            self.tokenizer.save_pretrained(str(place))
        return [str(place)]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        generation_mode: str = "text",
        **more: Any,
    ) -> BatchFeature:
        """Prompts as a batch.

        Args:
            text: a prompt, or several; a caption each where a picture is wanted.
            images: for one prompt its pictures; for several a list of pictures for each. They come before the words.
            generation_mode: ``text``, or ``image`` to draw: then the words are put as the model learnt them.
            **more: what transformers passes to any processor; padding is on the left in any case.

        Returns:
            ``input_ids``, ``attention_mask`` ``(B, S)``; with pictures ``pixel_values``, all of them in their order, as
            uint8 ``(pictures, 3, H, W)``.

        Raises:
            ModeError: for a mode that there is none, or pictures where one is to be drawn.
        """
        prompts = [text or ""] if isinstance(text, str) or text is None else list(text)
        shown = _for_each(images, len(prompts))
        if generation_mode == "image":
            if any(shown):
                raise ModeError("generation_mode='image' draws from words alone: leave images out")
            none: list[tuple[Image, ...]] = [() for _ in prompts]
            captions: list[tuple[Turn, ...]] = [generation_turns(prompt.strip()) for prompt in prompts]
            return self._batch(captions, none, "image")
        turns: list[tuple[Turn, ...]] = [
            (Turn("user", (*range(len(pictures)), prompt.strip())),)
            for prompt, pictures in zip(prompts, shown, strict=True)
        ]
        return self._batch(turns, [tuple(map(as_image, pictures)) for pictures in shown], generation_mode)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = True,
        return_dict: bool = True,
        generation_mode: str = "text",
        **more: Any,
    ) -> Any:
        """Messages, or a list of conversations, as a batch that ends with an open turn of the assistant.

        A message's content is a string, or a list of ``{"type": "text", "text"}`` and ``{"type": "image", "image" |
        "url" | "path"}``. To draw, end with the model's own wording: ``"Draw: a cat"``.

        Raises:
            ModeError: for ``tokenize=False`` (places of pictures are no words), or another template.
            HarnessError: for what messages may not hold.
        """
        if not tokenize or chat_template is not None:
            raise ModeError("a Pisces chat is rendered to tokens by its own template: leave tokenize and chat_template")
        one = not conversation or isinstance(conversation[0], Mapping)
        read = [read_messages(messages) for messages in ([conversation] if one else conversation)]
        batch = self._batch([chat.turns for chat in read], [chat.images for chat in read], generation_mode)
        return batch if return_dict else batch["input_ids"]

    def _batch(
        self, turns: list[tuple[Turn, ...]], images: list[tuple[Image, ...]], generation_mode: str
    ) -> BatchFeature:
        if generation_mode not in MODES:
            raise ModeError(f"generation_mode={generation_mode!r}: this model knows {' and '.join(MODES)}")
        rendered = [self.renderer.render(chat, answer_next=True) for chat in turns]
        batch = collate(rendered, images, self.renderer, *self.sizes, left=True, multiple=1)
        found = {"input_ids": batch.ids_BS, "attention_mask": (batch.ids_BS != self.renderer.pad).long()}
        if len(batch.understanding_pixels_BCHW):
            found["pixel_values"] = batch.understanding_pixels_BCHW
        return BatchFeature(found)

    def post_process_multimodal_output(
        self,
        generated_outputs: Tensor,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **more: Any,
    ) -> list[Any]:
        """What `PiscesForConditionalGeneration.generate` returned, as strings or as pictures."""
        if generation_mode == "image":
            return pictures(generated_outputs)
        return [
            self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in generated_outputs.tolist()
        ]

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` may return."""
        return ["input_ids", "attention_mask", "pixel_values"]


def _for_each(images: Any, prompts: int) -> list[list[Any]]:
    """A list of pictures for each prompt."""
    if images is None:
        return [[] for _ in range(prompts)]
    given = images if isinstance(images, list | tuple) else [images]
    if prompts == 1 and not (given and isinstance(given[0], list | tuple)):
        return [list(given)]
    if len(given) != prompts:
        raise ModeError(f"{len(given)} pictures or lists of pictures for {prompts} prompts: give one list to each")
    return [list(one) if isinstance(one, list | tuple) else [one] for one in given]


class PiscesForConditionalGeneration(PreTrainedModel):
    """A `Pisces` behind transformers' interface; ``.pisces`` is the model itself.

    Args:
        config: of the folder.
        pisces: the model; None builds one with random weights.
        tokenizer: of the folder; generation and saving need it.
    """

    config_class = PiscesConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("text", "image")

    def __init__(self, config: PiscesConfig, pisces: Pisces | None = None, tokenizer: Any = None) -> None:
        super().__init__(config)
        settings = config.settings
        if pisces is None:
            pisces = Pisces(settings, **{name: build_part(name, settings) for name in PARTS})
        self.pisces = pisces
        self.tokenizer = tokenizer

    @classmethod
    def can_generate(cls) -> bool:
        """Yes, by a `generate` of its own: transformers' loop has no place for vectors."""
        return True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **more: Any) -> Any:
        """Load a model folder; ``dtype`` (or ``torch_dtype``) and hub arguments as transformers has them."""
        folder = local_folder(pretrained_model_name_or_path, more)
        config = more.get("config") or PiscesConfig.from_pretrained(folder)
        dtype = more.get("dtype", more.get("torch_dtype")) or torch.float32
        dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        tokenizer = load_tokenizer(folder / "tokenizer", config.settings.template)
        model = cls(config, Pisces.from_pretrained(folder, dtype), tokenizer).eval()
        return model.to(more["device_map"]) if isinstance(more.get("device_map"), str | torch.device) else model

    def save_pretrained(self, save_directory: str | Path, **more: Any) -> None:
        """Write the model folder of parts."""
        self.pisces.save_pretrained(save_directory, self.tokenizer)
        if more.get("push_to_hub"):
            self.push_to_hub(str(more.get("repo_id") or Path(save_directory).name))

    @property
    def generator(self) -> Generator:
        """What writes and draws."""
        if self.tokenizer is None:
            raise ModeError("this model was built without a tokenizer: load it with from_pretrained")
        return Generator(self.pisces, self.tokenizer, str(self.device))

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **more: Any) -> Any:
        """Logits of every place, ``.logits`` ``(B, S, V)``; training goes through `Pisces` (`pisces train`)."""
        from transformers.modeling_outputs import CausalLMOutput

        generator = self.generator
        inputs_BSD, _ = self.pisces.embed(self._batch(generator, input_ids, pixel_values))
        mask_BS = (input_ids != generator.renderer.pad).long()
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp_min(0)
        hidden_BSD = self.pisces.hidden(inputs_BSD, attention_mask=mask_BS, position_ids=positions_BS)
        return CausalLMOutput(logits=self.pisces.llm.get_output_embeddings()(hidden_BSD))

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        generation_mode: str = "text",
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        num_return_sequences: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        vector_guidance: float | None = None,
        seed: int = 0,
        **more: Any,
    ) -> Tensor:
        """Write, or draw.

        Args:
            input_ids: of `PiscesProcessor`, ``(B, S)``, padded on the left.
            attention_mask: not used: padding has a token of its own.
            pixel_values: of `PiscesProcessor`.
            max_new_tokens: the longest answer; 64 if it is not said.
            do_sample: sample the answer; else the likeliest token is taken. Of a picture: see `Generator.image`.
            temperature: of sampling; of a head that samples, too.
            num_return_sequences: pictures, or sampled answers, of each prompt.
            num_inference_steps: of the decoder; None takes the model's own.
            guidance_scale: likewise, of null-caption guidance.
            vector_guidance: likewise, of guidance on the LLM's hidden states (`Generator.vectors_after`).
            seed: of all that is random: sequence j of a prompt depends on (seed, j) and on nothing else.
            **more: what transformers passes to any model.

        Returns:
            ``text``: prompts and answers without their ends of turn, ``(B * n, S + new)``, padded on the right.
            ``image``: pixels in [0, 1], ``(B * n, 3, H, W)``.

        Raises:
            ModeError: for another mode, or several sequences of one that has no chance in it.
        """
        if generation_mode not in MODES:
            raise ModeError(f"generation_mode={generation_mode!r}: this model knows {' and '.join(MODES)}")
        configured = more.get("generation_config")
        if max_new_tokens is None:
            max_new_tokens = getattr(configured, "max_new_tokens", None) or 64
        generator = self.generator
        n = num_return_sequences
        if generation_mode == "image":
            begin = torch.full_like(input_ids[:, :1], generator.renderer.begin_image)
            batch = self._batch(generator, torch.cat([input_ids, begin], 1), pixel_values)
            return generator.pixels(batch, n, num_inference_steps, guidance_scale, seed, temperature, vector_guidance)
        if n > 1 and not do_sample:
            raise ModeError(f"num_return_sequences={n} without do_sample=True: all answers would be the same")
        batch = self._batch(generator, input_ids, pixel_values)
        asked = (max_new_tokens, temperature if do_sample else 0.0)
        rows = [generator.rows(generator.tokens(batch, *asked, seed + j), len(input_ids)) for j in range(n)]
        answers = [rows[j][i] for i in range(len(input_ids)) for j in range(n)]
        written = [torch.tensor(row, dtype=input_ids.dtype, device=input_ids.device) for row in answers]
        padded = pad_sequence(written, batch_first=True, padding_value=generator.renderer.pad)
        return torch.cat([input_ids.repeat_interleave(n, 0), padded], 1)

    def _batch(self, generator: Generator, input_ids: Tensor, pixel_values: Tensor | None) -> SequenceBatch:
        """Tokens and pictures as our batch: every placeholder in a prompt is a place of a picture that is seen."""
        places_K = (input_ids == generator.renderer.placeholder).flatten().nonzero()[:, 0]
        size = generator.sizes[0]
        pixels = torch.zeros(0, 3, size, size, dtype=torch.uint8) if pixel_values is None else pixel_values
        if len(places_K) != len(pixels) * generator.renderer.N:
            raise ModeError(
                f"{len(places_K)} places of vectors for {len(pixels)} pictures of {generator.renderer.N} each: pass "
                "all that the processor returned"
            )
        none = places_K.new_zeros(0)
        return SequenceBatch(
            ids_BS=input_ids,
            understanding_at_K=places_K,
            generation_at_K=none,
            text_at_K=none,
            labels_K=none,
            understanding_pixels_BCHW=pixels.to(input_ids.device),
            generation_pixels_BCHW=torch.zeros(0, 3, generator.sizes[1], generator.sizes[1], dtype=torch.uint8),
        )


AutoConfig.register("pisces", PiscesConfig)
AutoModelForMultimodalLM.register(PiscesConfig, PiscesForConditionalGeneration)
AutoProcessor.register(PiscesConfig, PiscesProcessor)
