"""Images: the pixel grid, agreement with Pillow, refusals before decoding."""

import io
import math
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from pipeline.data.formats import codecs, fit, headers, png
from pipeline.diffusion.pixels import LOG_VOLUME_NATS_PER_DIM, PIXEL_BIN, to_model, to_pixels

RNG = np.random.default_rng(0)


def photo(height: int = 40, width: int = 56, channels: int = 3) -> np.ndarray:
    small = RNG.integers(0, 256, (6, 7, channels), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def test_the_grid_is_exact_and_inverts() -> None:
    u = torch.arange(256, dtype=torch.uint8)
    x = to_model(u)
    assert x.dtype == torch.float32
    assert x.tolist() == [2 * (k + 0.5) / 256 - 1 for k in range(256)]
    assert torch.equal(to_pixels(x), u)
    for inside in (-0.499 * PIXEL_BIN, 0.499 * PIXEL_BIN):
        assert torch.equal(to_pixels(x.double() + inside), u)
    assert to_pixels(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    assert u.tolist() == list(range(256))


def test_eight_bits_of_noise_score_eight_bits() -> None:
    """Uniform density 1/2 on [-1, 1]: ln 2 nats a dimension in x."""
    assert (math.log(2) + LOG_VOLUME_NATS_PER_DIM) / math.log(2) == pytest.approx(8.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_upright_and_equal_to_pillow(kind: str, orientation: int, channels: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(Image.fromarray(photo()), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    got = codecs.decode(data, channels)
    if channels == 1:
        luma = expected @ np.array([0.299, 0.587, 0.114])
        assert got.shape == (*expected.shape[:2], 1)
        assert np.abs(got[:, :, 0] - luma).max() <= 1.0
    else:
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images(kind: str, channels: int) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(Image.fromarray(photo(channels=1)[:, :, 0]), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L"))
    assert np.array_equal(codecs.decode(data, channels), np.repeat(expected[:, :, None], channels, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "palette", "1"])
def test_other_modes(mode: str) -> None:
    source = Image.fromarray(photo())
    if mode == "palette":
        image, options = source.quantize(16), {"transparency": 3}
    elif mode in ("RGBA", "LA"):
        image, options = source.convert(mode), {}
        image.putalpha(Image.fromarray(photo(channels=1)[:, :, 0]))
    else:
        image, options = source.convert(mode), {}
    data = encoded(image, "PNG", **options)
    rgba = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    assert np.array_equal(codecs.decode(data, 3), np.asarray(Image.alpha_composite(white, rgba).convert("RGB")))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    end = b"IEND"
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + bytes(4)
        + end
        + struct.pack(">I", zlib.crc32(end))
    )


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(photo()) for _ in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=10)


BAD = {
    "empty": (b"", "empty file"),
    "text": (b"hello, world", "not a jpg, png or webp"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a jpg, png or webp"),
    "pickle": (b"\x80\x04\x95", "not a jpg, png or webp"),
    "bomb": (png_header(100_000, 100_000), "100000 x 100000 pixels"),
    "wide bomb": (png_header(2**31 - 1, 2**31 - 1), "pixels; allowed"),
    "no pixels": (png_header(0, 5), "0 x 5 pixels"),
    "header only": (png_header(5, 5), "decoder refused"),
    "jpg without frame": (b"\xff\xd8\xff\xd9" + bytes(20), "no frame header"),
    "jpg soi only": (b"\xff\xd8\xff", "no frame header"),
    "webp riff only": (b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(8), "webp"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_are_named(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(ValueError, match=reason):
        codecs.decode(data, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_refused(kind: str) -> None:
    data = encoded(Image.fromarray(photo()), kind)
    for cut in range(0, len(data) - 4, 37):
        with pytest.raises(ValueError):
            codecs.decode(data[:cut], 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_flipped_bytes_decode_or_are_refused_by_name(kind: str) -> None:
    data = bytearray(encoded(Image.fromarray(photo()), kind))
    for at in range(0, len(data), 23):
        damaged = bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            made = codecs.decode(damaged, 3, headers.Limits(pixels=100_000))
        except ValueError:
            continue
        assert made.dtype == np.uint8
        assert made.shape[2] == 3
        assert made.size <= 300_000


def test_limits() -> None:
    data = encoded(Image.fromarray(photo()), "PNG")
    with pytest.raises(ValueError, match="more than the limit of 100"):
        codecs.decode(data, 3, headers.Limits(bytes=100))
    with pytest.raises(ValueError, match="56 x 40 pixels"):
        codecs.decode(data, 3, headers.Limits(pixels=56 * 40 - 1))
    assert codecs.decode(data, 3, headers.Limits(pixels=56 * 40)).shape == (40, 56, 3)


def rgb(data: bytes) -> np.ndarray:
    """Pillow's upright RGB of the first frame, on white."""
    with Image.open(io.BytesIO(data)) as image:
        rgba = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "AVIF", "animated PNG", "animated WEBP", "animated GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA"])
def test_what_cameras_scanners_and_the_web_give(kind: str, mode: str) -> None:
    image = Image.fromarray(photo())
    if mode == "RGBA":
        image.putalpha(Image.fromarray(photo(channels=1)[:, :, 0]))
    image = image.convert(mode)
    many = {"save_all": True, "append_images": [image.rotate(180)], "duration": 10} if "animated" in kind else {}
    data = encoded(image, kind.split()[-1], **many)
    assert np.abs(codecs.decode(data, 3).astype(int) - rgb(data)).max() == 0
    assert codecs.decode(data, 1).shape == (40, 56, 1)
    with pytest.raises(ValueError, match="pixels; allowed"):
        codecs.decode(data, 3, headers.Limits(pixels=100))
    with pytest.raises(ValueError, match="give a jpg, png or webp of 8 bits"):
        codecs.decode(data, 3, plain=True)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_divided_by_257(suffix: str, channels: int) -> None:
    levels = RNG.integers(0, 65536, (9, 7, channels), dtype=np.uint16)
    done, data = cv2.imencode(suffix, levels[:, :, [2, 1, 0, 3][:channels]] if channels > 1 else levels)
    assert done
    alpha = levels[:, :, 3:] / 65535 if channels == 4 else np.ones((9, 7, 1))
    want = np.rint((levels[:, :, :3] * alpha + 65535 * (1 - alpha)) / 257)
    assert np.abs(codecs.decode(data.tobytes(), 1 if channels == 1 else 3) - want).max() <= (channels == 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_wherever_it_is_kept(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    upright = ImageOps.exif_transpose
    body = exif.tobytes()
    for kind in ("TIFF", "AVIF"):
        data = encoded(Image.fromarray(photo()), kind, exif=body)
        assert np.array_equal(codecs.decode(data, 3), rgb(data)), kind
    photo_of = Image.fromarray(photo())
    text = PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(body):8d}\n{body.hex()}\n", zip=True)
    bare = encoded(photo_of, "WEBP", lossless=True, exif=body.removeprefix(b"Exif\0\0"))
    prefixed = encoded(photo_of, "WEBP", lossless=True, exif=b"Exif\0\0" + body.removeprefix(b"Exif\0\0"))
    deep = encoded(Image.fromarray(photo(channels=1)[:, :, 0].astype(np.uint16) * 257), "PNG", exif=body)
    marked = Image.fromarray(np.asarray(photo_of))
    marked.getexif()[0x112] = orientation
    want = np.asarray(upright(marked))
    for data in (encoded(photo_of, "PNG", pnginfo=text), bare, prefixed):
        assert np.array_equal(codecs.decode(data, 3), want)
    with Image.open(io.BytesIO(deep)) as opened:
        assert np.array_equal(codecs.decode(deep, 1)[:, :, 0], np.asarray(upright(opened)).astype(np.uint32) // 257)


@pytest.mark.parametrize("profiled", [False, True])
def test_cmyk_of_both_polarities(profiled: bool) -> None:
    image = Image.fromarray(photo()).convert("CMYK")
    options = {"icc_profile": b"no profile"} if profiled else {}  # a damaged one: the plain formula
    adobe = encoded(image, "JPEG", **options)
    with Image.open(io.BytesIO(adobe)) as opened:
        stored = 255 - np.asarray(opened).astype(int)  # as they lie in the file: Adobe's are inverted
    assert np.abs(codecs.decode(adobe, 3).astype(int) - rgb(adobe)).max() <= 1
    at = adobe.index(b"\xff\xee")
    plain = adobe[:at] + adobe[at + 2 + int.from_bytes(adobe[at + 2 : at + 4], "big") :]
    ink, black = stored[:, :, :3], stored[:, :, 3:]
    assert np.abs(codecs.decode(plain, 3) - (255 - ink) * (255 - black) / 255).max() <= 1


def test_jpeg_with_stray_bytes_and_the_smallest_webp() -> None:
    data = encoded(Image.fromarray(photo()), "JPEG")
    second = 4 + int.from_bytes(data[4:6], "big")
    stray = data[:second] + b"\x00\x12\x34" + data[second:]
    assert np.array_equal(codecs.decode(stray, 3), codecs.decode(data, 3))
    small = encoded(Image.new("RGB", (1, 1), (255, 255, 255)), "WEBP", lossless=True)
    assert np.array_equal(codecs.decode(small, 3), [[[255, 255, 255]]]), len(small)


def own(payloads: list[bytes], channels: int, height: int = 40, width: int = 56) -> codecs.UInt8s:
    out = np.full((len(payloads), height, width, channels), 7, dtype=np.uint8)
    codecs.decode_own([memoryview(payload) for payload in payloads], out)
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("encoding", ["png", "jpg", "webp"])
def test_what_is_written_comes_back_as_any_reader_has_it(encoding: str, channels: int) -> None:
    pixels = [np.roll(photo(channels=channels), shift, axis=1) for shift in range(codecs.AT_ONCE + 3)]
    data = [codecs.encode(each, encoding) for each in pixels]
    assert codecs.encode(pixels[0], encoding) == data[0]
    found = own(data, channels)
    for payload, each, made in zip(data[:3], pixels, found, strict=False):
        with Image.open(io.BytesIO(payload)) as opened:
            theirs = np.asarray(opened.convert("L" if channels == 1 else "RGB")).reshape(made.shape)
        assert np.array_equal(made, codecs.decode(payload, channels))
        assert np.array_equal(made, theirs)
        assert encoding == "jpg" or np.array_equal(made, each)
    assert encoding == "jpg" or np.array_equal(found, np.stack(pixels))


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_of_other_writers_are_read_too(channels: int) -> None:
    pixels = photo(channels=channels)
    theirs = encoded(Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels), "PNG")
    assert theirs[: png.HEAD] == png.head(40, 56, channels), "only the filters of its rows tell them apart"
    assert np.array_equal(own([codecs.encode_png(pixels), theirs], channels), np.stack([pixels, pixels]))


@pytest.mark.parametrize("encoding", ["png", "jpg", "webp"])
def test_what_was_not_written_whole_is_refused(encoding: str) -> None:
    good = codecs.encode(photo(), encoding)
    for bad in (good[:-30], good[: len(good) // 2], good[:10] + bytes(100), codecs.encode(photo(16, 16), encoding)):
        with pytest.raises(codecs.DecodeError) as refused:
            own([good, bad], 3)
        assert refused.value.index == 1


@pytest.mark.parametrize("policy", fit.POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_fit(policy: str, channels: int) -> None:
    square = photo(32, 32, channels)
    assert np.array_equal(fit.fit(square, 32, policy), square)
    for height, width in ((40, 56), (56, 40), (17, 90), (8, 9)):
        pixels = photo(height, width, channels)
        if policy == "exact":
            with pytest.raises(ValueError, match="resize: exact wants 16 x 16"):
                fit.fit(pixels, 16, policy)
        else:
            assert fit.fit(pixels, 16, policy).shape == (16, 16, channels)
    flat = np.full((33, 50, channels), 77, dtype=np.uint8)
    if policy != "exact":
        assert (fit.fit(flat, 16, policy) == 77).all()


def test_centre_crop_takes_the_middle() -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    assert (fit.fit(pixels, 10, "centre-crop") == 200).all()


@pytest.mark.parametrize("shape", [(3, 500), (500, 7), (2, 90), (60, 2)])
def test_the_middle_of_a_thin_image_is_that_of_the_whole(shape: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    scale = 64 / min(shape)
    whole = cv2.resize(pixels, (round(shape[1] * scale), round(shape[0] * scale)), interpolation=cv2.INTER_CUBIC)
    top, left = (whole.shape[0] - 64) // 2, (whole.shape[1] - 64) // 2
    found = fit.fit(pixels, 64, "centre-crop").astype(int)
    assert np.abs(found - whole[top : top + 64, left : left + 64]).max() <= 1


def test_thin_images_take_no_more_memory_than_they_need() -> None:
    code = """
import resource, numpy as np
from pipeline.data.formats import fit
fit.fit(np.zeros((9, 9, 3), np.uint8), 512, "centre-crop")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for shape in ((1, 2000), (2000, 1), (1, 65000), (65000, 1), (1, 1), (1, 2), (700, 3)):
    for policy in ("centre-crop", "squash"):
        made = fit.fit(np.full((*shape, 3), 77, np.uint8), 512, policy)
        assert made.shape == (512, 512, 3) and (made == 77).all(), shape
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64, f"{done.stdout} MiB"


def test_squash_filters_the_side_that_shrinks() -> None:
    """A comb of single pixels, 16 times as wide and half as high as asked, is even grey."""
    comb = np.zeros((16, 512, 1), dtype=np.uint8)
    comb[:, ::2] = 255
    made = fit.fit(comb, 32, "squash")
    assert made.min() >= 127
    assert made.max() <= 128


def test_unknown_policy_teaches_the_names() -> None:
    with pytest.raises(ValueError, match="did you mean 'squash'"):
        fit.fit(photo(), 8, "sqash")
