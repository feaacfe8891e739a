"""Writes the playground's prompts as files, because a model in a folder brings none: python prompts.py FOLDER."""

import sys
from pathlib import Path

from rlhf_img.playground.data import prompts

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for split, count in (("train", 4096), ("heldout", 2048)):
    (folder / f"{split}.txt").write_text("\n".join(prompts(split, count)) + "\n")
