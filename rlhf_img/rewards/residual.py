"""The playground's truth about glitches: what the best clean render of an image cannot explain. It only measures.

Analysis by synthesis. The image is parsed into what the playground draws (an even background, upright coloured shapes
of its sizes, one of its words), that scene is rendered again, and place, size, blur and vignette are fitted. A colour,
a soft edge, grain or dark corners can be rendered and so are no glitch; a torn, fused, speckled or bent thing cannot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from rlhf_img.errors import RlhfImgError
from rlhf_img.playground.render import SCALE, draw_word, outline
from rlhf_img.playground.scene import BACKGROUNDS, RADII, SHAPES, SIZE, WORDS
from rlhf_img.rewards.protocol import Images, Verdict
from rlhf_img.rubrics.colors import name_of
from rlhf_img.rubrics.lexicon import NEUTRALS
from rlhf_img.rubrics.vision import Analysis, analyze

Array = npt.NDArray[np.floating]

_TOLERANCE = 20.0
"""Grey levels of 255 that a pixel may be off without counting."""
_NOISE_TOLERANCE = 3.0
"""Standard deviations of the grain, after smoothing, that are tolerated besides."""
_SMOOTH = 0.9
"""Standard deviation in pixels of the smoothing of grainy images."""
_GRAINY = 5.0
"""Standard deviation of the noise in grey levels from which an image is smoothed first."""
_UNIT = 0.01
"""Share of unexplained pixels at which the value has fallen to 1/e."""
_RADIUS = (0.75 * min(RADII.values()), 1.25 * max(RADII.values()))
"""Radii in pixels that a thing may have: what is smaller or larger is no thing of this world."""
_CLIP = 80.0
"""Grey levels beyond which an error does not grow: a defect must not pull the fit towards itself."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A thing as fitted: shape, centre and radius in pixels, colour in 8 bits."""

    shape: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class CleanFit:
    """The best clean render of an image. word: one of the playground's, at `word_xy`, its centre in pixels.

    blur: standard deviation in pixels. vignette: darkening at the corners. render_HW3: uint8. unexplained_HW: which
    pixels it cannot explain.
    """

    background: tuple[float, float, float]
    figures: tuple[Figure, ...]
    word: str | None
    word_xy: tuple[float, float] | None
    blur: float
    vignette: float
    render_HW3: np.ndarray
    unexplained_HW: np.ndarray

    @property
    def residual(self) -> float:
        """Share of the pixels that are not explained."""
        return float(self.unexplained_HW.mean())


def residual(prompts: Sequence[str], images: Images, **columns: object) -> list[Verdict]:
    """exp(-100 r), r the share of pixels that the best clean render of the playground cannot explain; measures only.

    1: nothing is broken, which an empty scene is not either. The `CleanFit` is in the details. It knows what the
    playground draws and nothing else. Raises RlhfImgError for images of another size than the playground's.
    """
    height, width = images.tensor.shape[-2:]
    if (height, width) != (SIZE, SIZE):
        raise RlhfImgError(
            f"residual: images are {width} x {height} px, but it knows only what the playground draws, at {SIZE} x "
            f"{SIZE} px. Leave it out for other models; the reward artifact can be trained for them"
        )
    fits = [fit_clean(array) for array in images.arrays]
    return [Verdict(value=float(np.exp(-fit.residual / _UNIT)), details=fit) for fit in fits]


residual.range = (0.0, 1.0)  # type: ignore[attr-defined]
residual.floor = 0.02  # type: ignore[attr-defined]
# The one measure of glitches that no policy has learnt to please, as long as none is trained on it.
residual.role = "measure"  # type: ignore[attr-defined]


def fit_clean(image: npt.NDArray[np.uint8]) -> CleanFit:
    """The clean render that explains most of an image uint8 (64, 64, 3), RGB."""
    seen = analyze(image)
    sigma = _SMOOTH if seen.noise > _GRAINY else 0.0
    pixels = ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0)) if sigma else image.astype(np.float32)
    vignette = (1 - seen.corner_shade) / float(_ramp().max())
    blur = float(np.hypot(max(0.0, (seen.blur or 0.0) - 0.5), sigma))
    fit = _Fit(pixels=pixels, background=np.array(seen.background, np.float32), vignette=vignette, blur=blur)
    fit.place_word(seen)
    fit.place_figures(seen)
    fit.settle()
    drawn = fit.render()
    # What is left of grain, also of grain that an autoencoder has turned to mottle; a glitch is too small to count.
    grain = 1.4826 * float(np.median(np.abs(pixels - drawn).max(axis=2)))
    return CleanFit(
        background=seen.background, figures=tuple(fit.figures), word=fit.word[0] if fit.word else None,
        word_xy=fit.word[1:] if fit.word else None, blur=fit.blur, vignette=fit.vignette,
        render_HW3=drawn.clip(0, 255).round().astype(np.uint8),
        unexplained_HW=unexplained(pixels, drawn, _TOLERANCE + _NOISE_TOLERANCE * grain),
    )


def unexplained(pixels_HW3: Array, render_HW3: Array, tolerance: float) -> npt.NDArray[np.bool_]:
    """Pixels with a value by more than `tolerance` outside those that the render has in the 3 x 3 px around them.

    So an edge that is a pixel off, or softer, is explained, and a spot where nothing is drawn is not. Bool (H, W).
    """
    low = ndimage.minimum_filter(render_HW3, size=(3, 3, 1))
    high = ndimage.maximum_filter(render_HW3, size=(3, 3, 1))
    return np.asarray(np.maximum(low - pixels_HW3, pixels_HW3 - high).max(axis=2) > tolerance)


class _Fit:
    """The scene while it is fitted. A pixel is shade * (background + sum_i cover_i (rgb_i - background)): things of
    the playground lie apart, so that each adds its own part."""

    def __init__(self, *, pixels: Array, background: Array, vignette: float, blur: float) -> None:
        self.pixels = pixels
        self.background = background
        self.vignette = vignette
        self.blur = blur
        self.figures: list[Figure] = []
        self.word: tuple[str, float, float] | None = None

    def place_word(self, seen: Analysis) -> None:
        """The word that explains most of the strip where writing was found."""
        if seen.text_box is None:
            return
        left, top, right, bottom = (SIZE * side for side in seen.text_box)
        places = [(word, (left + right) / 2, (top + bottom) / 2) for word in WORDS]
        target = self._rest()
        errors = [_error(target, self._ink(place)) for place in places]
        # The likeliest few by place alone; of them, the best after a fit.
        tried = [self._best_place(target, places[i]) for i in np.argsort(errors)[:4]]
        error, place = min(tried)
        if error < _error(target, np.zeros_like(target)):
            self.word = place

    def place_figures(self, seen: Analysis) -> None:
        """Every thing that the playground could have drawn and that explains something, the largest part first."""
        for thing in sorted(seen.things, key=lambda one: -one.radius):
            radius = float(np.clip(SIZE * thing.radius, *_RADIUS))
            if name_of(thing.rgb) in NEUTRALS or SIZE * thing.radius < 0.5 * _RADIUS[0]:
                continue
            target = self._rest()
            start = Figure(shape="circle", x=SIZE * thing.x, y=SIZE * thing.y, radius=radius, rgb=thing.rgb)
            tried = [self._best_figure(target, replace(start, shape=shape), steps=(1.5, 0.75)) for shape in SHAPES]
            error, figure = min(tried, key=lambda pair: pair[0])
            overlaps = any(np.hypot(figure.x - o.x, figure.y - o.y) < 0.8 * (figure.radius + o.radius)
                           for o in self.figures)
            if not overlaps and error < _error(target, np.zeros_like(target)):
                self.figures.append(figure)

    def settle(self) -> None:
        """Blur, places and vignette, one after the other, each with the others as they are."""
        self.blur = min((max(0.0, self.blur + d) for d in (-0.8, -0.4, 0.0, 0.4, 0.8)), key=self._error_at_blur)
        for i, figure in enumerate(self.figures):
            target = self._rest(without=i)
            self.figures[i] = self._best_figure(target, figure, steps=(0.5, 0.25))[1]
        if self.word is not None:
            self.word = self._best_place(self._rest(without_word=True), self.word)[1]
        if self.vignette > 0:
            self.vignette = min((max(0.0, self.vignette + d) for d in np.linspace(-0.1, 0.1, 9)),
                                key=self._error_at_vignette)

    def render(self) -> Array:
        """The whole scene, float (64, 64, 3)."""
        parts = [self._covered(figure) for figure in self.figures]
        drawn = self.background + np.sum([self._ink(self.word), *parts], axis=0)
        return np.asarray(drawn * (1 - self.vignette * _ramp())[..., None], np.float32)

    def _rest(self, *, without: int | None = None, without_word: bool = False) -> Array:
        """What is left to be explained, the vignette taken off."""
        parts = [self._covered(figure) for i, figure in enumerate(self.figures) if i != without]
        word = self._ink(None if without_word else self.word)
        flat = self.pixels / (1 - self.vignette * _ramp())[..., None]
        return np.asarray(flat - self.background - np.sum([word, *parts], axis=0), np.float32)

    def _covered(self, figure: Figure) -> Array:
        cover = _blurred(_mask(figure), self.blur)
        return np.asarray(cover[..., None] * (np.array(figure.rgb, np.float32) - self.background), np.float32)

    def _ink(self, place: tuple[str, float, float] | None) -> Array:
        if place is None:
            return np.zeros((SIZE, SIZE, 3), np.float32)
        ink = 20.0 if self.background.mean() > 0.9 * np.mean(BACKGROUNDS["white"]) else 245.0
        cover = _blurred(_word_mask(*place), self.blur)
        return np.asarray(cover[..., None] * (ink - self.background), np.float32)

    def _best_figure(self, target: Array, figure: Figure, *, steps: tuple[float, ...]) -> tuple[float, Figure]:
        """Coordinate search over centre and radius; steps in pixels, from coarse to fine."""
        best = _error(target, self._covered(figure))
        for step in steps:
            for _ in range(4):
                before = best
                for field in ("x", "y", "radius"):
                    for way in (-step, step):
                        moved = replace(figure, **{field: getattr(figure, field) + way})
                        if not _RADIUS[0] <= moved.radius <= _RADIUS[1]:
                            continue
                        error = _error(target, self._covered(moved))
                        if error < best:
                            best, figure = error, moved
                if best == before:
                    break
        return best, figure

    def _best_place(self, target: Array, place: tuple[str, float, float]) -> tuple[float, tuple[str, float, float]]:
        """The same for a word, whose size is fixed."""
        best = _error(target, self._ink(place))
        for step in (1.0, 0.5, 0.25):
            for dx, dy in ((-step, 0), (step, 0), (0, -step), (0, step)) * 3:
                moved = (place[0], place[1] + dx, place[2] + dy)
                error = _error(target, self._ink(moved))
                if error < best:
                    best, place = error, moved
        return best, place

    def _error_at_blur(self, blur: float) -> float:
        before, self.blur = self.blur, blur
        error = _error(self.pixels, self.render())
        self.blur = before
        return error

    def _error_at_vignette(self, vignette: float) -> float:
        before, self.vignette = self.vignette, vignette
        error = _error(self.pixels, self.render())
        self.vignette = before
        return error


def _error(a: Array, b: Array) -> float:
    return float(np.minimum(np.abs(a - b), _CLIP).sum())


def _mask(figure: Figure) -> Array:
    """How much of each pixel a figure covers, (64, 64) in [0, 1]."""
    canvas = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    corners = outline(figure.shape, figure.x, figure.y, figure.radius)
    ImageDraw.Draw(canvas).polygon([(x * SCALE, y * SCALE) for x, y in corners], fill=255)
    return np.asarray(canvas.reduce(SCALE), np.float32) / 255


def _word_mask(word: str, x: float, y: float) -> Array:
    """The same of a word about a centre."""
    place = (round((x - SIZE / 2) * SCALE), round((y - SIZE / 2) * SCALE))
    canvas = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    canvas.paste(_word(word), place)
    return np.asarray(canvas.reduce(SCALE), np.float32) / 255


@lru_cache(maxsize=32)
def _word(word: str) -> Image.Image:
    canvas = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    draw_word(ImageDraw.Draw(canvas), word, SIZE / 2, 255)
    return canvas


@lru_cache(maxsize=1)
def _ramp() -> Array:
    """The vignette's falloff as the renderer draws it: 0 inside, about 1 at the corners, (64, 64)."""
    axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1
    return np.asarray(np.clip((np.hypot(axis[:, None], axis[None, :]) - 0.7) / 0.7, 0, 1))


def _blurred(mask: Array, sigma: float) -> Array:
    return np.asarray(ndimage.gaussian_filter(mask, sigma)) if sigma > 0.2 else mask
