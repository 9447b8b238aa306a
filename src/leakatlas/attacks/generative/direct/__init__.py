"""From an update to images in one pass, by a network that learned it."""
