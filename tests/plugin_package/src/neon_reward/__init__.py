"""A reward plug-in as a user would publish it: one function and an entry point."""


def neon(prompts, images, **columns):
    """How saturated the image is, from 0 to 1."""
    return [float((pixels.max(axis=-1) - pixels.min(axis=-1)).mean() / 255) for pixels in images.arrays]


neon.floor = 0.01
