"""Memory that is predicted from configs, against what real steps are counted to need."""

from importlib import import_module
from typing import Any

import pytest
import torch

from rlhf_img.algorithms import dpo, grpo, sft, tdm
from rlhf_img.algorithms.rollout import noised, rollout
from rlhf_img.config import from_mapping, merge, parse_overrides
from rlhf_img.errors import RlhfImgError
from rlhf_img.model.compute import apply_compute
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.counting import Batch, Count, count_passes, dress, measure
from rlhf_img.model.loading import Model, load
from rlhf_img.model.policy import LoRAConfig, Policy, make_full, make_role
from rlhf_img.model.sizes import sizes_of
from rlhf_img.model.vae import decode
from rlhf_img.playground.build import build_transformer
from rlhf_img.training import dpo as dpo_room
from rlhf_img.training.dpo import EncodedPair
from rlhf_img.training.estimate import changes, check_memory, estimate, what_fits


def config_of(algorithm: str, *settings: str) -> Any:
    given = {"rewards": "none", "tracker": "none", "dtype": "float32", **({"data": "x"} if algorithm == "sft" else {})}
    room = import_module(f"rlhf_img.training.{algorithm}")
    return from_mapping(room.Config, merge(given, parse_overrides(list(settings))), "settings")


def test_count_follows_storages_and_not_views() -> None:
    held = torch.zeros(100)
    with Count([held, held[:10]]) as count:
        assert count.start == 400
        a = held + 1
        b = a[:50].view(5, 10)
        assert count.live == 800
        del a
        assert count.live == 800  # the view keeps it
        del b
        assert count.live == 400 and count.peak == 800
        torch.zeros(8, 16) @ torch.zeros(16, 4)
    assert count.flop == 2 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("lora", "checkpointed", "dtype"),
    [(LoRAConfig(rank=8), 0, torch.bfloat16), (LoRAConfig(rank=8), 3, torch.float32), (None, 6, torch.float32)],
)
def test_a_count_of_two_fake_blocks_is_that_of_six_real_ones(
    lora: LoRAConfig | None, checkpointed: int, dtype: torch.dtype
) -> None:
    batch = Batch(images=3, grid=(4, 4), text=11)
    real = build_transformer()
    dress(real, lora, dtype, checkpointed)
    found = count_passes(dict(real.config), lora, dtype, batch, checkpointed)
    adapted = lora is not None
    assert (found.infer_peak, found.infer_flop) == measure(real, batch, train=False, adapted=adapted)[::2]
    peak, kept, flop = measure(real, batch, train=True, adapted=adapted)
    exact = 0.06 if checkpointed == 3 else 0.0  # a LoRA's first block has no gradient to its input
    assert found.train_flop == flop
    assert found.train_peak == pytest.approx(peak, rel=exact)
    assert found.kept == pytest.approx(kept, rel=exact)


def one_grpo(config: Any, model: Model, roles: list[Policy], optimizers: list[torch.optim.Optimizer]) -> None:
    drawn = rollout(model, roles[0], Conditioner(model), PROMPT * config.grpo.prompts, config.grpo, 0)
    decode(model, drawn.latents(), 64, 64)
    drawn = noised(roles[0], drawn, config.grpo)
    grpo.update(roles[0], optimizers[0], drawn, torch.linspace(-1, 1, len(drawn.latents())), config.grpo)


def one_dpo(config: Any, model: Model, roles: list[Policy], optimizers: list[torch.optim.Optimizer]) -> None:
    pair = EncodedPair(prompt=PROMPT[0], winner_NC=torch.zeros(16, 64), loser_NC=torch.ones(16, 64), grid=(4, 4))
    batches = dpo_room._batches(config, model, Conditioner(model), [pair] * config.dpo.pairs, 0)
    dpo.update(roles[0], optimizers[0], batches, 1.0, config.dpo)


def one_sft(config: Any, model: Model, roles: list[Policy], optimizers: list[torch.optim.Optimizer]) -> None:
    count = config.sft.images * config.sft.draws
    (text,) = Conditioner(model).encode(PROMPT)
    x = torch.zeros(count, 16, 64)
    batch = sft.noised(x, text.repeat(count, 1, 1), torch.full((count,), 0.5), torch.ones_like(x), (4, 4))
    sft.update(roles[0], optimizers[0], [batch], config.sft)


def one_tdm(config: Any, model: Model, roles: list[Policy], optimizers: list[torch.optim.Optimizer]) -> None:
    drawn = tdm.rollout(model, roles[0], Conditioner(model), PROMPT * config.tdm.prompts, config.tdm, 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(config.tdm.critic_updates):
        tdm.train_critic(roles[1], optimizers[1], drawn, config.tdm, generator)
    if not config.tdm.warmup:
        tdm.train_student(roles[0], roles[1], optimizers[0], drawn, config.tdm, generator)
    for _ in range(config.tdm.warmup_updates if config.tdm.warmup else 0):
        tdm.teach_guidance(roles[0], optimizers[0], drawn, config.tdm, generator)


PROMPT = ["a red circle on a grey background"]
SMALL_TDM = ("tdm.prompts=3", "tdm.images=2", "tdm.num_steps=4", "eval.num_steps=4", "tdm.batch_size=6")
STEPS = {
    "grpo": (one_grpo, ("grpo.prompts=2", "grpo.group=4", "grpo.num_steps=3", "grpo.draws=2", "grpo.batch_size=8")),
    "dpo": (one_dpo, ("pairs=x", "dpo.pairs=3", "dpo.batch_size=6")),
    "sft": (one_sft, ("sft.images=4", "sft.draws=3", "sft.batch_size=6")),
    "tdm": (one_tdm, (*SMALL_TDM, "tdm.warmup=0")),
    "tdm warm-up": (one_tdm, (*SMALL_TDM, "tdm.warmup_updates=3")),
}


@pytest.mark.parametrize("settings", [(), ("compute.checkpoint_blocks=all",), ("full=true",)], ids=str)
@pytest.mark.parametrize("algorithm", STEPS)
def test_a_step_needs_what_was_predicted(algorithm: str, settings: tuple[str, ...]) -> None:
    if settings and algorithm in ("dpo", "sft") and "full=true" not in settings:
        pytest.skip("checkpointing is the same for all")
    one, small = STEPS[algorithm]
    algorithm = algorithm.split()[0]
    config = config_of(algorithm, *small, *settings)
    model = load("playground", device="cpu", dtype=torch.float32)
    text = len(Conditioner(model).encode(PROMPT)[0])
    found = estimate(config, sizes_of("playground"), dtype=torch.float32, text=text, gpu=False)
    apply_compute(model.transformer, config.compute)
    names = ("policy", "critic") if algorithm == "tdm" else ("policy",)
    roles = [
        make_full(model.transformer, name, start=None) if config.full else
        make_role(model.transformer, name, config.lora, 0, start=None) for name in names
    ]  # fmt: skip
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(role.parameters.values(), lr=1e-4) for role in roles]
    one(config, model, roles, optimizers)  # from the second step on the optimiser has its state
    held = [*model.transformer.parameters(), *model.vae.parameters(), *model.text_encoder.parameters()]
    for role, optimizer in zip(roles, optimizers, strict=True):
        held += [*role.transformer.parameters(), *role.average.values()]
        held += [p.grad for p in role.parameters.values() if p.grad is not None]
        held += [value for state in optimizer.state.values() for value in state.values()]
    with Count(held) as count:
        one(config, model, roles, optimizers)
    assert found.peak == pytest.approx(count.peak, rel=0.15)
    # The empty prompt of guidance counts like any other, which is too much where there are few image tokens.
    assert sum(found.flop.values()) == pytest.approx(count.flop, rel=0.2 if algorithm == "tdm" else 0.1)


def test_too_little_memory_is_told_before_loading_with_what_would_fit() -> None:
    config = config_of("sft", "sft.images=6", "sft.draws=2", "sft.batch_size=12")
    sizes = sizes_of("playground")
    needed = estimate(config, sizes, dtype=torch.float32, gpu=False).peak
    check_memory(config, torch.device("cpu"), needed)
    with pytest.raises(RlhfImgError, match=r"needs about .* GiB .* are free: .*checkpoint_blocks=all.* needs .*doctor"):
        check_memory(config, torch.device("cpu"), needed / 3)
    fits = what_fits(config, sizes, needed / 3, dtype=torch.float32, gpu=False)
    assert fits is not None and fits[1].peak <= needed / 3
    assert changes(config, fits[0])[0] == "compute.checkpoint_blocks=all"
    assert not fits[0].compute.offload  # on a CPU it frees nothing
    with pytest.raises(RlhfImgError, match="no batch is small enough"):
        check_memory(config, torch.device("cpu"), 2**22)


def test_the_published_sizes_are_known_without_a_file() -> None:
    sizes = sizes_of("krea-2")
    parts = {name: sum(p.numel() for p in part.parameters()) / 1e9 for name, part in sizes.parts().items()}
    assert parts == pytest.approx({"transformer": 12.8, "text_encoder": 4.44, "vae": 0.127}, rel=0.01)
    assert sizes.grid(1024) == (64, 64)
