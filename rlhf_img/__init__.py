"""rlhf-img: preference and reward alignment of flow-matching image models, Krea 2 first."""

__version__ = "0.1.0"
