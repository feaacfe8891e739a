"""Which features of an embedding may count as evidence of a defect: a YAML that people read, name and mark.

A sparse autoencoder writes the embedding x of a cell as b + sum_i z_i d_i + rest. With the features S that are marked
`style` (and, with `unmarked: drop`, all that are not marked `artifact`), a detector's heat map becomes

    heat'(x) = min(heat(x), heat(x - sum_{i in S} z_i d_i)).

So what only such a feature says of an image is no evidence against it; and by the minimum a list can only exonerate:
to take away a feature that speaks for the image never makes it worse.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlhf_img.config import from_mapping, load_yaml
from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.artifact_model import DefectNet
from rlhf_img.rewards.sae import SparseAutoencoder

SAE_FILE, CARD_FILE, LIST_FILE, SHEET_FILE = "sae.safetensors", "sae.json", "features.yaml", "features.html"
"""What `rlhf-img reward train sae` writes into its folder."""

Mark = Literal["artifact", "style"]

_HEAD = """\
# Features of a sparse autoencoder; see features.html for the images on which each is most active.
# name: what you call it. mark: artifact or style; the artifact reward reads it (options: {features: THIS FILE}).
# unmarked: keep, or drop: then only features marked artifact are evidence.
# proposed, defect_auc, style, style_auc: measured; 0.5 is chance. defect_auc: how often a damaged image has more of the
# feature than a clean one; style_auc: an image in that style than without.
"""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One line of the list. id: its place in the autoencoder. The rest: see the head of the file."""

    id: int
    name: str | None = None
    mark: Mark | None = None
    proposed: Mark | None = None
    defect_auc: float | None = None
    style: str | None = None
    style_auc: float | None = None

    @property
    def title(self) -> str:
        """Its name, or its number."""
        return self.name or f"feature {self.id}"


@dataclass(frozen=True, kw_only=True)
class FeatureList:
    """The file. sae: the autoencoder's digest."""

    sae: str
    unmarked: Literal["keep", "drop"] = "keep"
    features: tuple[Feature, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class AllowList:
    """A list with its autoencoder, for one network's embeddings."""

    listed: FeatureList
    sae: SparseAutoencoder

    @property
    def removed(self) -> list[int]:
        """Features that are no evidence."""
        marks = {feature.id: feature.mark for feature in self.listed.features}
        drop = self.listed.unmarked == "drop"
        return [i for i in range(len(self.sae.bias_F))
                if marks.get(i) == "style" or (drop and marks.get(i) != "artifact")]

    @torch.no_grad()
    def __call__(
        self, net: DefectNet, images_B3HW: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"], list[tuple[str, ...]]]:
        """Heat maps without the list and with it; and of each image the removed features that are most active in the
        cell that the list cooled most, at most three."""
        x = net.embed(images_B3HW)
        z = self.sae.encode(x.permute(0, 2, 3, 1).flatten(0, 2).float())
        gone = torch.zeros_like(z)
        gone[:, self.removed] = z[:, self.removed]
        part = self.sae.part(gone).unflatten(0, (len(x), *x.shape[2:])).permute(0, 3, 1, 2)
        before = net.head(x)
        after = torch.minimum(before, net.head(x - part))
        cooled = (before - after).amax(dim=1).flatten(1)
        drop, cell = cooled.max(dim=1)
        rows = gone.unflatten(0, (len(x), -1))[torch.arange(len(x)), cell]
        titles = {feature.id: feature.title for feature in self.listed.features}
        named = [tuple(titles.get(i, f"feature {i}") for i in row.argsort(descending=True)[:3].tolist() if row[i] > 0)
                 if cooler > 0 else () for row, cooler in zip(rows, drop, strict=True)]
        return before, after, named


def embedding_of(net: DefectNet) -> str:
    """What a net's embeddings are made by: a backbone's name, or the digest of the small network's features."""
    if net.backbone is not None:
        return net.backbone.name
    digest = hashlib.sha256()
    for name, value in sorted(net.features.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_of(file: Path) -> str:
    """Of an autoencoder's file: the first 16 digits of its SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def open_sae(folder: Path, net: DefectNet) -> SparseAutoencoder:
    """The autoencoder in a folder. Raises RlhfImgError if there is none, or it is damaged or of other embeddings."""
    card_file, weights = folder / CARD_FILE, folder / SAE_FILE
    for file in (card_file, weights):
        if not file.is_file():
            raise RlhfImgError(f"no file {file}; make it with: rlhf-img reward train sae --out {folder}")
    try:
        card = json.loads(card_file.read_text())
        embedding = card["embedding"]
        sae = SparseAutoencoder(card["width"], card["config"]["features"], card["config"]["k"])
        sae.load_state_dict(load_file(weights))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise RlhfImgError(
            f"the autoencoder in {folder} cannot be read ({error}); make it again with: rlhf-img reward train sae "
            f"--out {folder}"
        ) from error
    if embedding != embedding_of(net):
        raise RlhfImgError(
            f"the features in {folder} are of other embeddings ({embedding[:40]}) than the artifact reward's "
            f"({embedding_of(net)[:40]}). Train them on its weights, rlhf-img reward train sae --weights FILE, or on "
            f"its backbone, --backbone MODEL"
        )
    return sae.eval().requires_grad_(False)


def read_list(file: Path) -> FeatureList:
    """A feature list. Raises RlhfImgError for what cannot be read, unknown keys and marks, and ids given twice."""
    listed = from_mapping(FeatureList, load_yaml(file), str(file))
    ids = [feature.id for feature in listed.features]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise RlhfImgError(f"{file}: feature {twice[0]} is there twice; leave out one of the lines")
    return listed


def open_list(file: Path, net: DefectNet) -> AllowList:
    """A feature list with its autoencoder, which lies beside it. Raises what `read_list` and `open_sae` raise, and
    RlhfImgError if the list is of another autoencoder."""
    listed, sae = read_list(file), open_sae(file.parent, net)
    if listed.sae != (own := digest_of(file.parent / SAE_FILE)):
        raise RlhfImgError(f"{file} is a list of another autoencoder ({listed.sae}) than the one beside it ({own}); "
                           f"make both again with: rlhf-img reward train sae --out {file.parent}")
    if strange := [f.id for f in listed.features if not 0 <= f.id < len(sae.bias_F)]:
        raise RlhfImgError(f"{file}: there is no feature {strange[0]}; ids are 0 to {len(sae.bias_F) - 1}")
    return AllowList(listed=listed, sae=sae)


def write_list(file: Path, listed: FeatureList) -> None:
    """Writes a list, a line a feature, so that people can edit it."""
    lines = [_HEAD, yaml.safe_dump({"sae": listed.sae, "unmarked": listed.unmarked}), "features:\n"]
    lines += [f"  - {_line(feature)}\n" for feature in listed.features]
    file.with_suffix(".part").write_text("".join(lines) if listed.features else "".join(lines[:2]) + "features: []\n")
    os.replace(file.with_suffix(".part"), file)


def _line(feature: Feature) -> str:
    given = {"id": feature.id, "name": feature.name, "mark": feature.mark}
    measured = {key: value for key, value in asdict(feature).items() if key not in given and value is not None}
    return yaml.safe_dump(given | measured, default_flow_style=True, sort_keys=False, width=10**6).strip()


def kept_by_hand(old: FeatureList, features: Sequence[Feature]) -> tuple[Feature, ...]:
    """Features as measured anew, with the names and marks that an older list of the same autoencoder gives them."""
    known = {feature.id: feature for feature in old.features}
    return tuple(Feature(**{**asdict(f), "name": known[f.id].name or f.name, "mark": known[f.id].mark})
                 if f.id in known else f for f in features)
