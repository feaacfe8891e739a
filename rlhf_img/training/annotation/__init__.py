"""People compare images: what they are shown, where their answers are kept, and the preference pairs they become."""
