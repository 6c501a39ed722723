"""The few-step edit runner."""

from merge.editor.pipeline import (
    Editor,
    EditResult,
    EditSettings,
    edit,
    load_editor,
    load_image,
    resize_image,
)

__all__ = [
    "EditResult",
    "EditSettings",
    "Editor",
    "edit",
    "load_editor",
    "load_image",
    "resize_image",
]
