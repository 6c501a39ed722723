"""The lines that load an export: in diffusers as a folder and as one file, and in ComfyUI."""

from __future__ import annotations

import json
from dataclasses import dataclass

from merge.card.facts import CardFacts

PLACEHOLDER = "path/to/this/folder"
# What the LCM scheduler of diffusers has when its config does not say.
_ORIGINAL_STEPS = 50
_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class EditNumbers:
    """The settings that the recipe was verified with; see `VerifySpec`."""

    steps: int
    guidance_scale: float
    image_guidance_scale: float
    resolution: int
    original_inference_steps: int
    timesteps: tuple[int, ...]


def edit_numbers(facts: CardFacts) -> EditNumbers:
    """Return the settings of the recipe's edits."""
    verify = facts.recipe.table("verify")
    timesteps = verify.counts("timesteps")
    return EditNumbers(
        steps=len(timesteps) or verify.count("steps", 4),
        guidance_scale=verify.number("guidance_scale", 2.0),
        image_guidance_scale=verify.number("image_guidance_scale", 1.0),
        resolution=verify.count("resolution", facts.family.resolution),
        original_inference_steps=verify.count("original_inference_steps", _ORIGINAL_STEPS),
        timesteps=timesteps,
    )


def use_section(facts: CardFacts, repo_id: str | None) -> str:
    """Return the section `Use`.

    Args:
        facts: Of the export.
        repo_id: Where it is published; without one the lines have a placeholder.
    """
    if not facts.is_pipeline:
        return _alone(facts, repo_id)
    parts = ["## Use"]
    if facts.has_folder_weights:
        parts += [_folder(facts, repo_id), _warnings(facts), _command(facts, repo_id)]
    if facts.single_file:
        parts.append(_single_file(facts, repo_id))
    return "\n\n".join(parts)


def _folder(facts: CardFacts, repo_id: str | None) -> str:
    name = facts.family.pipeline_class
    numbers = edit_numbers(facts)
    side = numbers.resolution
    size = f"\n    height={side},\n    width={side}," if facts.family.has_fixed_size else ""
    schedule = ""
    if facts.scheduler == "LCMScheduler" and numbers.original_inference_steps != _ORIGINAL_STEPS:
        schedule = (
            "\npipeline.scheduler.register_to_config("
            f"original_inference_steps={numbers.original_inference_steps})"
        )
    if numbers.timesteps:
        # Stock pipelines hand the number of steps on, and take no timesteps themselves.
        schedule += (
            f"\ntimesteps, place = {list(numbers.timesteps)}, pipeline.scheduler.set_timesteps"
            "\npipeline.scheduler.set_timesteps = lambda steps, device=None: "
            "place(timesteps=timesteps, device=device)"
        )
    return f"""The folder is a whole pipeline, and its scheduler comes with it:

```python
import torch
from diffusers import {name}
from PIL import Image

pipeline = {name}.from_pretrained(
    {_literal(repo_id or PLACEHOLDER)}, torch_dtype={_dtype(facts)}
).to("cuda"){schedule}
image = pipeline(
    "make it winter",
    image=Image.open("photo.jpg").convert("RGB").resize(({side}, {side})),{size}
    num_inference_steps={numbers.steps},
    guidance_scale={numbers.guidance_scale:g},
    image_guidance_scale={numbers.image_guidance_scale:g},
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]
image.save("edited.png")
```"""


def _warnings(facts: CardFacts) -> str:
    text = "Always give the steps: the stock default of 100 "
    if facts.scheduler == "LCMScheduler":
        text += "exceeds an LCM's 50 original steps."
    else:
        text += "is not what this model is for."
    if edit_numbers(facts).timesteps:
        text += (
            " The recipe names its timesteps, which no stock pipeline takes: the two lines set "
            "them on the scheduler, and without these it picks its own."
        )
    return text


def _command(facts: CardFacts, repo_id: str | None) -> str:
    numbers = edit_numbers(facts)
    steps = f"--steps {numbers.steps}"
    if numbers.timesteps:
        steps = f"--timesteps {','.join(map(str, numbers.timesteps))}"
    return f"""Or with the tool that made it, which needs fewer UNet rows for the same picture:

```sh
{_download(repo_id)}instruct-merge edit FOLDER photo.jpg "make it winter" {steps} \\
    --guidance-scale {numbers.guidance_scale:g} \
--image-guidance-scale {numbers.image_guidance_scale:g} --resolution {numbers.resolution}
```"""


def _download(repo_id: str | None) -> str:
    return f"hf download {repo_id} --local-dir FOLDER\n" if repo_id else ""


def _single_file(facts: CardFacts, repo_id: str | None) -> str:
    name = facts.family.pipeline_class
    file = facts.single_file
    where = f"{PLACEHOLDER}/{file}"
    if repo_id:
        where = f"https://huggingface.co/{repo_id}/blob/main/{file}"
    text = f"""The single file `{file}` has no tokenizers and no scheduler, and diffusers takes
an 8-channel SDXL file for a plain one; so name {"this repository" if repo_id else "this folder"} \
for its configs:

```python
import torch
from diffusers import {name}

pipeline = {name}.from_single_file(
    {_literal(where)},
    config={_literal(repo_id or PLACEHOLDER)},
    torch_dtype={_dtype(facts)},
)
```

In ComfyUI load it as a checkpoint and condition with InstructPixToPixConditioning."""
    if facts.scheduler == "LCMScheduler":
        text += (
            " Add ModelSamplingDiscrete with sampling `lcm` and sample with `lcm`: a file cannot "
            "carry that choice."
        )
    single = facts.family.single_file
    return f"{text} {single.caveat}" if single is not None and single.caveat else text


def _alone(facts: CardFacts, repo_id: str | None) -> str:
    main = facts.family.main
    text = f"## Use\n\nThis is a {main.title} alone, without the pipeline around it"
    if not facts.has_main_config:
        return f"{text} and without a config: it takes the target's."
    return f"""{text}. Load it with

```python
import torch
from diffusers import {main.class_name}

{main.name} = {main.class_name}.from_pretrained(
    {_literal(repo_id or PLACEHOLDER)}, subfolder="{main.name}", torch_dtype={_dtype(facts)}
)
```

and give it as `{main.name}` to a `{facts.family.pipeline_class}` with `{_scheduler(facts)}`."""


def _scheduler(facts: CardFacts) -> str:
    return facts.scheduler if facts.scheduler.isidentifier() else "LCMScheduler"


def _dtype(facts: CardFacts) -> str:
    dtype = facts.recipe.text("out_dtype", "float16")
    return f"torch.{dtype if dtype in _DTYPES else 'float16'}"


def _literal(text: str) -> str:
    """Return text as a Python literal in double quotes, ASCII only."""
    return json.dumps(text)
