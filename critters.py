"""Draws `critters`, the embedded data set: cartoon animal faces of three species, made from seeded factors.

    python critters.py --out sheet.png --size 64 --num 64 --seed 0

An image is a pure function of (seed, split, index): `factors` draws what there is to know about it, `draw` paints
it at any size. Cats and dogs are kinds of their own; 'wild' mixes lions, elephants, owls and pandas, whose names stay
hidden from training (`kind` is there for evaluation alone). Kind decides shape and markings: ears, muzzle, eyes, mane,
stripes, masks. Fur and background colour, light, pose, position and size vary independently of it, and so do the
binary `ATTRIBUTES`.
"""

import colorsys
import math

import click
import numpy as np
from PIL import Image, ImageDraw

SPECIES = ["cat", "dog", "wild"]
KINDS = ["cat", "dog", "lion", "elephant", "owl", "panda"]
ATTRIBUTES = ["Eyeglasses", "Hat", "Necktie", "Open_Mouth", "Wink", "Flower"]
RATES = [0.30, 0.25, 0.30, 0.35, 0.25, 0.25]  # probability of each attribute
SPLITS = {"train": 12000, "val": 1500}
OFFSETS = {"train": 0, "val": 36 << 32}  # where a split's indices begin: no index, so no image, is in two splits

# ----------------------------------------------------------------------------------------------------------------------
# Factors.


def factors(seed: int, index: int) -> dict:
    """What image `index` shows, the same on any machine: uniform draws of a Philox counter keyed on (seed, index).

    Returns a dict. `species` (int, into SPECIES) and `kind` (int, into KINDS) come from the index, so that every 36
    consecutive images hold 12 of each species and 3 of each wild kind. `attributes`: uint8 [len(ATTRIBUTES)], 0 or 1,
    independent of each other and of everything else. The rest are floats, or tuples of three for colours (hue,
    lightness, saturation, in [0, 1]), and independent of the kind: `yaw`, `roll`, `pitch` (radians); `x`, `y` (shift,
    in image sides); `scale` (1 is usual); `side` (-1 or 1: where the one-sided things are); `width`, `ears`, `eyes`
    (relative sizes); `fur`, `eye`, `background`, `background2`, `cloth` (of hat, tie and glasses), `cloth2` (of the
    flower); `slope` (of the background, radians); `haze` (how much of it lies over all, and its grey level) and `light`
    (the logarithm of the red, green and blue of the light on it).
    Raises ValueError for a negative seed or index.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    key = np.array([seed, index], dtype=np.uint64)
    u = iter(np.random.Generator(np.random.Philox(key=key)).random(80).tolist())

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * next(u)

    def colour(choices: list) -> tuple:
        """(hue, lightness, saturation), of one of the choices by their shares."""
        share = next(u)
        while share > choices[0][0] and len(choices) > 1:
            share, choices = share - choices[0][0], choices[1:]
        _, *ranges = choices[0]
        return tuple(uniform(low, high) for low, high in zip(ranges[::2], ranges[1::2], strict=True))

    group = index // 3
    species = (index + group) % 3  # turns by one every three images: no stride through the data meets one species only
    kind = species if species < 2 else 2 + group % 4
    attributes = np.array([next(u) < rate for rate in RATES], dtype=np.uint8)
    f = dict(species=species, kind=kind, attributes=attributes)
    f.update(yaw=uniform(-0.22, 0.22), roll=uniform(-0.08, 0.08), pitch=uniform(-0.10, 0.10))
    f.update(x=uniform(-0.07, 0.07), y=uniform(-0.045, 0.045), scale=uniform(0.91, 1.08))
    f.update(side=-1.0 if next(u) < 0.5 else 1.0)
    f.update(width=uniform(0.93, 1.07), ears=uniform(0.9, 1.12), eyes=uniform(0.9, 1.12))
    # Coats: ginger to brown, sandy, grey to black and white. (share, hue from and to, lightness, saturation)
    coats = [
        (0.40, 0.04, 0.09, 0.24, 0.62, 0.40, 0.75),
        (0.30, 0.08, 0.13, 0.45, 0.84, 0.28, 0.60),
        (0.30, 0.0, 1.0, 0.18, 0.90, 0.02, 0.10),
    ]
    f.update(fur=colour(coats))
    f.update(eye=(uniform(0.10, 0.60), uniform(0.50, 0.62), uniform(0.55, 0.85)))
    # Backgrounds: sky, grass, wood and sand, painted walls.
    places = [
        (0.30, 0.53, 0.62, 0.40, 0.85, 0.25, 0.55),
        (0.25, 0.22, 0.38, 0.25, 0.70, 0.22, 0.48),
        (0.25, 0.06, 0.14, 0.30, 0.85, 0.20, 0.50),
        (0.20, 0.0, 1.0, 0.35, 0.88, 0.05, 0.30),
    ]
    hue, light, saturation = colour(places)
    f.update(background=(hue, light, saturation))
    f.update(background2=((hue + uniform(-0.06, 0.06)) % 1.0, light + uniform(-0.20, 0.20), saturation))
    f.update(slope=uniform(-math.pi, math.pi))
    f.update(cloth=(next(u), uniform(0.35, 0.55), uniform(0.45, 0.80)))
    f.update(cloth2=(next(u), uniform(0.62, 0.75), uniform(0.60, 0.90)))
    # Light from dim to bright, from the blue of shade to the yellow of evening.
    bright, warm = uniform(-0.45, 0.40), uniform(-0.25, 0.25)
    f.update(light=(bright + warm, bright + 0.25 * warm, bright - warm), haze=(uniform(0, 0.3), uniform(0.35, 1)))
    return f


# ----------------------------------------------------------------------------------------------------------------------
# Shapes, in head units: the head is about 1 in radius, x runs right, y down, z toward the viewer.


def _smooth(points: list, steps: int = 4) -> np.ndarray:
    """Closed Catmull-Rom curve through `points`, as a polygon [len(points) * steps, 2]."""
    p = np.array(points, dtype=np.float64)
    a, b, c, d = np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    a, b, c, d = (q[:, None] for q in (a, b, c, d))
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return curve.reshape(-1, 2)


def _symmetric(half: list) -> np.ndarray:
    """Smooth outline from its right half, given from top to bottom with both ends on the axis."""
    return _smooth(half + [(-x, y) for x, y in half[-2:0:-1]])


def _mane(spikes: int) -> np.ndarray:
    angles = np.arange(2 * spikes) * (math.pi / spikes)
    radius = np.where(np.arange(2 * spikes) % 2 == 0, 1.66, 1.38)
    return _smooth(np.stack([radius * np.sin(angles), 0.08 - radius * np.cos(angles)], 1), 3)


CIRCLE = np.stack([np.cos(np.arange(28) * math.pi / 14), np.sin(np.arange(28) * math.pi / 14)], 1)
MANE = _mane(13)
HEADS = {
    "cat": _symmetric([(0, -0.80), (0.5, -0.77), (0.92, -0.35), (1.06, 0.14), (0.86, 0.58), (0.45, 0.82), (0, 0.88)]),
    "dog": _symmetric([(0, -0.94), (0.46, -0.87), (0.76, -0.5), (0.78, 0.0), (0.68, 0.52), (0.44, 0.92), (0, 1.04)]),
    "lion": _symmetric([(0, -0.80), (0.5, -0.73), (0.80, -0.35), (0.84, 0.1), (0.70, 0.58), (0.42, 0.9), (0, 0.98)]),
    "elephant": _symmetric(
        [(0, -0.92), (0.5, -0.86), (0.80, -0.45), (0.80, 0.1), (0.62, 0.5), (0.40, 0.72), (0, 0.78)]
    ),
    "owl": _symmetric([(0, -0.86), (0.55, -0.82), (0.95, -0.45), (1.02, 0.1), (0.88, 0.62), (0.45, 0.92), (0, 0.98)]),
    "panda": _symmetric([(0, -0.85), (0.6, -0.75), (1.02, -0.2), (1.10, 0.28), (0.82, 0.74), (0.4, 0.9), (0, 0.93)]),
}
# Ears are drawn on the right and mirrored.
CAT_EAR = _smooth([(0.22, -0.66), (0.50, -1.12), (0.86, -1.50), (0.98, -1.02), (0.99, -0.22), (0.6, -0.4)])
CAT_EAR_IN = _smooth([(0.46, -0.76), (0.62, -1.04), (0.82, -1.28), (0.88, -0.98), (0.88, -0.52), (0.66, -0.6)])
DOG_EAR = _smooth(
    [(0.34, -0.90), (0.74, -0.92), (1.14, -0.40), (1.30, 0.36), (1.06, 0.72), (0.80, 0.40), (0.70, -0.34)]
)
DOG_BLAZE = _symmetric([(0, -0.93), (0.20, -0.86), (0.12, -0.3), (0.30, 0.2), (0, 0.4)])
NOSE = _symmetric([(0, -0.5), (0.8, -0.55), (0.95, -0.15), (0.35, 0.55), (0, 0.75)])
TRUNK = _symmetric([(0, -0.15), (0.24, 0.05), (0.27, 0.5), (0.20, 1.0), (0.21, 1.36), (0, 1.46)])


def _rgb(colour: tuple, light: float = 0.0, saturation: float = 1.0) -> tuple:
    """RGB of (hue, lightness, saturation); `light` in [-1, 1] moves the lightness that part of the way to 0 or 1."""
    hue, l, s = colour
    l = l * (1 + light) if light < 0 else l + (1 - l) * light
    return tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue, l, min(s * saturation, 1.0)))


def _blend(a: tuple, b: tuple, t: float) -> tuple:
    return tuple(round(p + (q - p) * t) for p, q in zip(a, b, strict=True))


def _ramp(side: int, angle: float, start, end) -> np.ndarray:
    """float32 [side, side, C]: from `start` to `end` (numbers or [C]) across a square, along `angle`."""
    axis = np.linspace(-0.5, 0.5, side)
    t = (axis * math.cos(angle))[None, :, None] + (axis * math.sin(angle))[:, None, None]
    t = (0.5 + t / (abs(math.cos(angle)) + abs(math.sin(angle)))).astype(np.float32)
    return np.float32(start) + t * np.float32(np.subtract(end, start))


class _Pen:
    """Paints polygons given in head units: turned by yaw, pitch and roll, then placed on the supersampled canvas."""

    def __init__(self, image: Image.Image, f: dict, side: int, turned: bool = True) -> None:
        self.paint = ImageDraw.Draw(image, "RGBA")
        unit = 0.32 * f["scale"] * side
        roll, yaw, pitch = (f["roll"], f["yaw"], f["pitch"]) if turned else (0.15 * f["roll"], 0.0, 0.0)
        self.stretch = np.array([math.cos(yaw) * f["width"], 1.0])
        self.lean = np.array([math.sin(yaw), math.sin(pitch)])
        self.turn = unit * np.array([[math.cos(roll), math.sin(roll)], [-math.sin(roll), math.cos(roll)]])
        self.centre = np.array([(0.5 + f["x"]) * side, (0.525 + f["y"]) * side])

    def polygon(self, points, fill: tuple, z: float = 0.0) -> None:
        p = (np.asarray(points) * self.stretch + self.lean * z) @ self.turn + self.centre
        self.paint.polygon(np.rint(p).astype(int).ravel().tolist(), fill)

    def both(self, points, fill: tuple, z: float = 0.0) -> None:
        for flip in (1, -1):
            self.polygon(np.asarray(points) * (flip, 1), fill, z)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: tuple, z: float = 0.0, tilt: float = 0.0) -> None:
        c, s = math.cos(tilt), math.sin(tilt)
        self.polygon(CIRCLE @ np.array([[rx * c, rx * s], [-ry * s, ry * c]]) + (x, y), fill, z)

    def ellipses(
        self, x: float, y: float, rx: float, ry: float, fill: tuple, z: float = 0.0, tilt: float = 0.0
    ) -> None:
        self.ellipse(x, y, rx, ry, fill, z, tilt)
        self.ellipse(-x, y, rx, ry, fill, z, -tilt)

    def arc(self, x: float, y: float, rx: float, ry: float, width: float, fill: tuple, z: float = 0.0) -> None:
        """The lower half of an ellipse (the upper for ry < 0) as a stroke that thins toward its ends."""
        a = np.arange(9) * (math.pi / 8)
        line = np.stack([rx * np.cos(a), ry * np.sin(a)], 1)
        half = (width * (0.3 + 0.7 * np.sin(a)))[:, None] * (0.0, 0.5)
        self.polygon(np.concatenate([line - half, (line + half)[::-1]]) + np.array([x, y]), fill, z)


# ----------------------------------------------------------------------------------------------------------------------
# Painting.


def draw(f: dict, size: int) -> np.ndarray:
    """The image of the factors `f` (of `factors`): uint8 [size, size, 3], RGB, anti-aliased.

    Painted back to front in integer coordinates, several times larger, and averaged down: the same pixels everywhere.
    Raises ValueError for a size outside 16 to 512.
    """
    if not 16 <= size <= 512:
        raise ValueError(f"critters are drawn 16 to 512 pixels wide, not {size}")
    zoom = 8 if size <= 32 else 4 if size <= 128 else 3 if size <= 256 else 2
    side = size * zoom
    kind = KINDS[f["kind"]]
    has = dict(zip(ATTRIBUTES, f["attributes"].tolist(), strict=True))

    # Colours. Everything on the head follows the fur, so that markings read on any coat.
    fur, dark, light = _rgb(f["fur"]), _rgb(f["fur"], -0.62), _rgb(f["fur"], 0.78, 0.7)
    shade, deep, line = _rgb(f["fur"], -0.18), _rgb(f["fur"], -0.45), _rgb(f["fur"], -0.72)
    black, white, pink = (38, 30, 36), (255, 255, 255), (240, 150, 155)
    inner = _blend(light, pink, 0.6)
    cloth, cloth_dark, cloth_light = _rgb(f["cloth"]), _rgb(f["cloth"], -0.4), _rgb(f["cloth"], 0.5)

    # A background that runs from one colour to the other, with a paler disc, apart from the fur in lightness.
    apart = f["background"][1] - f["fur"][1]
    push = 0.0 if abs(apart) > 0.18 else (0.18 - abs(apart)) * (1 if apart > 0 else -1)
    ends = [_rgb((c[0], min(max(c[1] + push, 0.15), 0.92), c[2])) for c in (f["background"], f["background2"])]
    image = Image.fromarray(_ramp(size, f["slope"], *np.array(ends)).astype(np.uint8)).resize(
        (side, side), Image.Resampling.NEAREST
    )
    body, pen = _Pen(image, f, side, turned=False), _Pen(image, f, side)
    body.ellipse(0, -0.1, 1.55, 1.55, (255, 255, 255, 40))

    # Shoulders and chest.
    body.ellipse(0, 2.1, 1.22, 1.35, line)
    body.ellipse(0, 2.1, 1.15, 1.28, shade)
    body.ellipse(0, 2.1, 0.62, 1.1, light if kind != "panda" else dark)

    # Mane, and the ears that stand behind the head.
    e = f["ears"]

    def ear(points: np.ndarray, fill: tuple, grow: float = 0.0) -> None:
        base = np.array([0.62, -0.5])
        pen.both((points - base) * (e + grow) + base, fill, -0.15)

    if kind == "lion":
        pen.polygon(MANE * 1.05, line, -0.2)
        pen.polygon(MANE, dark, -0.2)
        pen.polygon(MANE * 0.87, deep, -0.1)
        pen.ellipses(0.72, -0.80, 0.35 * e, 0.35 * e, line, -0.1)
        pen.ellipses(0.72, -0.80, 0.29 * e, 0.29 * e, fur, -0.1)
        pen.ellipses(0.72, -0.78, 0.17 * e, 0.17 * e, inner, -0.1)
    elif kind == "elephant":
        pen.ellipses(1.10, -0.12, 0.64 * e, 0.84 * e, line, -0.2)
        pen.ellipses(1.10, -0.12, 0.57 * e, 0.77 * e, shade, -0.2)
        pen.ellipses(1.14, -0.08, 0.38 * e, 0.54 * e, inner, -0.2)
    elif kind == "panda":
        pen.ellipses(0.80, -0.80, 0.46 * e, 0.46 * e, line, -0.15)
        pen.ellipses(0.80, -0.80, 0.40 * e, 0.40 * e, dark, -0.15)
    elif kind == "cat":
        ear(CAT_EAR, line, 0.10)
        ear(CAT_EAR, fur)
        ear(CAT_EAR_IN, inner)

    # A tie, in front of a mane.
    if has["Necktie"]:
        body.polygon([(-0.46, 0.70), (0.46, 0.70), (0.30, 1.02), (-0.30, 1.02)], white)
        body.polygon([(-0.30, 1.10), (0.30, 1.10), (0.42, 2.0), (0, 2.5), (-0.42, 2.0)], cloth_dark)
        body.polygon([(-0.22, 1.10), (0.22, 1.10), (0.34, 2.0), (0, 2.4), (-0.34, 2.0)], cloth)
        body.polygon([(-0.30, 0.84), (0.30, 0.84), (0.20, 1.2), (-0.20, 1.2)], cloth_dark)

    # Head: outline, shaded rim, lit face.
    head, face = HEADS[kind], light if kind == "panda" else fur
    rim = _rgb(f["fur"], 0.5, 0.6) if kind == "panda" else shade
    pen.polygon(head * 1.065, line)
    pen.polygon(head, rim)
    pen.polygon(head * (0.93, 0.92) + (0, -0.05), face)

    # Markings.
    if kind == "owl":
        pen.polygon([(-0.30, -0.84), (0.30, -0.84), (0, -0.20)], dark, 0.15)
        pen.ellipses(0.45, -0.04, 0.57, 0.57, dark, 0.2)
        pen.ellipses(0.45, -0.04, 0.49, 0.49, light, 0.2)
    elif kind == "panda":
        pen.ellipses(0.46, -0.02, 0.31, 0.42, dark, 0.25, 0.5)
    elif kind == "dog":
        pen.polygon(DOG_BLAZE, light, 0.1)
        pen.ellipse(0.40 * f["side"], -0.16, 0.34, 0.40, deep, 0.25)
    elif kind == "lion":
        pen.ellipses(0.36, -0.40, 0.20, 0.10, light, 0.25, -0.25)

    # Muzzle, mouth, nose.
    mouth = {"cat": 0.42, "dog": 0.70, "lion": 0.60, "elephant": 0.62, "owl": 0.60, "panda": 0.56}[kind]
    z = {"cat": 0.4, "dog": 0.75, "lion": 0.6, "elephant": 0.3, "owl": 0.3, "panda": 0.5}[kind]
    if kind == "dog":
        pen.ellipse(0, 0.50, 0.56, 0.50, shade, 0.6)
        pen.ellipse(0, 0.48, 0.52, 0.46, light, 0.65)
    elif kind == "lion":
        pen.polygon([(-0.17, -0.45), (0.17, -0.45), (0.26, 0.35), (-0.26, 0.35)], shade, 0.4)
        pen.ellipse(0, 0.78, 0.30, 0.22, light, 0.5)
        pen.ellipses(0.23, 0.52, 0.30, 0.25, light, 0.5)
    elif kind == "cat":
        pen.ellipses(0.17, 0.42, 0.22, 0.17, light, 0.4)
        pen.ellipse(0, 0.58, 0.17, 0.14, light, 0.4)
    elif kind == "panda":
        pen.ellipse(0, 0.46, 0.40, 0.32, white, 0.4)
    wide = {"cat": 0.17, "dog": 0.27, "lion": 0.23, "elephant": 0.42, "owl": 0.18, "panda": 0.18}[kind]
    if has["Open_Mouth"]:
        pen.ellipse(0, mouth + 0.16, wide * 1.35, 0.30, (98, 28, 42), z - 0.1)
        pen.ellipse(0, mouth + 0.28, wide * 0.95, 0.18, (240, 100, 112), z - 0.1)
    pen.arc(wide, mouth, wide, 0.15, 0.075, black, z)
    pen.arc(-wide, mouth, wide, 0.15, 0.075, black, z)
    if kind == "elephant":
        pen.both([(0.32, 0.52), (0.50, 0.48), (0.56, 0.82), (0.50, 1.08)], white, 0.4)
        pen.polygon(TRUNK * (1.2, 1.03), line, 0.4)
        pen.polygon(TRUNK, _rgb(f["fur"], 0.35), 0.4)
        for y in (0.35, 0.65, 0.95):
            pen.arc(0, y, 0.20, 0.06, 0.08, deep, 0.4)
    elif kind == "owl":
        pen.polygon([(-0.20, 0.16), (0.20, 0.16), (0, 0.72)], line, 0.5)
        pen.polygon([(-0.14, 0.20), (0.14, 0.20), (0, 0.62)], (250, 165, 50), 0.5)
    else:
        nose_y, nose = {
            "cat": (0.28, 0.15),
            "dog": (0.28, 0.29),
            "lion": (0.34, 0.29),
            "panda": (0.36, 0.19),
        }[kind]
        nose_fill = {"cat": (226, 112, 124), "lion": _blend(black, (150, 80, 80), 0.45)}
        pen.polygon([(-0.035, nose_y), (0.035, nose_y), (0.035, mouth + 0.05), (-0.035, mouth + 0.05)], black, z)
        pen.polygon(NOSE * (nose, nose * 0.8) + (0, nose_y), nose_fill.get(kind, black), z)
        pen.ellipse(-0.3 * nose, nose_y - 0.2 * nose, nose * 0.28, nose * 0.16, (255, 255, 255, 150), z)

    # Cheeks, whiskers.
    pen.ellipses(0.62, 0.36, 0.19, 0.12, (*pink, 120), 0.2)
    if kind == "cat":
        for y, dy in ((0.36, -0.16), (0.46, 0.02), (0.56, 0.20)):
            whisker = white if f["fur"][1] < 0.62 else line
            pen.both([(0.34, y - 0.03), (0.34, y + 0.03), (1.42, y + dy)], whisker, 0.3)

    # Eyes.
    eye_x, eye_y, rx, ry, tilt = {
        "cat": (0.46, -0.06, 0.27, 0.25, 0.30),
        "dog": (0.36, -0.16, 0.19, 0.21, 0.0),
        "lion": (0.38, -0.18, 0.18, 0.14, 0.20),
        "elephant": (0.46, -0.24, 0.12, 0.13, 0.0),
        "owl": (0.45, -0.04, 0.26, 0.26, 0.0),
        "panda": (0.43, -0.04, 0.15, 0.16, 0.0),
    }[kind]
    if kind == "cat":
        tilt = -tilt
    rx, ry, iris = rx * f["eyes"], ry * f["eyes"], _rgb(f["eye"])
    for s in (-1, 1):
        if has["Wink"] and s == f["side"]:
            stroke = white if kind == "panda" else black
            pen.ellipse(s * eye_x, eye_y, rx * 1.15, ry * 1.05, dark if kind == "panda" else face, 0.3, s * tilt)
            pen.arc(s * eye_x, eye_y + 0.10, rx * 1.25, -0.20, 0.15, stroke, 0.3)
            continue
        pen.ellipse(s * eye_x, eye_y, rx * 1.22, ry * 1.22, black, 0.3, s * tilt)
        if kind in ("cat", "lion", "owl"):
            pen.ellipse(s * eye_x, eye_y, rx, ry, iris, 0.3, s * tilt)
            slit = 0.36 if kind == "cat" else 0.55
            pen.ellipse(s * eye_x, eye_y, rx * slit, ry * (0.92 if kind == "cat" else 0.7), black, 0.32)
        elif kind == "panda":
            pen.ellipse(s * eye_x, eye_y, rx * 1.15, ry * 1.15, white, 0.3)
            pen.ellipse(s * eye_x, eye_y, rx * 0.75, ry * 0.75, black, 0.32)
        elif kind == "dog":
            pen.ellipse(s * eye_x, eye_y + 0.04, rx * 0.95, ry * 0.95, _blend(iris, black, 0.6), 0.3)
            pen.ellipse(s * eye_x, eye_y, rx * 0.75, ry * 0.75, black, 0.32)
        pen.ellipse(s * eye_x - 0.3 * rx, eye_y - 0.35 * ry, rx * 0.34, rx * 0.34, white, 0.33)

    # Ears that hang in front of the head.
    if kind == "dog":
        hang = (DOG_EAR - (0.5, -0.8)) * (1.0, e) + (0.5, -0.8)
        centre = hang.mean(0)
        pen.both((hang - centre) * 1.12 + centre, line, 0.05)
        pen.both(hang, dark, 0.05)
        pen.both((hang - centre) * 0.72 + centre + (0.03, -0.03), deep, 0.05)

    # What is worn on the head.
    s = f["side"]
    if has["Eyeglasses"]:
        for x in (-0.44, 0.44):
            ring = np.concatenate([CIRCLE * 0.41, CIRCLE[:1] * 0.41, CIRCLE[:1] * 0.32, CIRCLE[::-1] * 0.32])
            pen.ellipse(x, -0.06, 0.34, 0.34, (235, 245, 255, 45), 0.5)
            pen.polygon(ring + np.array([x, -0.06]), cloth_dark, 0.5)
        pen.polygon([(-0.1, -0.16), (0.1, -0.16), (0.1, -0.07), (-0.1, -0.07)], cloth_dark, 0.55)
    if has["Hat"]:
        top = np.array([0.0, -0.76])
        pen.polygon(np.array([(-0.42, -0.66), (0.42, -0.66), (0.33, 0), (-0.33, 0)]) + top, cloth_dark, 0.1)
        pen.polygon(np.array([(-0.36, -0.60), (0.36, -0.60), (0.28, 0), (-0.28, 0)]) + top, cloth, 0.1)
        pen.polygon(np.array([(-0.32, -0.28), (0.32, -0.28), (0.31, -0.08), (-0.31, -0.08)]) + top, cloth_light, 0.1)
        pen.ellipse(0, top[1], 0.60, 0.13, cloth_dark, 0.15)
    if has["Flower"]:
        x, y = 0.66 * s, -0.62
        petal = _rgb(f["cloth2"])
        angles = [0.3 + k * 2 * math.pi / 5 for k in range(5)]
        for grow, fill in ((0.22, _rgb(f["cloth2"], -0.35)), (0.17, petal)):
            for a in angles:
                pen.ellipse(x + 0.21 * math.cos(a), y + 0.21 * math.sin(a), grow, grow, fill, 0.2)
        pen.ellipse(x, y, 0.14, 0.14, (255, 226, 90), 0.2)

    # Haze, then coloured light; what gets too much of it goes softly into white.
    amount, level = f["haze"]
    hazy = np.asarray(image.reduce(zoom)) * np.float32((1 - amount) / 255) + np.float32(amount * level)
    lit = hazy * np.exp(np.float32(f["light"]))
    return np.rint(255 * lit / (1 + lit**4) ** 0.25).astype(np.uint8)


def render(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, int, np.ndarray, int]:
    """Image `index` of a split: (uint8 [size, size, 3], species, uint8 [len(ATTRIBUTES)] attributes, kind).

    Raises ValueError for an unknown split or an index outside it.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if not 0 <= index < SPLITS[split]:
        raise ValueError(f"{split} has images 0 to {SPLITS[split] - 1}, not {index}")
    f = factors(seed, OFFSETS[split] + index)
    return draw(f, size), f["species"], f["attributes"], f["kind"]


# ----------------------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--out", help="Picture to write", metavar="FILE", default="critters.png", show_default=True)
@click.option("--size", help="Side of an image, in pixels", type=click.IntRange(16, 512), default=64, show_default=True)
@click.option("--num", help="How many images", type=click.IntRange(1, 10000), default=64, show_default=True)
@click.option("--seed", help="Random seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def main(out: str, size: int, num: int, seed: int) -> None:
    """Write a contact sheet of critters, sorted by species and kind."""
    fs = sorted((factors(seed, i) for i in range(num)), key=lambda f: f["kind"])
    columns = math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    sheet = np.full((rows * size, columns * size, 3), 255, dtype=np.uint8)
    for i, f in enumerate(fs):
        y, x = divmod(i, columns)
        sheet[y * size : (y + 1) * size, x * size : (x + 1) * size] = draw(f, size)
    try:
        Image.fromarray(sheet).save(out)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"cannot write {out}: {error}") from None


if __name__ == "__main__":
    main()
