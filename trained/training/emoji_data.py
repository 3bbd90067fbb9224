"""The pictures and prompts of the text-to-image model: Noto Color Emoji with the names and keywords of CLDR.

Reads the files of two Debian packages, fonts-noto-color-emoji and unicode-cldr-core, wherever they were unpacked:

    apt-get download fonts-noto-color-emoji unicode-cldr-core
    for package in *.deb; do dpkg-deb -x "$package" data; done
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ANNOTATIONS = tuple(f"usr/share/unicode/cldr/common/{kind}/en.xml" for kind in ("annotations", "annotationsDerived"))
CANVAS = 72  # pixels, of which a random window of 64 is used
SIZES = (56, 63)  # of the picture on its canvas
HUES = {"red": 2, "orange": 28, "yellow": 50, "green": 120, "blue": 215, "purple": 280, "pink": 330}  # degrees
COLOURS = re.compile(r"\b(red|orange|yellow|green|blue|purple|pink|brown|black|white)\b ?")
DIRECTED = re.compile(
    r"left|right|arrow|clock|flag|keycap|button|letter|number|thirty|east|west|sign|mark|hand|symbol|input|calendar"
    r"|musical|spiral|wavy|curl|dollar|pound|euro|yen|thumb|finger|point|ABC|abc|moon|zodiac|roman|latin"
)
PEOPLE = re.compile(r"\b(man|woman|men|women|person|people|boy|girl|child|family|couple|kiss:|baby|adult|hand|hands)\b")
SHAPES = re.compile(r"\b(heart|circle|square|star|diamond|triangle)\b")
SIGNS = re.compile(r"button|keycap|o.clock|thirty|zodiac|letter|arrow|input|symbol|Japanese|family")


@dataclass(frozen=True)
class Picture:
    """One picture with its prompts.

    Attributes:
        pixels: uint8 (sizes, CANVAS, CANVAS, 3), on white.
        prompts: descriptions of it, the name first.
        weight: how often it is drawn, relative to the others.
        mirrored: whether its mirror image has the same name.
    """

    pixels: np.ndarray
    prompts: tuple[str, ...]
    weight: float
    mirrored: bool


def annotations(folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The English name and keywords of each sequence of characters."""
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for path in ANNOTATIONS:
        for entry in ElementTree.parse(folder / path).getroot().iter("annotation"):
            text = entry.text or ""
            if entry.get("type") == "tts":
                names[entry.attrib["cp"]] = text
            else:
                keywords[entry.attrib["cp"]] = tuple(word.strip() for word in text.split("|"))
    return {cp: (name, tuple(k for k in keywords.get(cp, ()) if k != name)) for cp, name in names.items()}


def glyphs(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """Each character, or sequence that the font joins to one glyph, and its bitmap; without variation selectors."""
    from fontTools.ttLib import TTFont

    font = TTFont(path)
    characters = {glyph: chr(code) for code, glyph in font.getBestCmap().items()}
    sequences = dict(characters)
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable if lookup.LookupType == 4 else ():
            for first, ligatures in table.ligatures.items():
                for ligature in ligatures:
                    parts = [first, *ligature.Component]
                    if all(part in characters for part in parts):
                        sequences.setdefault(ligature.LigGlyph, "".join(characters[part] for part in parts))
    for glyph, bitmap in font["CBDT"].strikeData[0].items():
        if glyph in sequences:
            yield sequences[glyph].replace("\ufe0f", ""), Image.open(io.BytesIO(bitmap.imageData)).convert("RGBA")


def drawn(image: Image.Image) -> np.ndarray:
    """The bitmap on a white canvas in each of the sizes, uint8 (sizes, CANVAS, CANVAS, 3)."""
    canvases = []
    for size in SIZES:
        small = image.copy()
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", (CANVAS, CANVAS), "white")
        canvas.alpha_composite(small, ((CANVAS - small.width) // 2, (CANVAS - small.height) // 2))
        canvases.append(np.asarray(canvas.convert("RGB")))
    return np.stack(canvases)


def main_hue(image: Image.Image) -> float | None:
    """The hue, from 0 to 1, that most coloured pixels share, or None where there is no such hue."""
    hsv = np.asarray(image.convert("RGB").convert("HSV"), dtype=np.float32) / 255
    alpha = np.asarray(image)[..., 3] / 255
    strength = alpha * (hsv[..., 1] > 0.35) * (hsv[..., 2] > 0.3)
    if strength.sum() < 0.4 * alpha.sum():
        return None
    mean = (np.exp(2j * np.pi * hsv[..., 0]) * strength).sum() / strength.sum()
    return float(np.angle(mean) / (2 * np.pi) % 1) if abs(mean) > 0.85 else None


def turned(image: Image.Image, hue: float, target: float) -> Image.Image:
    """The image with all its hues turned so that ``hue`` becomes ``target``."""
    hsv = np.asarray(image.convert("RGB").convert("HSV")).copy()
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(256 * (target - hue))) % 256
    result = Image.fromarray(hsv, "HSV").convert("RGB")
    result.putalpha(image.getchannel("A"))
    return result


def weight(characters: str, name: str) -> float:
    """How often a picture is drawn: plain shapes most, skin tones, flags, signs and people least."""
    if "skin tone" in name:
        return 0.02
    if name.startswith("flag"):
        return 0.1
    if SHAPES.search(name) and not PEOPLE.search(name):
        return 3.0
    if SIGNS.search(name):
        return 0.15
    return 0.2 if PEOPLE.search(name) or "\u200d" in characters else 1.0


def recoloured(image: Image.Image, name: str, share: float, mirrored: bool) -> Iterator[Picture]:
    """The picture in each of the named colours, if it has one main colour."""
    hue = main_hue(image)
    if hue is None or "skin tone" in name or name.startswith("flag") or PEOPLE.search(name):
        return
    plain = COLOURS.sub("", name).strip()
    for colour, degrees in HUES.items():
        pixels = drawn(turned(image, hue, degrees / 360))
        yield Picture(pixels, (f"{colour} {plain}",), share / len(HUES), mirrored)


def pictures(folder: Path) -> list[Picture]:
    """All pictures, those of one main colour in seven more colours; takes a minute or two."""
    known = {cp.replace("\ufe0f", ""): value for cp, value in annotations(folder).items()}
    found = []
    for characters, image in glyphs(folder / FONT):
        name, keywords = known.get(characters, ("", ()))
        if not name or name == "E10-skin tone":
            continue
        share, mirrored = weight(characters, name), not DIRECTED.search(name)
        prompts = (name, f"{name}, {', '.join(keywords[:3])}") if keywords else (name,)
        found.append(Picture(drawn(image), prompts, share, mirrored))
        found += recoloured(image, name, share, mirrored)
    return found


class Emoji:
    """The pictures as arrays, kept in one file so that they are made only once."""

    def __init__(self, cache: Path, folder: Path) -> None:
        if not cache.exists():
            self._make(cache, folder)
        stored = np.load(cache)
        self.pixels = torch.from_numpy(stored["pixels"])  # uint8 (pictures, sizes, CANVAS, CANVAS, 3)
        self.weights = torch.from_numpy(stored["weights"])
        self.mirrored = torch.from_numpy(stored["mirrored"])
        self.owner = torch.from_numpy(stored["first"])  # of the first prompt of each picture
        self.count = torch.from_numpy(stored["count"])
        self.prompts: list[str] = stored["prompts"].tolist()
        self.features = torch.from_numpy(stored["features"])  # float16 (prompts, tokens, width)
        self.pooled = torch.from_numpy(stored["pooled"])

    @staticmethod
    def _make(cache: Path, folder: Path) -> None:
        from duca_compile_models.text import Encoder

        found = pictures(folder)
        prompts = ["", *(prompt for picture in found for prompt in picture.prompts)]
        count = np.array([len(picture.prompts) for picture in found])
        encoder = Encoder.load()
        parts = [encoder(prompts[start : start + 256]) for start in range(0, len(prompts), 256)]
        with open(cache.with_suffix(".tmp"), "wb") as file:
            np.savez(
                file,
                pixels=np.stack([picture.pixels for picture in found]),
                weights=np.array([picture.weight for picture in found], np.float32),
                mirrored=np.array([picture.mirrored for picture in found]),
                first=1 + np.cumsum(count) - count,
                count=count,
                prompts=np.array(prompts),
                features=torch.cat([part[0] for part in parts]).half().numpy(),
                pooled=torch.cat([part[1] for part in parts]).half().numpy(),
            )
        cache.with_suffix(".tmp").rename(cache)

    def draw(self, size: int, side: int) -> tuple[Tensor, Tensor]:
        """Random pictures in [-1, 1], float32 (size, 3, side, side), and a prompt of each by number, int64 (size,)."""
        pick = torch.multinomial(self.weights, size, replacement=True)
        prompt = self.owner[pick] + (torch.rand(size) ** 2 * self.count[pick]).long()  # the plain name most often
        window = 64
        at = torch.randint(0, CANVAS - window + 1, (size, 2))
        which = torch.randint(0, len(SIZES), (size,))
        flip = (torch.rand(size) < 0.5) & self.mirrored[pick]
        images = torch.empty(size, 3, window, window)
        for index, (number, chosen, (y, x)) in enumerate(zip(pick.tolist(), which.tolist(), at.tolist(), strict=True)):
            crop = self.pixels[number, chosen, y : y + window, x : x + window].permute(2, 0, 1)
            images[index] = crop.flip(-1) if flip[index] else crop
        return torch.nn.functional.avg_pool2d(images / 127.5 - 1, window // side), prompt
