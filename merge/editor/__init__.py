"""The few-step edit runner."""

from merge.editor.pipeline import (
    Editor,
    EditResult,
    edit,
    load_editor,
    load_image,
    resize_image,
)
from merge.editor.png import save_png
from merge.editor.settings import EditSettings

__all__ = [
    "EditResult",
    "EditSettings",
    "Editor",
    "edit",
    "load_editor",
    "load_image",
    "resize_image",
    "save_png",
]
