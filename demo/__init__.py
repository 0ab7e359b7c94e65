"""The embedded demo model: where its checkpoint is, and everything it was made with."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint" / "hf"
"""The native (``-hf``) format; what the server serves when no model is named."""

CHECKPOINT_CHAT = Path(__file__).parent / "checkpoint" / "chat"
"""The same weights in the original ``internvl_chat`` format."""
