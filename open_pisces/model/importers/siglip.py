"""Published SigLIP and SigLIP 2 towers as the understanding encoder."""

from __future__ import annotations

import torch
from transformers import AutoConfig, SiglipVisionModel

from open_pisces.model.importers.files import ImportSourceError
from open_pisces.model.importers.language import refuse_incomplete

HEAD = "head."
"""SigLIP's pooling head, which a tower that keeps all patches may do without."""


def load_siglip(source: str, head: bool) -> SiglipVisionModel:
    """The vision tower of a published SigLIP, or of a SigLIP 2 of one resolution, in float32.

    Args:
        source: a folder or hub name; with a text tower beside it or alone.
        head: keep the pooling head.

    Raises:
        ImportSourceError: if it cannot be fetched, is of another kind (a SigLIP 2 of many resolutions, "naflex", takes
            pictures in another form), or a tensor is missing, left over or of another shape.
    """
    where = f"model.understanding.source = {source}"
    try:
        kind = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        raise ImportSourceError(
            f"{where}: {str(error).splitlines()[0]}: download the model, and name the folder where it lies"
        ) from None
    if kind not in ("siglip", "siglip_vision_model"):
        hint = "take one of a fixed resolution" if kind.startswith("siglip2") else "take a SigLIP or SigLIP 2"
        raise ImportSourceError(f"{where}: its config.json says {kind}, not siglip: {hint}")
    try:
        tower, info = SiglipVisionModel.from_pretrained(
            source, vision_use_head=head, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ImportSourceError(f"{where}: {str(error).splitlines()[0]}") from None
    refuse_incomplete(where, info, ("text_model.", "logit_", "vision_model.head.", HEAD))
    return tower
