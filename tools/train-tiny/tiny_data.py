"""Procedural clips and their captions: one coloured shape doing one thing on a plain background."""

import itertools
import random
from dataclasses import dataclass

import torch

# RGB in [0, 1].
COLOURS = {
    "red": (0.90, 0.12, 0.10),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.90, 0.15, 0.85),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS = {"black": (0.02, 0.02, 0.02), "gray": (0.38, 0.38, 0.38), "navy": (0.03, 0.04, 0.25)}
# Direction in pixels, x to the right and y down.
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "growing": (0, 0), "still": (0, 0)}

SHAPE_WORDS = {"circle": ["ball", "circle"], "square": ["square", "box"], "triangle": ["triangle"]}
MOTION_WORDS = {
    "left": ["moving left", "moves left", "going left", "sliding to the left", "moving to the left"],
    "right": ["moving right", "moves right", "going right", "sliding to the right", "moving to the right"],
    "up": ["moving up", "going up", "rising", "moving upwards"],
    "down": ["moving down", "going down", "falling", "moving downwards"],
    "growing": ["growing", "getting bigger"],
    "still": ["staying still", "not moving"],
}
BACKGROUND_WORDS = {
    "black": ["black", "dark"],
    "gray": ["gray", "grey", "dark gray"],
    "navy": ["navy", "navy blue", "dark blue"],
}
ARTICLES = ["a", "the", "one"]
PREFIXES = ["a video of", "a clip of", "an animation of", "a short video of"]
BEFORE_BACKGROUND = ["on a", "against a", "over a"]
FILLERS = ["simple", "smooth", "nice", "clean"]


@dataclass(frozen=True)
class Scene:
    shape: str
    colour: str
    motion: str
    background: str


SCENES = [Scene(*parts) for parts in itertools.product(SHAPE_WORDS, COLOURS, MOTIONS, BACKGROUNDS)]
# (shape, colour, motion) that the transformer never sees together, to measure whether it combines what it knows.
_TRIPLES = list(itertools.product(SHAPE_WORDS, COLOURS, MOTIONS))
HELD_OUT = frozenset(random.Random(11).sample(_TRIPLES, 11))


def is_held_out(scene):
    return (scene.shape, scene.colour, scene.motion) in HELD_OUT


def render(scene, frames, height, width, rng):
    """The clip, [3, frames, height, width] in [-1, 1]."""
    radius, speed = rng.uniform(9, 13), rng.uniform(1.0, 1.45)
    times = torch.arange(frames, dtype=torch.float32)
    radii = torch.full((frames,), radius)
    if scene.motion == "growing":
        # It ends at the full radius, and starts no smaller than what survives the 8-fold latent grid.
        radii = radius - min(speed * 0.4, (radius - 4) / max(frames - 1, 1)) * times.flip(0)
    centre = []
    for extent, direction in zip((width, height), MOTIONS[scene.motion]):
        room = extent - 2 * radius
        path = min(speed * (frames - 1), room) * direction
        start = rng.uniform(radius + max(0.0, -path), extent - radius - max(0.0, path))
        centre.append(start + path * times / max(frames - 1, 1))

    x = torch.arange(width) + 0.5 - centre[0].view(-1, 1, 1)
    y = torch.arange(height).view(-1, 1) + 0.5 - centre[1].view(-1, 1, 1)
    distance = _signed_distance(scene.shape, x, y, radii.view(-1, 1, 1))
    coverage = (0.5 - distance).clamp(0, 1)  # anti-aliased over one pixel

    colours = (COLOURS[scene.colour], BACKGROUNDS[scene.background])
    colour, background = (torch.tensor(rgb).view(3, 1, 1, 1) for rgb in colours)
    return (background + (colour - background) * coverage) * 2 - 1


def _signed_distance(shape, x, y, radius):
    """Pixels from the outline, negative inside."""
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs() + 0 * y, y.abs() + 0 * x) - 0.86 * radius
    # Upright equilateral triangle with its corners on the circle.
    return torch.maximum(x.abs() * 0.866 - y * 0.5, y + 0 * x) - 0.5 * radius


def dither(clips, generator=None):
    """A constant frame has no variance, and the gradient of a group norm then explodes. More than this would be noise in
    the encoder's Fourier features, which have up to 128 periods a unit."""
    return clips + 0.0005 * torch.randn(clips.shape, generator=generator)


def plain_caption(scene):
    return (
        f"a {scene.colour} {SHAPE_WORDS[scene.shape][0]} {MOTION_WORDS[scene.motion][0]}"
        f" on a {scene.background} background"
    )


def caption(scene, rng):
    """A random wording of the scene."""
    subject = [rng.choice(ARTICLES)]
    if rng.random() < 0.05:
        subject.append(rng.choice(FILLERS))
    words = subject + [scene.colour, rng.choice(SHAPE_WORDS[scene.shape]), rng.choice(MOTION_WORDS[scene.motion])]
    if rng.random() < 0.3:
        words.insert(0, rng.choice(PREFIXES))
    if scene.background != "black" or rng.random() < 0.7:
        name = rng.choice(BACKGROUND_WORDS[scene.background])
        words += ["on", name] if rng.random() < 0.15 else [rng.choice(BEFORE_BACKGROUND), name, "background"]
    text = " ".join(words)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.3 else "")


def vocabulary():
    """Every word of every caption, with the capitalised forms of those that can come first."""
    first = set(ARTICLES) | {prefix.split()[0] for prefix in PREFIXES}
    phrases = [ARTICLES, PREFIXES, BEFORE_BACKGROUND, FILLERS, COLOURS, ["background"]]
    phrases += [*SHAPE_WORDS.values(), *MOTION_WORDS.values(), *BACKGROUND_WORDS.values()]
    words = {word for phrase in itertools.chain(*phrases) for word in phrase.split()}
    return sorted(words | {word.capitalize() for word in first})
