"""Draws a scene: RGB, 64 x 64 px, antialiased, the same pixels for the same scene and seed."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from rlhf_img.playground.scene import BACKGROUNDS, COLORS, SIZE, Scene, Thing

SCALE = 4
"""Shapes are drawn this many times larger and averaged down, which antialiases them."""


def render(scene: Scene, seed: int = 0) -> np.ndarray:
    """The image of a scene.

    Returns uint8 (64, 64, 3), RGB. `seed` drives only the film grain.
    """
    side = SIZE * SCALE
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(draw, thing)
    if scene.word:
        ink = (20, 20, 20) if scene.background == "white" else (245, 245, 245)
        draw_word(draw, scene.word, word_y(scene), ink)
    image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return _apply_style(image, scene.style, seed)


def word_y(scene: Scene) -> float:
    """The row in the middle of a scene's word, if it has one."""
    return 10 if scene.word_at_top else SIZE - 10


def draw_word(draw: ImageDraw.ImageDraw, word: str, y: float, ink: tuple[int, int, int] | int) -> None:
    """Writes a word on a canvas of `SCALE` times the image's side, its middle at `y` px of the image."""
    font = ImageFont.load_default(size=18 * SCALE)
    draw.text((SIZE / 2 * SCALE, y * SCALE), word, fill=ink, font=font, anchor="mm", stroke_width=2, stroke_fill=ink)


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a shape whose area is about that of the others of the same radius."""
    match shape:
        case "square":
            h = radius * 0.88
            return [(x - h, y - h), (x + h, y - h), (x + h, y + h), (x - h, y + h)]
        case "triangle":
            return [(x, y - radius), (x + radius, y + 0.8 * radius), (x - radius, y + 0.8 * radius)]
        case "star":
            angles = np.pi * (np.arange(10) / 5 - 0.5)
            reach = np.where(np.arange(10) % 2 == 0, 1.1, 0.45) * radius
            return [(x + r * np.cos(a), y + r * np.sin(a)) for a, r in zip(angles, reach, strict=True)]
        case "cross":
            a, b = radius, 0.36 * radius
            turns = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b),
                     (-a, -b), (-b, -b)]
            return [(x + dx, y + dy) for dx, dy in turns]
        case "circle":
            angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
            return [(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles]
    raise ValueError(f"no such shape: {shape}")


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    corners = outline(thing.shape, thing.x, thing.y, thing.radius)
    draw.polygon([(x * SCALE, y * SCALE) for x, y in corners], fill=COLORS[thing.color])


def _apply_style(image: Image.Image, style: str | None, seed: int) -> np.ndarray:
    match style:
        case "soft focus":
            return np.asarray(image.filter(ImageFilter.GaussianBlur(1.6)))
        case "film grain":
            grain = np.random.default_rng(seed).normal(0, 14, (SIZE, SIZE, 1))
            return np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
        case "vignette":
            axis = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
            distance = np.hypot(axis[:, None], axis[None, :])
            shade = 1 - 0.55 * np.clip((distance - 0.7) / 0.7, 0, 1)
            return (np.asarray(image) * shade[..., None]).astype(np.uint8)
        case None:
            return np.asarray(image)
    raise ValueError(f"no such style: {style}")
