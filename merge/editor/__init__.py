"""The few-step edit runner: its own loop over diffusers' components.

editor = load_editor("outputs/mine")
result = edit(editor, "photo.jpg", "make it winter", EditSettings(seed=3))
save_png(result.to_pil(), "winter.png", result.settings, "make it winter")
"""

from merge.editor.batches import edit, edit_many
from merge.editor.load import Editor, load_editor
from merge.editor.pictures import fit_size, load_image, resize_image
from merge.editor.png import save_png
from merge.editor.result import EditRequest, EditResult, StageTimes
from merge.editor.settings import EditSettings

__all__ = [
    "EditRequest",
    "EditResult",
    "EditSettings",
    "Editor",
    "StageTimes",
    "edit",
    "edit_many",
    "fit_size",
    "load_editor",
    "load_image",
    "resize_image",
    "save_png",
]
