"""The few-step edit runner: its own loop over diffusers' components.

editor = load_editor("outputs/mine")
result = edit(editor, "photo.jpg", "make it winter", EditSettings(seed=3))
save_png(result.to_pil(), "winter.png", result.settings, "make it winter")
"""
