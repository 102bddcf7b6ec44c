"""Lets `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` read the student in this folder.

The model itself is in the package linearize, which must be installed. A program that imports it first needs neither
this file nor `trust_remote_code`.
"""

from typing import Any

from transformers import PretrainedConfig  # the name that every version of transformers has


class ExportedConfig(PretrainedConfig):
    """Hands config.json over to the installed linearize, which checks that it can read it."""

    model_type = "linearize"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        try:
            from linearize.modeling import SavedStudentConfig
        except ImportError as error:
            version = config_dict.get("linearize", {}).get("version", "")
            raise ImportError(
                f"This model's attention is in the Python package linearize, which cannot be imported here ({error}). "
                f"Install linearize {version} or later."
            ) from error
        return SavedStudentConfig.from_dict(config_dict, **kwargs)
