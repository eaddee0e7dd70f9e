"""One stored frame of a DICOM file as an array: fragments, decoders, bit masks.

Every transfer syntax names its decoders in order; only permissively licensed ones are listed
(pylibjpeg-libjpeg, GPL, never is: it is not asked even where it is installed). The first that
succeeds wins and is recorded. Colour stays in the colour space the decoder left it in. Not done
here: anything that depends on what the values mean.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.dicom_codestream import check_rle, codestream_size
from medmo_edge.dicom_fragments import read_frame_payload
from medmo_edge.dicom_header import BIG_ENDIAN, DEFLATED, EXPLICIT, IMPLICIT, Header, Layout
from medmo_edge.errors import ImageError

NATIVE = frozenset({IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED})
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
RLE = "1.2.840.10008.1.2.5"
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")

# transfer syntax -> pydicom's names of the decoders, tried in this order
DECODERS: dict[str, tuple[str, ...]] = {
    RLE: ("pylibjpeg", "pydicom"),
    "1.2.840.10008.1.2.4.50": ("pillow", "gdcm"),  # JPEG Baseline
    JPEG_EXTENDED: ("pillow", "gdcm", "imagecodecs"),
    JPEG_LOSSLESS[0]: ("gdcm",),
    JPEG_LOSSLESS[1]: ("gdcm",),
    "1.2.840.10008.1.2.4.80": ("pyjpegls", "gdcm"),  # JPEG-LS
    "1.2.840.10008.1.2.4.81": ("pyjpegls", "gdcm"),
    "1.2.840.10008.1.2.4.90": ("pylibjpeg", "gdcm", "pillow"),  # JPEG 2000
    "1.2.840.10008.1.2.4.91": ("pylibjpeg", "gdcm", "pillow"),
    "1.2.840.10008.1.2.4.201": ("pylibjpeg",),  # HTJ2K
    "1.2.840.10008.1.2.4.202": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.203": ("pylibjpeg",),
}
DECODER_MODULES = {
    "gdcm": "gdcm",
    "pillow": "PIL",
    "pyjpegls": "jpeg_ls",
    "pylibjpeg": "pylibjpeg",
}
# Registered after pydicom 3.0, named here so that a refusal can name them.
_NEW_SYNTAXES = {
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
}
PACKAGES = {
    "gdcm": "python-gdcm",
    "imagecodecs": "imagecodecs",
    "pillow": "pillow",
    "pyjpegls": "pyjpegls",
    "pylibjpeg": "pylibjpeg pylibjpeg-openjpeg pylibjpeg-rle",
}

# A constant frame is believed only when its payload is as small as a constant frame's would be:
# bits per sample a codec spends on one, doubled. JPEG Lossless needs at least one Huffman code per
# sample, RLE two bytes per 128 of each byte plane, JPEG a few bits per 8 x 8 block, others less.
_CONSTANT_BITS = {JPEG_LOSSLESS[0]: 3.0, JPEG_LOSSLESS[1]: 3.0}
_CONSTANT_BITS_OTHER = 0.25
_CONSTANT_OVERHEAD_BYTES = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A decoded frame: values [H, W] or [H, W, S], their colour space, and who decoded them."""

    values: NDArray[Any]
    photometric: str
    decoder: str


def decode_frame(header: Header, layout: Layout, frame: int) -> Stored:
    """Decode frame ``frame`` (from 0).

    Errors: ImageError when the syntax has no decoder here or the frame is damaged.
    """
    if frame >= layout.num_frames:
        raise ImageError(f"has {layout.num_frames} frame(s), counted from 0: no frame {frame}")
    syntax = header.transfer_syntax
    if syntax in NATIVE:
        if header.encapsulated:
            raise ImageError("pixel data is encapsulated but its transfer syntax is not compressed")
        return _native(header, layout, _read_native(header, layout, frame), frame)
    if syntax != DEFLATED_FRAMES and syntax not in DECODERS:
        raise ImageError(f"transfer syntax {_syntax_name(syntax)} is not supported")
    if not header.encapsulated:
        raise ImageError("pixel data is not encapsulated but its transfer syntax is compressed")
    payload = read_frame_payload(header, layout, frame)
    if syntax == DEFLATED_FRAMES:
        return _native(header, layout, _inflate_frame(payload, layout), 0)
    stored = _decompress(payload, header, layout)
    _doubt_constant(stored, payload, header)
    return stored


def _syntax_name(uid: str) -> str:
    from pydicom.uid import UID

    name = _NEW_SYNTAXES.get(uid) or UID(uid).name
    return f"{name} ({uid})" if name != uid else uid


def _read_native(header: Header, layout: Layout, frame: int) -> bytes:
    """Bytes of one frame; with one bit per value also the bits of its neighbours' last bytes."""
    first_bit = layout.frame_bits * frame
    begin, end = first_bit // 8, (first_bit + layout.frame_bits + 7) // 8
    if _swapped_words(header, layout):
        begin, end = begin - begin % 2, end + end % 2
    header.stream.seek(header.offset + begin)
    return header.stream.read(end - begin)


def _swapped_words(header: Header, layout: Layout) -> bool:
    """8-bit values written as big-endian 16-bit words: the bytes come in swapped pairs."""
    return not header.little_endian and header.vr == "OW" and layout.bits_allocated <= 8


def _inflate_frame(payload: bytes, layout: Layout) -> bytes:
    """A frame of the Deflated Image Frame Compression syntax (PS3.5 A.4.13): raw deflate."""
    needed = (layout.frame_bits + 7) // 8
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(payload, needed)
    except zlib.error as error:
        raise ImageError(f"deflated frame is damaged ({error})") from error
    if len(data) < needed:
        raise ImageError(f"deflated frame holds {len(data)} bytes of {needed}")
    return data


def _native(header: Header, layout: Layout, data: bytes, frame: int) -> Stored:
    if _swapped_words(header, layout):
        padded = data + bytes(len(data) % 2)
        skip = (layout.frame_bits * frame // 8) % 2
        data = np.frombuffer(padded, ">u2").astype("<u2").tobytes()[skip:]
    if layout.bits_allocated == 1:
        first = (layout.frame_bits * frame) % 8
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        values: NDArray[Any] = bits[first : first + layout.values]
    else:
        kind = "f" if layout.is_float else "i" if layout.signed else "u"
        order = "<" if header.little_endian else ">"
        dtype = np.dtype(f"{order}{kind}{layout.bits_allocated // 8}")
        values = np.frombuffer(data, dtype, count=layout.frame_bits // layout.bits_allocated)
        values = values.astype(dtype.newbyteorder("="))
    photometric = layout.photometric
    if photometric in ("YBR_FULL_422", "YBR_PARTIAL_422"):
        values, photometric = _spread_chroma(values), photometric.replace("_422", "")
        planar = 0
    else:
        planar = layout.planar
    return Stored(
        values=_mask(_shape(values, layout, planar), layout),
        photometric=photometric,
        decoder="native",
    )


def _spread_chroma(values: NDArray[Any]) -> NDArray[Any]:
    """Y1 Y2 Cb Cr -> Y1 Cb Cr Y2 Cb Cr (PS3.3 C.7.6.3.1.2)."""
    groups = values.reshape(-1, 4)
    return groups[:, [0, 2, 3, 1, 2, 3]].reshape(-1)


def _shape(values: NDArray[Any], layout: Layout, planar: int) -> NDArray[Any]:
    if layout.samples == 1:
        return values.reshape(layout.rows, layout.columns)
    if planar:
        planes = values.reshape(layout.samples, layout.rows, layout.columns)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))
    return values.reshape(layout.rows, layout.columns, layout.samples)


def _mask(values: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Keep BitsStored bits below HighBit: the others may hold overlays or anything else."""
    if layout.is_float or layout.bits_stored == layout.bits_allocated:
        return values
    left = layout.bits_allocated - 1 - layout.high_bit
    right = layout.bits_allocated - layout.bits_stored
    masked: NDArray[Any] = np.right_shift(np.left_shift(values, left), right)  # keeps the sign
    return masked


def _decompress(payload: bytes, header: Header, layout: Layout) -> Stored:
    _check_payload(payload, header, layout)
    failures: list[str] = []
    for name in DECODERS[header.transfer_syntax]:
        try:
            return _decode_with(name, payload, header, layout)
        except ModuleNotFoundError:
            failures.append(f"{name}: not installed, pip install {PACKAGES[name]}")
        except MemoryError:
            raise
        # Decoders raise nearly anything on damaged bytes.
        except Exception as error:
            # pydicom puts a sentence about its plug-ins in front.
            reason = " ".join(str(error).split()).rsplit(f"{name}: ", 1)[-1]
            failures.append(f"{name}: {reason[:120]}")
        # A decoder in Rust panics, with no Exception: a laxer one would show a wrong picture.
        except BaseException as error:
            if type(error).__module__ != "pyo3_runtime":
                raise
            raise ImageError(f"compressed frame is damaged: {name} cannot follow it") from None
    raise ImageError(
        f"{_syntax_name(header.transfer_syntax)} frame cannot be decoded ({'; '.join(failures)})"
    )


def _check_payload(payload: bytes, header: Header, layout: Layout) -> None:
    if header.transfer_syntax == RLE:
        return check_rle(payload, (layout.frame_bits + 7) // 8)
    size = codestream_size(payload)
    if (size.columns, size.rows, size.samples) != (layout.columns, layout.rows, layout.samples):
        raise ImageError(
            f"compressed frame is {size.columns} x {size.rows} x {size.samples}, "
            f"the header says {layout.columns} x {layout.rows} x {layout.samples}"
        )
    return None


def _decode_with(name: str, payload: bytes, header: Header, layout: Layout) -> Stored:
    if name == "imagecodecs":
        return _decode_jpeg12(payload, layout)
    if layout.bits_allocated == 1 and header.transfer_syntax == RLE:
        return _decode_rle_bits(name, payload, layout)
    values, meta = _by_pydicom(name, payload, header.transfer_syntax, layout)
    return Stored(values=values, photometric=str(meta["photometric_interpretation"]), decoder=name)


def _by_pydicom(
    name: str, payload: bytes, syntax: str, layout: Layout
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Decode one frame with one plug-in of pydicom; colour untouched, sign and precision mended."""
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder

    decoder = get_decoder(syntax)
    if name not in decoder.available_plugins:
        raise ModuleNotFoundError(name)
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": layout.samples,
        "bits_allocated": max(8, layout.bits_allocated),
        "bits_stored": layout.bits_stored,
        "pixel_representation": int(layout.signed),
        "photometric_interpretation": layout.photometric,
        "planar_configuration": layout.planar,
        "number_of_frames": 1,
        "pixel_keyword": "PixelData",
    }
    return decoder.as_array(
        encapsulate([payload], has_bot=False), index=0, raw=True, decoding_plugin=name, **options
    )


def _decode_rle_bits(name: str, payload: bytes, layout: Layout) -> Stored:
    """One bit per value: RLE codes the packed bytes (PS3.5 8.2.2), as one row of them."""
    packed = Layout(
        rows=1,
        columns=(layout.values + 7) // 8,
        samples=1,
        bits_allocated=8,
        bits_stored=8,
        high_bit=7,
        signed=False,
        planar=0,
        photometric="MONOCHROME2",
        num_frames=1,
        is_float=False,
    )
    data, _ = _by_pydicom(name, payload, RLE, packed)
    bits = np.unpackbits(data.reshape(-1), bitorder="little")[: layout.values]
    return Stored(
        values=_shape(bits, layout, layout.planar), photometric=layout.photometric, decoder=name
    )


def _decode_jpeg12(payload: bytes, layout: Layout) -> Stored:
    """12-bit JPEG, which Pillow and GDCM cannot read; imagecodecs (BSD) is optional."""
    import imagecodecs

    values = imagecodecs.jpeg_decode(payload)
    if values.shape != (layout.rows, layout.columns):
        raise ValueError(f"shape {values.shape} is not {(layout.rows, layout.columns)}")
    return Stored(values=values, photometric=layout.photometric, decoder="imagecodecs")


def _doubt_constant(stored: Stored, payload: bytes, header: Header) -> None:
    """A decoder that fails silently leaves one value everywhere: refuse that, not a blank frame."""
    values = stored.values
    first = values.reshape(-1, *values.shape[2:])[0]
    if values.shape[:2] == (1, 1) or not bool((values == first).all()):
        return
    bits = _CONSTANT_BITS.get(header.transfer_syntax, _CONSTANT_BITS_OTHER)
    if header.transfer_syntax == RLE:
        bits *= values.itemsize
    believable = _CONSTANT_OVERHEAD_BYTES + values.size * bits / 8
    if len(payload) <= believable or _declared_constant(header, first):
        return
    raise ImageError(
        f"decoder {stored.decoder} made one constant value of a compressed frame of "
        f"{len(payload)} bytes: the frame is damaged or the decoder fails"
    )


def _declared_constant(header: Header, value: NDArray[Any]) -> bool:
    smallest = header.dataset.get("SmallestImagePixelValue")
    largest = header.dataset.get("LargestImagePixelValue")
    return smallest is not None and smallest == largest and bool((value == smallest).all())
