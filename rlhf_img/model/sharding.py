"""A transformer whose blocks are shared out: each process keeps a part of every weight (FSDP2, arXiv 2304.11277).

A block's weights come together while the block is used and are let go after it. That is a collective operation, so
that every process has to run the blocks equally often: `forward.in_batches` and `even` see to it.

Sharded are the blocks, 95 % of Krea 2. On every process stay whole

- adapters: they are small, float32 over a bfloat16 base, and their gradients are averaged as without sharding, so that
  roles, checkpoints and exports do not know of it;
- the text fusion, since processes fuse different prompts, and the layers around the blocks.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import MethodType
from typing import TypeVar

import torch
import torch.distributed as dist
from diffusers import Krea2Transformer2DModel
from diffusers.models.transformers.transformer_krea2 import Krea2RMSNorm
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rlhf_img.model.forward import SHARDED, sharded_velocity
from rlhf_img.model.lora import role_parameters, roles
from rlhf_img.model.policy import Policy

T = TypeVar("T")


def shard_transformer(transformer: Krea2Transformer2DModel, mesh: DeviceMesh) -> None:
    """Shares the blocks out over a mesh of one dimension, in place; all else moves to the mesh's device.

    Parameters of the blocks are then DTensors, and new objects. No adapter can be added afterwards.
    """
    adapters: set[nn.Parameter] = set()
    for name in roles(transformer):
        adapters |= set(role_parameters(transformer, name).values())
    blocks = transformer.transformer_blocks
    around = set(transformer.parameters()) - set(blocks.parameters())
    summed = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in blocks:
        if any(p.requires_grad for p in set(block.parameters()) - adapters):
            # What is trained together must have one dtype, and the norms are float32 in a bfloat16 model.
            for module in block.modules():
                if isinstance(module, Krea2RMSNorm):
                    fully_shard(module, mesh=mesh, mp_policy=summed)
        fully_shard(block, mesh=mesh, mp_policy=summed, ignored_params=adapters)
    fully_shard(transformer, mesh=mesh, ignored_params=adapters | around)
    # The blocks are called by our forward, not the stock one, and FSDP has to know when one begins and ends.
    setattr(transformer, SHARDED, MethodType(sharded_velocity, transformer))
    register_fsdp_forward_method(transformer, SHARDED)
    transformer.to(mesh.device_type)


def shard_policies(policies: Sequence[Policy], mesh: DeviceMesh) -> list[Policy]:
    """The policies with all of their transformers sharded, before anything was trained or an optimiser made."""
    every = [t for policy in policies for t in (policy.transformer, policy.frozen) if t is not None]
    for transformer in dict.fromkeys(every):
        shard_transformer(transformer, mesh)
    return [_renewed(policy) for policy in policies]


def _renewed(policy: Policy) -> Policy:
    blocks = policy.transformer.transformer_blocks
    parameters = policy.parameters if policy.frozen is None else dict(blocks.named_parameters())
    return replace(policy, parameters=parameters, average={name: p.detach().clone() for name, p in parameters.items()})


def is_sharded(transformer: Krea2Transformer2DModel) -> bool:
    """Whether its blocks are shared out."""
    return isinstance(transformer, FSDPModule)


def even(transformer: Krea2Transformer2DModel, work: Sequence[T]) -> list[T]:
    """The pieces of work, and if the transformer is sharded the first again until every process has as many.

    For work without gradients, whose results can be thrown away: who has less keeps the others company.
    """
    if not is_sharded(transformer):
        return list(work)
    most = torch.tensor(len(work))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return [*work, *[work[0]] * (int(most) - len(work))]


def whole(value: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which must all call this; any other tensor as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value
