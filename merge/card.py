"""The model card: README.md of an export, with the lines that load it."""

from __future__ import annotations

from merge.export import PIPELINE_CLASSES
from merge.methods import METHODS
from merge.plan import MergePlan
from merge.recipe import Recipe
from merge.sources import ResolvedModel, Sources

CARD_NAME = "README.md"


def render_card(recipe: Recipe, plan: MergePlan, sources: Sources, digest: str) -> str:
    """Return the card as Markdown.

    Args:
        recipe: What was merged.
        plan: What that meant.
        sources: The parents.
        digest: The recipe's, 64 hexadecimal digits.
    """
    sections = [
        f"# {recipe.name}",
        (
            "An InstructPix2Pix model that edits in few steps, merged from the models below "
            f"without training: `{METHODS[plan.method].formula}` at weight {recipe.weight:g}."
        ),
        _parents(sources),
    ]
    if sources.target.pipeline is not None:
        sections.append(_loading(recipe, plan))
    else:
        sections.append("This is a UNet alone: load it with `UNet2DConditionModel` of diffusers.")
    sections.append(
        f"`merge_manifest.json` has the SHA-256 of every file, `recipe.lock.yaml` what made them. "
        f"Recipe digest: `{digest}`."
    )
    return "\n\n".join(sections) + "\n"


def _parents(sources: Sources) -> str:
    lines = ["| role | model |", "|---|---|"]
    lines += [f"| {model.role} | {_origin(model)} |" for model in sources.models]
    return "\n".join(lines)


def _origin(model: ResolvedModel) -> str:
    if model.repo is None:
        return f"`{model.label}`"
    return f"[{model.repo}](https://huggingface.co/{model.repo}) at `{model.commit}`"


def _loading(recipe: Recipe, plan: MergePlan) -> str:
    name = PIPELINE_CLASSES[plan.architecture]
    verify = recipe.verify
    side = f"{verify.resolution}, {verify.resolution}"
    size = ""
    if plan.architecture == "sdxl":
        size = f"\n    height={verify.resolution},\n    width={verify.resolution},"
    text = f"""## Use

```python
import torch
from diffusers import {name}
from PIL import Image

pipeline = {name}.from_pretrained(
    "path/to/this/folder", torch_dtype=torch.float16
).to("cuda")
image = pipeline(
    "make it winter",
    image=Image.open("photo.jpg").convert("RGB").resize(({side})),{size}
    num_inference_steps={verify.steps},
    guidance_scale={verify.guidance_scale:g},
    image_guidance_scale={verify.image_guidance_scale:g},
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]
```

Always give the steps: the stock default of 100 exceeds an LCM's 50 original steps."""
    if not recipe.output.single_file:
        return text
    return f"""{text}

The single file `{recipe.name}.safetensors` has no tokenizers and no scheduler, and diffusers takes
an 8-channel SDXL file for a plain one; so name this folder for its configs:

```python
pipeline = {name}.from_single_file(
    "path/to/this/folder/{recipe.name}.safetensors",
    config="path/to/this/folder",
    torch_dtype=torch.float16,
)
```

In ComfyUI load it as a checkpoint and add ModelSamplingDiscrete with sampling `lcm`: a file cannot
carry that choice."""
