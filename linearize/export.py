"""Folders to hand on: a whole student that loads where nobody wrote `import linearize`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from linearize import exported
from linearize._version import __version__
from linearize.checkpoint import save
from linearize.convert import base_model
from linearize.models import HUB_NAME

__all__ = ["export"]

CODE = "linearize_student.py"


def export(model: Any, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Write a whole student and what a program needs that does not know it.

    Beside the checkpoint that `save` writes there are

        linearize_student.py    through which transformers finds the installed linearize, with `trust_remote_code=True`;
                                where there is none, or one too old, the error says what to install
        README.md               how to load it and what it is; one that is there already stays

    Args:
        model: a converted model. LoRA must be merged (`model.merge_and_unload()`).
        folder: made where it is missing; files of the same names are replaced.
        tokenizer: saved beside it where given.

    Raises:
        LinearizeError: as `save`.
    """
    path = Path(folder)
    save(model, path, tokenizer=tokenizer)
    shutil.copyfile(exported.__file__, path / CODE)
    config = path / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values["auto_map"] = {"AutoConfig": f"{Path(CODE).stem}.{exported.ExportedConfig.__name__}"}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = path / "README.md"
    if not card.exists():
        card.write_text(_card(base_model(model)), encoding="utf-8")


def _card(model: Any) -> str:
    conversion = "\n".join(f"| `{name}` | {json.dumps(value)} |" for name, value in model.config.linearize.items())
    name = model.config.name_or_path  # a folder of this machine says nothing on another
    origin = f"{name}, " if "/" in name and HUB_NAME.fullmatch(name) and not os.path.exists(name) else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- linearize
---

# A linearized language model

Made from {origin}a `{type(model).__bases__[-1].__name__}`: most of its attention keeps a memory of fixed size.

It needs the Python package linearize, version {__version__} or later.

```python
import linearize
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

A program that does not import linearize loads it with `trust_remote_code=True`; linearize must be installed even so.

| setting of the conversion | value |
|---|---|
{conversion}
"""
