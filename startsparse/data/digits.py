"""scikit-learn's bundled digits: 1797 images, no download. For a first run and for tests."""

from pathlib import Path

import torch
import torch.nn.functional as F

from startsparse.data.arrays import Arrays

SIZE = 32


def load(root: Path, mirror: str = "") -> Arrays:  # noqa: ARG001 -- the set needs no file
    """The 8 x 8 digits, bilinearly enlarged to 32 x 32, as three equal channels.

    A fifth of every class is the test set (1437 / 360 images), the same for every seed of a run.
    """
    # Imported here: scikit-learn takes a second, and no other set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).unsqueeze(1) * (255 / 16)
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, stratify=digits.target, random_state=0
    )
    return Arrays(
        train=(images[train], labels[train]),
        test=(images[test], labels[test]),
        classes=10,
        class_names=tuple("0123456789"),
        mean=(0.305,) * 3,
        std=(0.324,) * 3,
        pad=4,
        flip=False,  # a mirrored digit is another sign
    )
