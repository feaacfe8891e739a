"""From a name to the model that it means: a model, or what a run made of one."""

from pathlib import Path

from rlhf_img.config import load_yaml
from rlhf_img.errors import RlhfImgError
from rlhf_img.model.export import load_lora
from rlhf_img.model.loading import Model, load


def open_policy(name: str, lora: Path | None = None) -> Model:
    """"playground", a diffusers folder, a hub id, or a run's folder: its LoRA on its model. lora: one to apply instead.

    Raises RlhfImgError if it cannot be opened, or the run has no LoRA yet.
    """
    run = Path(name)
    if (run / "config.yaml").is_file() and lora is None:
        if not (run / "lora").is_dir():
            raise RlhfImgError(f"the run {run} has no LoRA yet; finish it with --resume")
        return open_policy(str(load_yaml(run / "config.yaml")["config"]["model"]), run / "lora")
    model = load(name)
    if lora is not None:
        load_lora(model, lora, "lora")
        model.transformer.set_adapter("lora")
    return model
