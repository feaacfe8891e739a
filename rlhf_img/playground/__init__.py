"""The embedded world: scenes, their renderer and captions, and the tiny Krea 2 that is trained on them."""
