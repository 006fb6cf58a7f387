"""Which files are images, by name."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")
IMAGE_SUFFIXES += (".avif", ".heic", ".heif", ".ico", ".svg")  # not decoded: such a file becomes a quarantine row


def is_image(name: str) -> bool:
    """Whether a file's name ends in the suffix of an image format."""
    return name.lower().endswith(IMAGE_SUFFIXES)
