"""What an image is worth: the reward protocol, plug-in loading, combining, and the rewards that ship."""

from rlhf_img.rewards.combining import METHODS, advantages, apply_gates, describe, extremes, gdpo, weighted_sum
from rlhf_img.rewards.loading import known_rewards, load_rewards
from rlhf_img.rewards.protocol import Images, Reward, Scores, Verdict
from rlhf_img.rewards.scoring import Scoring, score
from rlhf_img.rewards.signal import learnable, repeat_noise

__all__ = [
    "METHODS",
    "Images",
    "Reward",
    "Scores",
    "Scoring",
    "Verdict",
    "advantages",
    "apply_gates",
    "describe",
    "extremes",
    "gdpo",
    "known_rewards",
    "learnable",
    "load_rewards",
    "repeat_noise",
    "score",
    "weighted_sum",
]
