"""A top-k sparse autoencoder: an embedding as a sum of a few features out of many.

    z = TopK(ReLU(W_enc (x - b) / s + c)),    x^ = b + s W_dec z,    rows of W_dec of length 1

Loss: the share of the variance that x^ does not explain, and 1/32 of the same for what the features that have been
silent for long (dead) make of the rest x - x^, which is how they come back to life. Source: Gao et al. 2024,
arXiv:2406.04093; the scalar s (so that one learning rate fits all embeddings) stands for their normalised inputs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlhf_img.rewards.artifact_model import DefectNet


class SparseAutoencoder(nn.Module):
    """Axes: N embeddings of C channels, F features, of which at most `k` are active in each."""

    def __init__(self, width: int, features: int, k: int) -> None:
        super().__init__()
        self.k = k
        directions = F.normalize(torch.randn(features, width), dim=1)
        self.decoder_FC = nn.Parameter(directions)
        # The encoder begins as the decoder's transpose: features then find themselves, and few are born dead.
        self.encoder_FC = nn.Parameter(directions.clone())
        self.bias_F = nn.Parameter(torch.zeros(features))
        self.center_C = nn.Parameter(torch.zeros(width))
        self.scale = nn.Buffer(torch.ones(()))

    @torch.no_grad()
    def fit_scale(self, x_NC: Float[Tensor, "N C"]) -> None:
        """Sets centre and scale to those of some embeddings, before training."""
        self.center_C.copy_(x_NC.mean(dim=0))
        self.scale.copy_((x_NC - x_NC.mean(dim=0)).square().mean().sqrt().clamp_min(1e-6))

    def before_top_k(self, x_NC: Float[Tensor, "N C"]) -> Float[Tensor, "N F"]:
        """Activations of all features, >= 0."""
        return F.relu((x_NC - self.center_C) / self.scale @ self.encoder_FC.T + self.bias_F)

    def encode(self, x_NC: Float[Tensor, "N C"]) -> Float[Tensor, "N F"]:
        """Activations >= 0, at most k of each embedding above 0."""
        return keep_top(self.before_top_k(x_NC), self.k)

    def part(self, z_NF: Float[Tensor, "N F"]) -> Float[Tensor, "N C"]:
        """What some activations add to an embedding, in the embedding's own units."""
        return self.scale * (z_NF @ self.decoder_FC)

    def decode(self, z_NF: Float[Tensor, "N F"]) -> Float[Tensor, "N C"]:
        """The embeddings that activations stand for."""
        return self.center_C + self.part(z_NF)

    @torch.no_grad()
    def normalize(self) -> None:
        """Brings every feature's direction to length 1; an activation is then a length."""
        self.decoder_FC.copy_(F.normalize(self.decoder_FC, dim=1))


def keep_top(z_NF: Float[Tensor, "N F"], k: int) -> Float[Tensor, "N F"]:
    """The k largest entries of each row, 0 elsewhere."""
    values, places = z_NF.topk(min(k, z_NF.shape[1]), dim=1)
    return torch.zeros_like(z_NF).scatter(1, places, values)


def unexplained(x_NC: Float[Tensor, "N C"], guess_NC: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
    """sum |x - guess|^2 / sum |x - mean x|^2: 0 is all explained, 1 is no better than the mean."""
    return (x_NC - guess_NC).square().sum() / (x_NC - x_NC.mean(dim=0)).square().sum().clamp_min(1e-12)


def sae_loss(
    sae: SparseAutoencoder, x_NC: Float[Tensor, "N C"], dead_F: Bool[Tensor, " F"], aux_weight: float = 1 / 32
) -> tuple[Float[Tensor, ""], Float[Tensor, "N F"]]:
    """The loss of the module's docstring, and the activations. dead_F: which features count as dead."""
    everything = sae.before_top_k(x_NC)
    z = keep_top(everything, sae.k)
    guess = sae.decode(z)
    loss = unexplained(x_NC, guess)
    if aux_weight and dead_F.any():
        rest = (x_NC - guess).detach()
        revived = keep_top(everything * dead_F, max(1, min(int(dead_F.sum()), x_NC.shape[1] // 2)))
        aux = (rest - sae.part(revived)).square().sum() / rest.square().sum().clamp_min(1e-12)
        loss = loss + aux_weight * aux
    return loss, z


@torch.no_grad()
def cells_of(net: DefectNet, images_B3HW: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, tuple[int, int]]:
    """The embeddings (B h w, C) of all cells of some images, and (h, w)."""
    x = net.embed(images_B3HW).float()
    return x.permute(0, 2, 3, 1).flatten(0, 2), (x.shape[2], x.shape[3])
